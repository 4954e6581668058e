"""What a checkpoint folder says of itself, and the names of everything in it.

::

    checkpoints/step-00000100/
        weights-tp00-dp00.safetensors     runs of weights, one file per rank
        optimizer-tp00-dp00.safetensors   runs of masters and moments, and the random state
        config.toml                       the resolved configuration
        manifest.json                     what is where; sha256 and checksums of every file
        done                              the sha256 of the manifest: written last, deleted first

A folder without ``done`` is no checkpoint.  The manifest names no topology that a reader would have
to share: it lists, per tensor, the runs (see ``layout``) and the files they lie in.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import llamax
from llamax.checkpoint.checksums import DIGITS
from llamax.checkpoint.runs import Run, tiled
from llamax.checkpoint.safetensors_io import DTYPES, Progress, silent, write_text
from llamax.runtime.errors import CheckpointError
from llamax.runtime.files import sha256, sync_folder
from llamax.runtime.logging import logger

FORMAT = 2
MANIFEST, DONE, CONFIG = "manifest.json", "done", "config.toml"
STEP = re.compile(r"step-(\d{8}|[1-9]\d{8,})", re.ASCII)
FILE = re.compile(r"(weights|optimizer)-tp\d{2,}-dp\d{2,}\.safetensors")
SHA256, SUMS = re.compile(r"[0-9a-f]{64}"), re.compile(rf"(?:[0-9a-f]{{{DIGITS}}})*")
RNG = "rng"


@dataclass(frozen=True)
class File:
    """One rank's file, as it was when it was written; ``sums``: see ``blocks``."""

    name: str
    size_bytes: int
    sha256: str
    sums: str = ""


@dataclass(frozen=True)
class Kept:
    """One kind of a tensor (weight, master, exp_avg, exp_avg_sq): its runs as
    [file index, left, width, start, length]."""

    dtype: str
    runs: list[tuple[int, int, int, int, int]]


