"""The checkpoints of a run: the newest, the newest intact, a given one, and their losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamax.checkpoint.manifest import read_manifest
from llamax.config.step_folders import is_checkpoint, list_checkpoints
from llamax.runtime.errors import CheckpointError
from llamax.runtime.logging import logger

SEARCH_BYTES = 2**29  # hashed at most in search of an intact checkpoint before an error is shown


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = list_checkpoints(Path(folder))
    return found[-1] if found else None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``: the folder of a step, or the newest one of a run's folder.

    Raises CheckpointError if there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {path}; check the path")
    if is_checkpoint(path):
        return path
    found = newest_checkpoint(path)
    if found is None:
        hub = " (a Hugging Face folder)" if (path / "config.json").is_file() else ""
        raise CheckpointError(
            f"no complete checkpoint in {path}{hub}; give the folder of a step or of a run"
        )
    return found


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint of a run with unchanged files, or None if the run has no checkpoint.

    Logs a warning for every damaged checkpoint it skips.  Raises CheckpointError if all are
    damaged.
    """
    from llamax.checkpoint.verify import verify_files  # it needs torch, and a list does not

    found = list_checkpoints(folder)
    for path in reversed(found):
        try:
            verify_files(path, read_manifest(path).files)
        except CheckpointError as error:
            logger.warning("skipping %s: %s", path.name, error)
        else:
            return path
    if found:
        raise CheckpointError(
            f"no checkpoint in {folder} is intact; restore one from a copy, or start from the "
            "beginning with --checkpoint.resume=never"
        )
    return None


def validation_losses(folder: Path) -> dict[int, float]:
    """The validation losses of a run's checkpoints, by step; only of those that have one."""
    losses = {}
    for path in list_checkpoints(folder):
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue  # resuming from it will report the damage
        if manifest.score is not None:
            losses[manifest.step] = manifest.score
    return losses


@contextmanager
def suggest_intact(folder: Path) -> Iterator[None]:
    """Complete the message of a CheckpointError with the newest other intact checkpoint of the run.

    ``folder`` is the checkpoint in question.
    """
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_alternative(folder)}") from None


def _alternative(folder: Path) -> str:
    """Where the run of a damaged checkpoint has another one, in words.

    An error must not wait for terabytes: once ``SEARCH_BYTES`` are hashed, the manifest, the names
    and the sizes of the files count, and the words say so.
    """
    from llamax.checkpoint.verify import verify_files

    left_bytes = SEARCH_BYTES
    for other in reversed(list_checkpoints(folder.parent)):
        if other.resolve() == folder.resolve():
            continue
        try:
            records = read_manifest(other).files
            left_bytes -= sum(record.size_bytes for record in records)
            if left_bytes < 0:
                return (
                    f"the newest other checkpoint with all its files is {other}; check their "
                    "content with llamax inspect --verify"
                )
            verify_files(other, records)
        except CheckpointError:
            continue
        return f"the newest intact checkpoint is {other}"
    return f"{folder.parent} holds no other intact checkpoint"
