"""Packages that decode beside llamax, each in a process and an environment of its own.

``decoder`` starts one over an exported folder; its process also runs from this file::

    python benchmarks/peers/decoders.py ctranslate2 HUB float32 --threads 1

It reads a line of JSON for each request, [prompts, number of new tokens], and answers with
[ids, wall seconds, CPU seconds].  Prompts are answered greedily, and answers have no end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

Prompts = list[list[int]]
Answer = tuple[Prompts, dict[str, float]]  # the new ids, and seconds by clock
KINDS = {  # package, and type of the weights
    "llama.cpp-F32": ("llama.cpp", "f32"),
    "llama.cpp-Q8_0": ("llama.cpp", "q8_0"),
    "ctranslate2-float32": ("ctranslate2", "float32"),
    "ctranslate2-int8": ("ctranslate2", "int8"),
    "older llamax": ("llamax", "float32"),
}


@contextmanager
def decoder(
    python: Path, kind: str, hub: Path, threads: int, path: Path | None = None
) -> Iterator[Callable[[Prompts, int], Answer]]:
    """A function that continues prompts with one of ``KINDS``; its process ends with the block.

    ``path``: folder with modules that come first.
    """
    package, weights = KINDS[kind]
    command = [python, __file__, package, hub, weights, "--threads", str(threads)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | ({"PYTHONPATH": str(path)} if path else {}),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    given, answers = process.stdin, process.stdout

    def answer(prompts: Prompts, new: int) -> Answer:
        print(json.dumps([prompts, new]), file=given, flush=True)
        while not (line := answers.readline()).startswith("ANSWER "):
            assert line, f"{kind} has ended"
        ids, wall, cpu = json.loads(line.removeprefix("ANSWER "))
        return ids, {"wall": wall, "cpu": cpu}

    try:
        yield answer
    finally:
        given.close()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("package", choices=MAKERS)
    parser.add_argument("hub", type=Path, help="exported folder")
    parser.add_argument("weights", help="type of the weights")
    parser.add_argument("--threads", type=int, default=1, help="threads that compute")
    options = parser.parse_args()
    make = MAKERS[options.package]
    with tempfile.TemporaryDirectory() as scratch:
        run = make(options.hub, Path(scratch), options.weights, options.threads)
        for line in sys.stdin:
            prompts, new = json.loads(line)
            wall, cpu = time.perf_counter(), time.process_time()
            ids = run(prompts, new)
            seconds = time.perf_counter() - wall, time.process_time() - cpu
            print("ANSWER", json.dumps([ids, *seconds]), flush=True)


def llama_cpp(
    hub: Path, scratch: Path, weights: str, threads: int
) -> Callable[[Prompts, int], Prompts]:
    """llama.cpp's server in this process, through xllamacpp; its cache as llamax has it, in F32."""
    sys.path.append(str(Path(__file__).parents[1]))
    from peers.llama_cpp import completions, convert, server_of

    file, length = scratch / "model.gguf", json.loads((hub / "config.json").read_text())
    convert(hub, file, weights)
    server = server_of(file, 8, length["max_position_embeddings"], threads, "f32")

    def run(prompts: Prompts, new: int) -> Prompts:
        ask = partial(completions, server.listening_address, new=new)
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(ask, prompts))

    return run


def ctranslate2(
    hub: Path, scratch: Path, weights: str, threads: int
) -> Callable[[Prompts, int], Prompts]:
    """ctranslate2's generator over the folder as it converts it."""
    import ctranslate2
    import transformers
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(hub)).convert(str(scratch / "ct2"))
    options: dict[str, Any] = {"compute_type": weights, "intra_threads": threads}
    model = ctranslate2.Generator(str(scratch / "ct2"), inter_threads=1, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub)

    def run(prompts: Prompts, new: int) -> Prompts:
        words = [tokenizer.convert_ids_to_tokens(ids) for ids in prompts]
        limits = {"max_length": new, "min_length": new, "sampling_topk": 1, "end_token": []}
        made = model.generate_batch(words, include_prompt_in_result=False, **limits)
        return [one.sequences_ids[0] for one in made]

    return run


def llamax(
    hub: Path, scratch: Path, weights: str, threads: int
) -> Callable[[Prompts, int], Prompts]:
    """llamax, perhaps of an older checkout."""
    import torch

    from llamax.inference.engine import open_model
    from llamax.inference.sampling import Sampling, generate_tokens
    from llamax.parallel.collectives import Solo

    torch.set_num_threads(threads)
    model = open_model(hub).build(Solo("tp"), torch.device("cpu"), weights)

    def run(prompts: Prompts, new: int) -> Prompts:
        steps = generate_tokens(model, prompts, max_new_tokens=new, sampling=Sampling())
        return [list(map(int, row)) for row in zip(*steps, strict=True)]

    return run


MAKERS = {"llama.cpp": llama_cpp, "ctranslate2": ctranslate2, "llamax": llamax}

if __name__ == "__main__":
    main()