@dataclass(frozen=True)
class Whole:
    """A Hub tensor, and what is kept of it."""

    shape: tuple[int, ...]
    kinds: dict[str, Kept]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds; ``model`` is the Hub's config.json, ``state`` the program's.

    ``score``: the validation loss, where it was taken at this step.  ``config_sha256``: of
    config.toml, where there is one.
    """

    format: int
    step: int
    llamax: str
    torch: str
    mesh: dict[str, int]
    model: dict[str, Any]
    state: dict[str, Any]
    files: list[File]
    tensors: dict[str, Whole] = field(default_factory=dict)
    score: float | None = None
    config_sha256: str = ""

    def problem(self) -> str:
        """What does not hold together, or nothing."""
        if self.step < 0:
            return f"step {self.step} is below 0"
        for file in self.files:
            if not FILE.fullmatch(file.name):
                return f"{file.name!r:.80} is no name of a checkpoint's file"
            if not SHA256.fullmatch(file.sha256) or not SUMS.fullmatch(file.sums):
                return f"{file.name} has no checksums"
        if self.config_sha256 and not SHA256.fullmatch(self.config_sha256):
            return f"{CONFIG} has no checksum"
        usual = {kind for tensor in self.tensors.values() for kind in tensor.kinds} - {"master"}
        for name, tensor in self.tensors.items():
            if not name.isprintable():
                return f"{name!r:.80} is no name of a tensor"
            if not tensor.shape or min(tensor.shape) < 1:
                return f"{name} has shape {list(tensor.shape)}"
            for kind, kept in tensor.kinds.items():
                if kept.dtype not in DTYPES:
                    return f"{name} ({kind}) has dtype {kept.dtype}"
                if not all(0 <= run[0] < len(self.files) for run in kept.runs):
                    return f"{name} ({kind}) lies in a file that is not listed"
                if not tiled(tensor.shape, [Run(*run[1:]) for run in kept.runs]):
                    return f"the pieces of {name} ({kind}) do not make {list(tensor.shape)}"
            if set(tensor.kinds) == {"weight"}:  # frozen
                continue
            if missing := {"weight", *usual} - set(tensor.kinds):
                return f"{name} has no {' and no '.join(sorted(missing))}"
        return ""


@dataclass(frozen=True)
class _Format:
    """What the manifests of all formats have."""

    format: int


_SCHEMA, _FORMAT = TypeAdapter(Manifest), TypeAdapter(_Format)


def step_name(step: int) -> str:
    """The folder of a step."""
    return f"step-{step:08d}"


def file_name(role: str, tp_rank: int, data_rank: int) -> str:
    """The file of one rank; ``role`` is weights or optimizer."""
    return f"{role}-tp{tp_rank:02d}-dp{data_rank:02d}.safetensors"


def key(name: str, kind: str, run: Run) -> str:
    """What a run is called inside its file."""
    return f"{name}:{kind}@{run.start}"


def commit(folder: Path, manifest: Manifest, config_text: str) -> None:
    """Write what names the files of a folder; it becomes a checkpoint with ``finish``."""
    if problem := manifest.problem():
        raise CheckpointError(f"{folder} was not saved: {problem}")
    if config_text:
        write_text(folder / CONFIG, config_text)
        manifest = replace(manifest, config_sha256=hashlib.sha256(config_text.encode()).hexdigest())
    write_text(folder / MANIFEST, _SCHEMA.dump_json(manifest).decode())


def finish(folder: Path) -> None:
    """Declare a folder complete: its last act."""
    write_text(folder / DONE, hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint, every claim checked that costs no reading of files.

    Raises CheckpointError without ``done``, where the manifest was changed or does not hold
    together, and where a file is missing, lies elsewhere or has another size.
    """
    if not (folder / DONE).is_file():
        raise CheckpointError(f"{folder} has no file 'done': saving it never finished")
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        expected = (folder / DONE).read_text(errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    found = hashlib.sha256(text).hexdigest()
    if found != expected:
        raise CheckpointError(
            f"{path} changed after it was saved: its sha256 is {found}, "
            f"the file 'done' says {expected[:64]!r}"
        )
    try:
        form = _FORMAT.validate_json(text).format
        if form != FORMAT:
            raise CheckpointError(
                f"{path} has format {form}, this llamax {llamax.__version__} reads {FORMAT}; "
                "read it with the llamax that wrote it"
            )
        manifest = _SCHEMA.validate_json(text)
        problem = manifest.problem()
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{ascii('.'.join(map(str, first['loc'])))[1:-1]:.80}: {first['msg']}"
    if problem:
        raise CheckpointError(f"{path} is broken: {problem}")
    if STEP.fullmatch(folder.name) and step_of(folder) != manifest.step:
        raise CheckpointError(
            f"{folder} holds step {manifest.step}; rename it to {step_name(manifest.step)}"
        )
    if manifest.config_sha256:
        verify(folder, [File(CONFIG, 0, manifest.config_sha256)])
    for listed in manifest.files:
        file = folder / listed.name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.resolve().parent != folder.resolve():
            raise CheckpointError(f"{file} is a link out of its folder; put the file itself there")
        size = file.stat().st_size
        if size != listed.size_bytes:
            raise CheckpointError(f"{file} has {size} bytes, {listed.size_bytes} were saved")
    return manifest


def verify(folder: Path, files: Sequence[File], progress: Progress = silent) -> None:
    """Hash files and compare with the manifest, on two threads; ``progress`` takes bytes.

    Raises CheckpointError that names the first file whose bytes are not those saved.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        hashes = pool.map(lambda file: _hash(folder / file.name), files)
        try:
            for file, found in zip(files, hashes, strict=True):
                if found != file.sha256:
                    raise CheckpointError(
                        f"{folder / file.name} changed after it was saved: its sha256 is {found}, "
                        f"the manifest says {file.sha256}"
                    )
                progress(file.size_bytes)
        finally:  # the rest need not be looked at
            pool.shutdown(wait=False, cancel_futures=True)


def _hash(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


@contextmanager
def advice(folder: Path) -> Iterator[None]:
    """End a complaint about a checkpoint with the newest other one of its run that is intact."""
    try:
        yield
    except CheckpointError as error:
        for other in reversed(steps(folder.parent)):
            if other.resolve() != folder.resolve() and intact(other):
                raise CheckpointError(f"{error}; the newest intact checkpoint is {other}") from None
        raise CheckpointError(f"{error}; {folder.parent} holds no other that is intact") from None


def intact(folder: Path) -> bool:
    """Whether every file of a checkpoint is what was saved."""
    try:
        verify(folder, read_manifest(folder).files)
    except CheckpointError:
        return False
    return True


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; a run folder or its ``checkpoints``."""
    inner = folder / "checkpoints"
    folder = inner if inner.is_dir() else folder
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if STEP.fullmatch(path.name)]
    return sorted((path for path in found if (path / DONE).is_file()), key=step_of)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def scores(folder: Path) -> dict[int, float]:
    """The validation losses of a run's checkpoints that have one, by step."""
    found = {}
    for path in steps(folder):
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue  # resuming from it will say what is wrong
        if manifest.score is not None:
            found[manifest.step] = manifest.score
    return found


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint of a run that is what was saved; those passed over are told of.

    None where there are none; CheckpointError where all are damaged.
    """
    found = steps(folder)
    for path in reversed(found):
        try:
            verify(path, read_manifest(path).files)
        except CheckpointError as error:
            logger.warning("passing over %s: %s", path.name, error)
        else:
            return path
    if found:
        raise CheckpointError(
            f"no checkpoint in {folder} is intact; put one back from a copy, or start from nothing "
            "with --checkpoint.resume=never"
        )
    return None


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = steps(Path(folder))
    return found[-1] if found else None


def find(path: Path) -> Path:
    """The checkpoint that a user means: a step's folder, or the newest of a run's."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {path}; check the path")
    if (path / MANIFEST).exists() or STEP.match(path.name):
        return path
    found = newest(path)
    if found is None:
        hub = " (a Hugging Face folder)" if (path / "config.json").is_file() else ""
        raise CheckpointError(
            f"no complete checkpoint in {path}{hub}; give a step folder or a run's"
        )
    return found


def delete(folder: Path) -> None:
    """Remove a checkpoint: ``done`` goes first, so that no half of it is ever taken for one.

    Of one that lies elsewhere the link alone goes.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    (folder / DONE).unlink(missing_ok=True)
    sync_folder(folder)
    shutil.rmtree(folder)
