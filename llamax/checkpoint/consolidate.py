"""``llamax consolidate CHECKPOINT --out DIR``: a checkpoint becomes a Hugging Face folder.

What goes where is planned first; then processes stream tensors from the ranks' files to their
places in ``model.safetensors`` (or numbered files and an index), each through one slab of 16 MiB,
so memory does not grow with the model.  What is read is checked; the folder gets its name when all
is written.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from llamax.checkpoint import adapters, assemble, slabs
from llamax.checkpoint.assemble import Planned
from llamax.checkpoint.container import Progress, building, silent
from llamax.checkpoint.load import Checkpoint
from llamax.checkpoint.manifest import find
from llamax.errors import CheckpointError, ConfigError
from llamax.metrics import show_bytes, show_number, show_time
from llamax.program import leave_with_parent, summary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class Work(NamedTuple):
    """What every worker knows: where from, where to, and its own slab."""

    source: Checkpoint
    folder: Path
    offsets: dict[str, int]
    buffers: slabs.Buffers

    def fill(self, one: Planned) -> int:
        """Write one tensor; its bytes."""
        offset = self.offsets[one.name]
        return assemble.fill(self.source, self.folder, one, offset, self.buffers)


def consolidate(
    checkpoint: Path | str,
    out: Path | str,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = assemble.FILE_BYTES,
    tokenizer: Path | str | None = None,
    verify: bool = True,
    progress: Progress = silent,
    processes: int = 1,
) -> Path:
    """Write a checkpoint (a step's folder, or a run's: its newest) as a Hugging Face folder.

    ``dtype`` defaults to that of the weights; float32 takes the masters where there are some.
    ``verify`` checks what is read.  ``processes`` above 1 are forks.  A checkpoint of adapters
    becomes a folder of PEFT's.
    Raises CheckpointError where the checkpoint is damaged, ``out`` is in use or the disk is full.
    """
    source = Checkpoint(find(Path(checkpoint)), verify)
    if adapters.about(source) is not None:
        return adapters.export(source, out)
    planned = assemble.plan(source, dtype, max_shard_bytes)
    with building(Path(out)) as folder:
        assemble.write_rest(source, planned, folder, None if tokenizer is None else Path(tokenizer))
        work = Work(source, folder, assemble.lay_out(folder, planned), slabs.new_buffers(2))
        processes = min(processes, len(planned))
        filling = _forked(work, planned, processes) if processes > 1 else _threaded(work, planned)
        with closing(filling) as done:  # whoever still writes ends before the folder goes
            for size_bytes in done:
                progress(size_bytes)
    return Path(out)


def _threaded(work: Work, planned: Sequence[Planned]) -> Generator[int, None, None]:
    """One tensor is read while another is written."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield from pool.map(work.fill, planned)


def _forked(work: Work, planned: Sequence[Planned], processes: int) -> Generator[int, None, None]:
    """Tensors dealt out to processes, the largest first; sizes as they are done."""
    largest_first = sorted(planned, key=lambda one: -one.size_bytes)
    context = multiprocessing.get_context("fork")  # they share the manifest that was read
    try:
        with ProcessPoolExecutor(processes, context, _begin, (work,)) as pool:
            yield from pool.map(_fill, largest_first)
    except BrokenProcessPool:
        raise CheckpointError(
            f"a process that wrote {work.folder} was killed; is there memory for --processes "
            f"{processes}?"
        ) from None


_work: Work


def _begin(work: Work) -> None:
    global _work
    torch.set_num_threads(1)  # a fork has no use of its parent's threads
    for number in (signal.SIGINT, signal.SIGTERM):  # which reach a whole group: the parent acts
        signal.signal(number, signal.SIG_IGN)
    leave_with_parent()
    _work = work


def _fill(one: Planned) -> int:
    return _work.fill(one)


def size(text: str) -> int:
    """Bytes of ``5GB``, ``500MB`` or a plain number; ConfigError otherwise."""
    number, unit = text.strip().upper(), 1
    for suffix, factor in UNITS.items():
        if number.endswith(suffix):
            number, unit = number.removesuffix(suffix), factor
    number = number.strip()
    if not (number.isascii() and number.isdigit()) or int(number) < 1:
        raise ConfigError(f"--max-shard-size={text} is no size; write 5GB, 500MB or bytes")
    return int(number) * unit


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser("llamax consolidate", description=summary(__doc__))
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest)")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="default: that of the weights")
    parser.add_argument("--max-shard-size", default="5GB", help="bytes per file (default 5GB)")
    parser.add_argument("--tokenizer", help="tokenizer file or folder; default: the dataset's")
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not check what is read")
    args = parser.parse_args(argv)
    if args.processes < 1:
        raise ConfigError(f"--processes={args.processes} is below 1; use 1 or more")
    source = Checkpoint(find(Path(args.checkpoint)), verify=False)
    dtype = DTYPES[args.dtype] if args.dtype else None
    began = time.perf_counter()
    if adapters.about(source) is not None:
        out = consolidate(source.folder, args.out, verify=not args.no_verify)
        print(f"{out}: the adapters of step {source.step}, as PEFT loads them; see llamax merge")
        return 0
    total = sum(one.size_bytes for one in assemble.plan(source, dtype))
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="consolidate", disable=None, leave=False
    ) as bar:
        out = consolidate(
            source.folder,
            args.out,
            dtype,
            size(args.max_shard_size),
            args.tokenizer,
            not args.no_verify,
            bar.update,
            args.processes,
        )
    parameters = sum(math.prod(source.shape(name)) for name in source.names())
    print(
        f"{out}: {show_number(parameters)} parameters of step {source.step}, {show_bytes(total)}, "
        f"in {show_time(time.perf_counter() - began)}"
    )
    if (out / "tokenizer.model").is_file() and not (out / "tokenizer.json").is_file():
        print("its tokenizer.model has no exact tokenizer.json: in transformers ids may differ")
    elif not (out / "tokenizer.json").is_file():
        print("no tokenizer was found for it; --tokenizer adds one")
    return 0
