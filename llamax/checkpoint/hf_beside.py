"""A Hugging Face folder in every checkpoint, written by all ranks at once.

::

    all ranks   wait for the checkpoint to be complete; fill every n-th file of hub.part from it
    rank 0      waits for all, adds configuration, index and tokenizer -> rename to hub

A file has one writer, so that a network file system needs no promises beyond a rank's own; what is
read was written a moment ago.  Ranks meet over the file system: no collective runs beside training.
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
RENAMED_S = 60.0  # between a save's last name and its ``done``, and for both to be seen


def write_hf_folder_beside(
    checkpoint: Path, saving: Path, rank: int, world_size: int, timeout_s: float
) -> None:
    """Write this rank's share of ``checkpoint``/hub, once ``saving`` has become ``checkpoint``.

    Raises CheckpointError or NoRoom on a rank that cannot write its share, and on rank 0.
    """
    deadline = time.monotonic() + timeout_s
    if not _until(lambda: not saving.exists(), deadline) or not _until(
        (checkpoint / DONE).exists, min(deadline, time.monotonic() + RENAMED_S)
    ):
        return  # rank 0 says why there is no checkpoint
    part = checkpoint / HUB_PART
    part.mkdir(exist_ok=True)
    try:
        source = Checkpoint(checkpoint)
        planned = hf_writer.plan_files(source)
        total = sum(one.size_bytes for one in planned)
        planned = hf_writer.plan_files(
            source, None, min(hf_writer.FILE_BYTES, -(-total // world_size))
        )
        mine = list(hf_writer.share(planned, rank, world_size))
        offsets, buffers = hf_writer.allocate_files(part, mine), slabs.new_buffers(1)
        for one in mine:
            hf_writer.write_tensor(source, part, one, offsets[one.name], buffers)
        for file in {one.file for one in mine}:
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
    """Wait for the notes of all ranks, and remove them."""
    notes = [part / f"rank-{rank:05d}.json" for rank in range(world_size)]
    if not _until(lambda: all(note.exists() for note in notes), deadline):
        missing = [str(rank) for rank, note in enumerate(notes) if not note.exists()]
        raise CheckpointError(f"{part}: no files from rank {', '.join(missing)}")
    for rank, note in enumerate(notes):
        if failed := json.loads(note.read_text()):
            error = NoRoom if failed["no_room"] else CheckpointError
            raise error(f"rank {rank} could not write {part}: {failed['why']}")
        note.unlink()


def _until(true: Callable[[], bool], deadline: float) -> bool:
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
