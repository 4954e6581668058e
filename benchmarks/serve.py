"""Throughput of ``llamax serve`` beside llama.cpp's server and transformers' ``generate``.

    python benchmarks/serve.py --rounds 3
    python benchmarks/serve.py --peers llama.cpp --precisions float32 bfloat16 int8

Concurrent clients each ask for one greedy answer; transformers answers the same prompts one by one.
The 57 M Llama of ``benchmarks/generate.py`` with random weights; in float32 all must make the same
tokens.  They take turns.  llama.cpp is the PyPI package xllamacpp in an environment below
``--work``, or with ``--llama-server`` a program built from source; its types are

    float32   F32, cache F32        bfloat16   BF16, cache F16        int8   Q8_0, cache F16

F16 is its default for the cache, and its prompt cache is off: every turn computes the prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from generate import LARGE, SMALL, write_folder
from interop import CLIENTS, environment
from peers import llama_cpp

from llamax.config.model import ModelConfig
from llamax.data.tokenizer.tokenizer import load_tokenizer

Prompts = list[list[int]]
PRECISIONS = {  # of llamax serve: its arguments; of llama.cpp: weights, cache
    "float32": ((), "f32", "f32"),
    "bfloat16": (("--dtype=bfloat16",), "bf16", "f16"),
    "int8": (("--quantize=int8",), "q8_0", "f16"),
}


class Contestant(NamedTuple):
    """Answers prompts: the tokens as texts or ids, if they are ``named``.  ``pid``: its process."""

    name: str
    pid: int
    answer: Callable[[Prompts, bool], list[list[Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=16, help="concurrent requests")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of every answer")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="length of every prompt")
    parser.add_argument("--threads", type=int, default=2, help="threads of each")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    peers = ("transformers", "llama.cpp")
    parser.add_argument("--peers", nargs="+", choices=peers, default=["transformers"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["float32"])
    parser.add_argument("--work", type=Path, default=Path("build/interop"), help="environments")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server, built from source")
    parser.add_argument("--smallest", action="store_true", help="smallest size, only to try it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        config = SMALL if options.smallest else LARGE
        hub = Path(scratch, "hub")
        model = write_model(hub, config)
        draw = torch.Generator().manual_seed(1)
        shape = (options.clients, options.prompt_tokens)
        prompts = torch.randint(3, config.vocab_size, shape, generator=draw).tolist()
        for precision in options.precisions:
            compare(options, precision, hub, model, prompts)


def write_model(hub: Path, config: ModelConfig) -> transformers.LlamaForCausalLM:
    """Write a folder with random weights and a tokenizer; answers have no end."""
    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hub("float32")))
    write_folder(model, hub)
    return model


def compare(
    options: argparse.Namespace,
    precision: str,
    hub: Path,
    model: transformers.LlamaForCausalLM,
    prompts: Prompts,
) -> None:
    """Print the speed of every contestant in one precision."""
    arguments, weights, cache = PRECISIONS[precision]
    length = options.prompt_tokens + options.new_tokens
    with ExitStack() as stack:
        slots = f"--slots={options.clients}"
        size = f"--length={length}", f"--threads={options.threads}"
        url, pid, _ = stack.enter_context(llamax_server(hub, slots, *size, *arguments))
        contestants = [Contestant("llamax serve", pid, asker(url, options.new_tokens))]
        if "llama.cpp" in options.peers:
            url, pid = stack.enter_context(llama_server(options, hub, weights, cache, length))
            contestants.append(Contestant("llama.cpp", pid, llama_asker(url, options.new_tokens)))
        if "transformers" in options.peers and precision == "float32":
            answer = one_by_one(model, options.new_tokens)
            contestants.append(Contestant("transformers", os.getpid(), answer))
        race(precision, contestants, prompts, options, hub)


def race(
    precision: str,
    contestants: list[Contestant],
    prompts: Prompts,
    options: argparse.Namespace,
    hub: Path,
) -> None:
    """Warm up, compare the answers, then let the contestants take turns."""
    tokenizer = load_tokenizer(hub)
    special = {number: name for name, number in tokenizer.special.items()}
    own, *others = contestants
    expected = own.answer(prompts, True)
    for each in others:
        texts = [
            [special.get(i) or tokenizer.token_bytes(i).decode(errors="replace") for i in ids]
            for ids in each.answer(prompts, True)
        ]
        same = [a == b for a, b in zip(expected, texts, strict=True)]
        print(f"{precision}: equal answers: {sum(same)} of {len(same)} ({each.name})", flush=True)
    wall: dict[str, list[float]] = {each.name: [] for each in contestants}
    cpu: dict[str, list[float]] = {each.name: [] for each in contestants}
    for _ in range(options.rounds):
        for each in contestants:
            used, began = cpu_seconds(each.pid), time.perf_counter()
            each.answer(prompts, False)
            wall[each.name].append(time.perf_counter() - began)
            cpu[each.name].append(cpu_seconds(each.pid) - used)
    tokens = len(prompts) * options.new_tokens
    for each in contestants:
        print(
            f"{precision}: {each.name:<14} {tokens / statistics.median(wall[each.name]):8.1f} "
            f"tokens/s, {statistics.median(cpu[each.name]):6.2f} CPU s"
        )
    for each in others:
        ratio, ratio_cpu = (
            [b / a for a, b in zip(clock[own.name], clock[each.name], strict=True)]
            for clock in (wall, cpu)
        )
        print(
            f"{precision}: llamax serve / {each.name}: {statistics.median(ratio):.2f} "
            f"({min(ratio):.2f} to {max(ratio):.2f}) by the wall clock, "
            f"{statistics.median(ratio_cpu):.2f} by CPU time",
            flush=True,
        )


@contextmanager
def llamax_server(hub: Path, *arguments: str) -> Iterator[tuple[str, int, str]]:
    """The address of a running ``llamax serve``, its process, and the line that it shows."""
    command = [sys.executable, "-m", "llamax", "serve", str(hub), "--port=0", *arguments]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        found = None
        while found is None:
            line = server.stderr.readline()
            assert line, "the server has ended"
            found = re.search(r" on (http://\S+) ", line)
        yield found[1], server.pid, line
    finally:
        server.terminate()
        server.wait()


@contextmanager
def llama_server(
    options: argparse.Namespace, hub: Path, weights: str, cache: str, length: int
) -> Iterator[tuple[str, int]]:
    """The address and process of llama.cpp's server over the same weights."""
    python = environment(CLIENTS["llama.cpp"], options.work / "llama.cpp")
    assert python is not None, "llama.cpp's package cannot be installed"
    peer, file = Path(llama_cpp.__file__), hub.parent / f"{weights}.gguf"
    subprocess.run([python, peer, "convert", hub, file, "--type", weights], check=True)
    command = [python, peer, "serve", file, "--cache", cache, "--threads", str(options.threads)]
    command += ["--slots", str(options.clients), "--length", str(length)]
    if options.llama_server:
        command += ["--program", options.llama_server]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        assert line, "llama.cpp's server has ended"
        _, url, pid = line.split()
        yield url, int(pid)
    finally:
        server.stdin.close()
        server.wait()


