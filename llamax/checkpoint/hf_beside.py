"""A Hugging Face folder inside a checkpoint, written by all ranks in the background.

::

    all ranks   wait until the checkpoint is complete; write every n-th file of hub.part from it
    rank 0      waits for the others, adds configuration, index and tokenizer, renames it to hub

Every file has one writer, which works on any network file system.  Ranks wait for each other over
the file system, so that no collective runs beside those of training.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from llamax.checkpoint import hf_writer, slabs
from llamax.checkpoint.atomic import write_note
from llamax.checkpoint.manifest import DONE
from llamax.checkpoint.reader import Checkpoint
from llamax.runtime.errors import CheckpointError, LlamaxError, NoRoom
from llamax.runtime.files import sync_folder

HUB, HUB_PART = "hub", "hub.part"
DONE_WAIT_S = 60.0  # from the rename of a checkpoint until other ranks see its ``done``


def write_hf_folder_beside(
    checkpoint: Path, saving: Path, rank: int, world_size: int, timeout_s: float
) -> None:
    """Write this rank's share of ``checkpoint``/hub after ``saving`` was renamed to ``checkpoint``.

    Returns without writing if no checkpoint appears.  Raises CheckpointError or NoRoom on a rank
    that cannot write its share and on rank 0, which waits ``timeout_s`` at most.
    """
    deadline = time.monotonic() + timeout_s
    if not _until(lambda: not saving.exists(), deadline) or not _until(
        (checkpoint / DONE).exists, min(deadline, time.monotonic() + DONE_WAIT_S)
    ):
        return  # rank 0 reports why there is no checkpoint
    part = checkpoint / HUB_PART
    part.mkdir(exist_ok=True)
    try:
        source = Checkpoint(checkpoint)
        planned = hf_writer.plan_files(source)
        total = sum(tensor.size_bytes for tensor in planned)
        planned = hf_writer.plan_files(
            source, None, min(hf_writer.FILE_BYTES, -(-total // world_size))
        )
        share = list(hf_writer.tensors_of_rank(planned, rank, world_size))
        offsets, buffers = hf_writer.allocate_files(part, share), slabs.new_buffers(1)
        for tensor in share:
            hf_writer.write_tensor(source, part, tensor, offsets[tensor.name], buffers)
        for file in {tensor.file for tensor in share}:
            fd = os.open(part / file, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        sync_folder(part)
        write_note(part / f"rank-{rank:05d}.json", "null")
        if rank == 0:
            _gather(part, world_size, deadline)
            hf_writer.write_metadata(source, planned, part)
            sync_folder(part)
            os.rename(part, checkpoint / HUB)
            sync_folder(checkpoint)
    except LlamaxError as error:
        note = {"why": str(error), "no_room": isinstance(error, NoRoom)}
        write_note(part / f"rank-{rank:05d}.json", json.dumps(note))
        raise


def _gather(part: Path, world_size: int, deadline: float) -> None:
    """Wait for the notes of all ranks and remove them; raise the error that one of them reports."""
    notes = [part / f"rank-{rank:05d}.json" for rank in range(world_size)]
    if not _until(lambda: all(note.exists() for note in notes), deadline):
        missing = [str(rank) for rank, note in enumerate(notes) if not note.exists()]
        raise CheckpointError(f"{part}: no files from rank {', '.join(missing)}")
    for rank, note in enumerate(notes):
        if failed := json.loads(note.read_text()):
            error = NoRoom if failed["no_room"] else CheckpointError
            raise error(f"rank {rank} could not write {part}: {failed['why']}")
        note.unlink()


def _until(condition: Callable[[], bool], deadline: float) -> bool:
    """Wait for a condition; False if it is not met before the deadline."""
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
