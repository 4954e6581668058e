"""Throughput of ``llamax serve`` beside transformers' ``generate``, one request after another.

    python benchmarks/serve.py --rounds 3

Concurrent clients each ask for one greedy answer; transformers answers the same prompts one by one.
The 57 M Llama of ``benchmarks/generate.py``, fp32, random weights.  The two take turns; both must
make the same tokens.  The memory of the server is compared with its weights and its cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mistral_common
import torch
import transformers
from generate import LARGE, SMALL

from llamax.data.tokenizer.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=16, help="concurrent requests")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of every answer")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="length of every prompt")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--smallest", action="store_true", help="smallest size, only to try it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        compare(options, Path(scratch))


def compare(options: argparse.Namespace, scratch: Path) -> None:
    config = SMALL if options.smallest else LARGE
    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hub("float32")))
    model.generation_config.eos_token_id = None
    model.save_pretrained(scratch / "hub")
    edit(scratch / "hub" / "config.json", eos_token_id=None)
    pieces = next(Path(mistral_common.__file__).parent.glob("data/tokenizer.model.v1"))
    shutil.copyfile(pieces, scratch / "hub" / "tokenizer.model")
    tokenizer = load_tokenizer(scratch / "hub")
    draw = torch.Generator().manual_seed(1)
    shape = (options.clients, options.prompt_tokens)
    prompts = torch.randint(3, config.vocab_size, shape, generator=draw).tolist()

    length = options.prompt_tokens + options.new_tokens
    command = [sys.executable, "-m", "llamax", "serve", str(scratch / "hub"), "--port=0"]
    command += [f"--threads={options.threads}", f"--slots={options.clients}", f"--length={length}"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        found = None
        while found is None:
            line = server.stderr.readline()
            assert line, "the server has ended"
            found = re.search(r" on (http://\S+) ", line)
        before = resident(server.pid)
        rates: dict[str, list[float]] = {"llamax serve": [], "transformers": []}
        cpu: dict[str, list[float]] = {"llamax serve": [], "transformers": []}
        for turn in range(options.rounds + 1):
            first = turn == 0  # it warms up, and shows that both make the same tokens
            mine, wall, used = serve(found[1], server.pid, prompts, options.new_tokens, first)
            theirs, their_wall, their_used = one_by_one(model, prompts, options.new_tokens)
            if first:
                names = {number: name for name, number in tokenizer.special.items()}
                texts = [[names.get(i) or tokenizer.decode([i]) for i in ids] for ids in theirs]
                same = [a == b for a, b in zip(mine, texts, strict=True)]
                print(f"equal answers: {sum(same)} of {len(same)}")
            else:
                tokens = options.clients * options.new_tokens
                rates["llamax serve"].append(tokens / wall)
                rates["transformers"].append(tokens / their_wall)
                cpu["llamax serve"].append(used)
                cpu["transformers"].append(their_used)
        after = peak(server.pid)
    finally:
        server.terminate()
        server.wait()
    for name, each in rates.items():
        print(
            f"{name:<14} {statistics.median(each):8.1f} tokens/s, "
            f"{statistics.median(cpu[name]):6.2f} CPU s"
        )
    ratio = [a / b for a, b in zip(*rates.values(), strict=True)]
    ratio_cpu = [b / a for a, b in zip(*cpu.values(), strict=True)]
    print(
        f"ratio {statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f}) by the wall "
        f"clock, {statistics.median(ratio_cpu):.2f} by CPU time"
    )
    weights = 4 * config.num_parameters()
    cache = 8 * options.clients * length * config.num_hidden_layers
    cache *= config.num_key_value_heads * config.head_dim
    print(
        f"server: {before / 1e6:.0f} MB when ready, {after / 1e6:.0f} MB at its peak; weights "
        f"{weights / 1e6:.0f} MB, cache {cache / 1e6:.0f} MB"
    )


def serve(
    url: str, pid: int, prompts: list[list[int]], new_tokens: int, named: bool
) -> tuple[list[list[str]], float, float]:
    """The tokens of each answer (if ``named``), seconds, and CPU seconds of the server."""

    def ask(prompt: list[int]) -> list[str]:
        body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0}
        body |= {"logprobs": 0} if named else {}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
        with urllib.request.urlopen(request) as reply:
            answer = json.load(reply)
        assert answer["usage"]["completion_tokens"] == new_tokens
        return answer["choices"][0]["logprobs"]["tokens"] if named else []

    used, began = cpu_seconds(pid), time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, prompts))
    return answers, time.perf_counter() - began, cpu_seconds(pid) - used


def one_by_one(
    model: transformers.LlamaForCausalLM, prompts: list[list[int]], new_tokens: int
) -> tuple[list[list[int]], float, float]:
    """The same of transformers in this process."""
    used, began = time.process_time(), time.perf_counter()
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
    wall, cpu = time.perf_counter() - began, time.process_time() - used
    return made, wall, cpu


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> float:
    return status(pid, "VmRSS")


def peak(pid: int) -> float:
    return status(pid, "VmHWM")


def status(pid: int, name: str) -> float:
    (line,) = re.findall(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return 1024 * float(line)


if __name__ == "__main__":
    main()
