"""``llamax consolidate CHECKPOINT --out DIR``: a checkpoint becomes a Hugging Face folder.

What goes where is planned first; then processes stream tensors from the ranks' files to their
places in ``model.safetensors`` (or numbered files and an index), each through one slab of 16 MiB,
so memory does not grow with the model.  What is read is checked; the folder gets its name when all
is written.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch

from llamax.checkpoint import hf_writer, slabs
from llamax.checkpoint.hf_writer import Planned
from llamax.checkpoint.manifest import find
from llamax.checkpoint.peft import adapter_info, export_adapter
from llamax.checkpoint.reader import Checkpoint
from llamax.checkpoint.safetensors_io import Progress, building, silent
from llamax.runtime.errors import CheckpointError, ConfigError
from llamax.runtime.process import leave_with_parent

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
        return hf_writer.fill(self.source, self.folder, one, offset, self.buffers)


def consolidate(
    checkpoint: Path | str,
    out: Path | str,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = hf_writer.FILE_BYTES,
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
    if adapter_info(source) is not None:
        return export_adapter(source, out)
    planned = hf_writer.plan(source, dtype, max_shard_bytes)
    with building(Path(out)) as folder:
        hf_writer.write_rest(
            source, planned, folder, None if tokenizer is None else Path(tokenizer)
        )
        work = Work(source, folder, hf_writer.lay_out(folder, planned), slabs.new_buffers(2))
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
