"""A checkpoint of any mesh, joined to a Hugging Face folder.

What goes where is planned first; then processes stream tensors from the ranks' files to their
places in ``model.safetensors`` (or numbered files and an index), each through one buffer of 16 MiB,
so memory does not grow with the model.  What is read is checked against its hashes; the folder
gets its name when all is written.
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
from llamax.checkpoint.atomic import new_folder
from llamax.checkpoint.hf_writer import PlannedTensor
from llamax.checkpoint.listing import find_checkpoint
from llamax.checkpoint.peft import adapter_info, export_adapter
from llamax.checkpoint.reader import Checkpoint
from llamax.checkpoint.safetensors_io import (
    Progress,
    no_progress,
)
from llamax.checkpoint.source import dtype_name
from llamax.config.choices import WEIGHT_DTYPES
from llamax.runtime.errors import CheckpointError, ConfigError
from llamax.runtime.process import defer_signals, leave_with_parent

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class Work(NamedTuple):
    """What every worker needs: the source, the folder to fill, and buffers."""

    source: Checkpoint
    folder: Path
    offsets: dict[str, int]
    buffers: slabs.Buffers

    def fill(self, planned: PlannedTensor) -> int:
        """Write one tensor; its size in bytes."""
        offset = self.offsets[planned.name]
        return hf_writer.write_tensor(self.source, self.folder, planned, offset, self.buffers)


def consolidate(
    checkpoint: Path | str,
    out: Path | str,
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = hf_writer.FILE_BYTES,
    tokenizer: Path | str | None = None,
    verify: bool = True,
    processes: int = 1,
    progress: Progress = no_progress,
) -> Path:
    """Write a checkpoint as the Hugging Face folder ``out``; return that folder.

    A checkpoint of adapters becomes a folder that PEFT loads.

    Args:
        checkpoint: A step's folder, or a run's folder: its newest checkpoint.
        out: Folder to make.
        dtype: Type of the written weights, "float32", "bfloat16" or "float16"; by default that of
            the saved weights.  float32 takes the optimizer's master weights where they are saved.
        max_shard_size: Largest size of a weights file: bytes, or text such as "5GB" or "500MB".
        tokenizer: Tokenizer file or folder; by default that of the dataset the run trained on.
        verify: Whether to check what is read against the checkpoint's hashes.
        processes: Number of processes that write; more than 1 are forks of this one.
        progress: Called with the bytes written, tensor by tensor.

    Raises:
        ConfigError: For a parameter out of range.
        CheckpointError: If the checkpoint is damaged, a weight is too large for ``dtype``, ``out``
            exists or the disk is full.
    """
    if processes < 1:
        raise ConfigError(f"`processes={processes}` is below 1; use 1 or more")
    weight_dtype, file_bytes = dtype_of(dtype), size(max_shard_size)
    source = Checkpoint(find_checkpoint(Path(checkpoint)), verify)
    if adapter_info(source) is not None:
        return export_adapter(source, out)
    planned = hf_writer.plan_files(source, weight_dtype, file_bytes)
    with new_folder(Path(out)) as folder:
        hf_writer.write_metadata(
            source, planned, folder, None if tokenizer is None else Path(tokenizer)
        )
        work = Work(source, folder, hf_writer.allocate_files(folder, planned), slabs.new_buffers(2))
        processes = min(processes, len(planned))
        filling = _forked(work, planned, processes) if processes > 1 else _threaded(work, planned)
        with closing(filling) as sizes:  # workers end before an unfinished folder is removed
            for size_bytes in sizes:
                progress(size_bytes)
    return Path(out)


def _threaded(work: Work, planned: Sequence[PlannedTensor]) -> Generator[int, None, None]:
    """Read one tensor while another is written."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield from pool.map(work.fill, planned)


def _forked(
    work: Work, planned: Sequence[PlannedTensor], processes: int
) -> Generator[int, None, None]:
    """Distribute tensors over processes, the largest first; yield their sizes when written."""
    largest_first = sorted(planned, key=lambda tensor: -tensor.size_bytes)
    context = multiprocessing.get_context("fork")  # forks share the manifest that was read
    try:
        with ProcessPoolExecutor(processes, context, _begin, (work,)) as pool:
            with defer_signals():
                sizes = pool.map(_fill, largest_first)
            yield from sizes
    except BrokenProcessPool:
        raise CheckpointError(
            f"a process that wrote {work.folder} was killed; is there memory for "
            f"`processes={processes}`?"
        ) from None


_work: Work


def _begin(work: Work) -> None:
    global _work
    torch.set_num_threads(1)  # a fork cannot use its parent's threads
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the parent acts
        signal.signal(number, signal.SIG_IGN)
    leave_with_parent()
    _work = work


def _fill(planned: PlannedTensor) -> int:
    return _work.fill(planned)


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The type that a name stands for; ConfigError for a type in which no folder is written."""
    name = dtype if isinstance(dtype, str | None) else dtype_name(dtype)
    if not name:
        return None
    if name not in WEIGHT_DTYPES:
        raise ConfigError(f"`dtype={name}` is not known; use {', '.join(WEIGHT_DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def size(text: int | str) -> int:
    """Bytes of ``5GB``, ``500MB`` or a plain number; ConfigError for anything else."""
    number, unit = str(text).strip().upper(), 1
    for suffix, factor in UNITS.items():
        if number.endswith(suffix):
            number, unit = number.removesuffix(suffix), factor
    number = number.strip()
    if not (number.isascii() and number.isdigit()) or int(number) < 1:
        raise ConfigError(f"`max_shard_size={text}` is not a size; write 5GB, 500MB or bytes")
    return int(number) * unit
