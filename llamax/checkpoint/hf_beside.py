"""A Hugging Face folder inside a checkpoint, written by all ranks in the background.

::

    all ranks   wait until the checkpoint is complete; write every n-th file of hub.part from it
    rank 0      waits for the others, adds configuration, index and tokenizer, renames it to hub

Every file has one writer, which works on any network file system.  Ranks wait for each other over
the file system, so that no collective runs beside those of training.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llamax.checkpoint import hf_writer, slabs
from llamax.checkpoint.atomic import (
    explain_write_errors,
    failure_note,
    failure_of,
    read_note,
    write_note,
)
from llamax.checkpoint.reader import Checkpoint
from llamax.config.step_folders import DONE
from llamax.runtime.errors import CheckpointError, LlamaxError
from llamax.runtime.files import (
    make_folder,
    new_file,
    same_file,
    sync_folder,
    sync_handle,
)

HUB, HUB_PART = "hub", "hub.part"
DONE_WAIT_S = 60.0  # from the rename of a checkpoint until other ranks see its ``done``


def write_hf_folder_beside(
    checkpoint: Path, saving: Path, rank: int, world_size: int, timeout_s: float
) -> None:
    """Write this rank's share of ``checkpoint``/hub after ``saving`` was renamed to ``checkpoint``.

    Returns without writing if no checkpoint appears.  Raises CheckpointError or NoRoom on a rank
    that cannot write its share and on rank 0, which waits ``timeout_s`` at most.
    """
    deadline, part = time.monotonic() + timeout_s, checkpoint / HUB_PART
    try:
        with explain_write_errors(part, 0):
            if not _until(lambda: not saving.exists(), deadline) or not _until(
                (checkpoint / DONE).exists, min(deadline, time.monotonic() + DONE_WAIT_S)
            ):
                return  # rank 0 reports why there is no checkpoint
            make_folder(part)
            source = Checkpoint(checkpoint)
            planned = _write_share(source, part, rank, world_size)
            write_note(part / _note(rank), "null")
            if rank == 0:
                _gather(part, world_size, deadline)
                hf_writer.write_metadata(source, planned, part)
                sync_folder(part)
                os.rename(part, checkpoint / HUB)
                sync_folder(checkpoint)
    except BaseException as error:
        _report(part, rank, error)
        raise


def _write_share(
    source: Checkpoint, part: Path, rank: int, world_size: int
) -> list[hf_writer.PlannedTensor]:
    """Write this rank's files, and sync them to disk; the tensors of all files."""
    planned = hf_writer.plan_files(source)
    total = sum(tensor.size_bytes for tensor in planned)
    planned = hf_writer.plan_files(source, None, min(hf_writer.FILE_BYTES, -(-total // world_size)))
    share = list(hf_writer.tensors_of_rank(planned, rank, world_size))
    offsets, buffers = hf_writer.allocate_files(part, share), slabs.new_buffers(1)
    for tensor in share:
        hf_writer.write_tensor(source, part, tensor, offsets[tensor.name], buffers)
    for file in {tensor.file for tensor in share}:
        with open(part / file, "rb", opener=same_file) as written:
            sync_handle(written.fileno(), Path(written.name))
    sync_folder(part)
    return planned


def _note(rank: int) -> str:
    """The name of the file in which a rank reports that it is done, or why it failed."""
    return f"rank-{rank:05d}.json"


def _report(part: Path, rank: int, error: BaseException) -> None:
    """Tell rank 0 why this rank failed; where no text can be written, by an empty file."""
    with suppress(OSError, LlamaxError):
        make_folder(part)
        try:
            write_note(part / _note(rank), failure_note(error))
        except (OSError, LlamaxError):
            open(part / _note(rank), "wb", opener=new_file).close()


def _gather(part: Path, world_size: int, deadline: float) -> None:
    """Wait for the notes of all ranks and remove them; raise the first error that one reports."""
    waiting = set(range(world_size))

    def all_done() -> bool:
        for rank in sorted(waiting):
            if not (part / _note(rank)).exists():
                continue
            note = read_note(path) if (path := part / _note(rank)).stat().st_size else {}
            if note is not None:
                raise failure_of(note, f"rank {rank} could not write {part}")
            waiting.remove(rank)
        return not waiting

    if not _until(all_done, deadline):
        missing = ", ".join(map(str, sorted(waiting)))
        raise CheckpointError(f"{part}: no files from rank {missing}")
    for rank in range(world_size):
        (part / _note(rank)).unlink()


def _until(condition: Callable[[], bool], deadline: float) -> bool:
    """Wait for a condition; False if it is not met before the deadline."""
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