def asker(url: str, new_tokens: int) -> Callable[[Prompts, bool], list[list[Any]]]:
    """Clients of llamax's server: the tokens of each answer, as texts."""

    def answer(prompts: Prompts, named: bool) -> list[list[Any]]:
        def ask(prompt: list[int]) -> list[Any]:
            body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0}
            reply = post(f"{url}/v1/completions", body | ({"logprobs": 0} if named else {}))
            assert reply["usage"]["completion_tokens"] == new_tokens
            return reply["choices"][0]["logprobs"]["tokens"] if named else []

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(ask, prompts))

    return answer


def llama_asker(url: str, new_tokens: int) -> Callable[[Prompts, bool], list[list[Any]]]:
    """Clients of llama.cpp's server: the tokens of each answer, as ids."""

    def answer(prompts: Prompts, named: bool) -> list[list[Any]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            asked = pool.map(lambda each: llama_cpp.completions(url, each, new_tokens), prompts)
            return list(asked)

    return answer


def post(url: str, body: dict[str, Any]) -> Any:
    head = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), head)) as it:
        return json.load(it)


def one_by_one(
    model: transformers.LlamaForCausalLM, new_tokens: int
) -> Callable[[Prompts, bool], list[list[Any]]]:
    """transformers in this process: the tokens of each answer, as ids."""

    def answer(prompts: Prompts, named: bool) -> list[list[Any]]:
        made = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
            made.append(out[0, len(prompt) :].tolist())
        return made

    return answer


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
