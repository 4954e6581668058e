"""The manifest of a checkpoint: which runs of which tensors lie in which file, with checksums.

::

    checkpoints/step-00000100/
        weights-tp00-dp00.safetensors     runs of weights, one file per rank
        optimizer-tp00-dp00.safetensors   runs of masters and moments, and the random state
                                          (of a pipeline weights-pp00-tp00-dp00, ...)
        config.toml                       the resolved configuration
        manifest.json                     what is where; sha256 and block checksums of every file
        done                              the sha256 of the manifest: written last, deleted first

A folder without ``done`` is not a checkpoint.  The manifest describes no mesh that a reader would
have to rebuild: for every tensor it lists the runs (see ``runs``) and the file that holds each.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llamax.checkpoint.atomic import write_durable
from llamax.checkpoint.checksums import CHECKSUM_DIGITS
from llamax.checkpoint.runs import Run, is_tiling
from llamax.checkpoint.safetensors_io import DTYPES, Progress, no_progress
from llamax.config.base_model import DONE as DONE
from llamax.config.base_model import MANIFEST as MANIFEST
from llamax.config.base_model import STEP_FOLDER as STEP_FOLDER
from llamax.config.constants import CONFIG_FILE
from llamax.parallel.mesh import ALONE, Seat
from llamax.runtime.errors import CheckpointError
from llamax.runtime.files import sha256
from llamax.runtime.versions import LLAMAX

FORMAT_VERSION = 2
CONFIG_TOML = CONFIG_FILE
RANK_FILE = re.compile(r"(weights|optimizer)-(pp\d{2,}-)?tp\d{2,}-dp\d{2,}\.safetensors")
SHA256 = re.compile(r"[0-9a-f]{64}")
CHECKSUMS = re.compile(rf"(?:[0-9a-f]{{{CHECKSUM_DIGITS}}})*")
RNG = "rng"  # the name of the random state inside an optimizer file


@dataclass(frozen=True)
class FileRecord:
    """The file of one rank as it was written; ``sums`` are its block checksums (``checksums``)."""

    name: str
    size_bytes: int
    sha256: str
    sums: str = ""


@dataclass(frozen=True)
class KindRecord:
    """One kind of a tensor (weight, master, exp_avg or exp_avg_sq): its dtype and its runs.

    A run is [file index, left, width, start, length].
    """

    dtype: str
    runs: list[tuple[int, int, int, int, int]]


@dataclass(frozen=True)
class TensorRecord:
    """A Hub tensor: the shape of the whole, and the kinds that were saved."""

    shape: tuple[int, ...]
    kinds: dict[str, KindRecord]


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint, as ``manifest.json`` holds them.

    ``model`` is the Hub's config.json, ``state`` the state of the training program, ``score`` the
    validation loss if one was computed at this step, ``config_sha256`` that of config.toml if there
    is one.
    """

    format: int
    step: int
    llamax: str
    torch: str
    mesh: dict[str, int]
    model: dict[str, Any]
    state: dict[str, Any]
    files: list[FileRecord]
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    score: float | None = None
    config_sha256: str = ""

    def problem(self) -> str:
        """The first inconsistency found, or an empty string."""
        if self.step < 0:
            return f"step {self.step} is below 0"
        for file in self.files:
            if not RANK_FILE.fullmatch(file.name):
                return f"{file.name!r:.80} is not the name of a checkpoint file"
            if not SHA256.fullmatch(file.sha256) or not CHECKSUMS.fullmatch(file.sums):
                return f"{file.name} has no valid checksums"
        if self.config_sha256 and not SHA256.fullmatch(self.config_sha256):
            return f"{CONFIG_TOML} has no valid checksum"
        usual = {kind for tensor in self.tensors.values() for kind in tensor.kinds} - {"master"}
        for name, tensor in self.tensors.items():
            if not name.isprintable():
                return f"{name!r:.80} is not the name of a tensor"
            if min(tensor.shape, default=1) < 1:
                return f"{name} has the impossible shape {list(tensor.shape)}"
            for kind, record in tensor.kinds.items():
                if record.dtype not in DTYPES:
                    return f"{name} ({kind}) has the unknown dtype {record.dtype}"
                if not all(0 <= run[0] < len(self.files) for run in record.runs):
                    return f"{name} ({kind}) refers to a file that is not listed"
                if not is_tiling(tensor.shape, [Run(*run[1:]) for run in record.runs]):
                    return (
                        f"the runs of {name} ({kind}) do not cover its shape "
                        f"{list(tensor.shape)} exactly once"
                    )
            if set(tensor.kinds) == {"weight"}:  # frozen
                continue
            if missing := {"weight", *usual} - set(tensor.kinds):
                return f"{name} has no {' and no '.join(sorted(missing))}"
        return ""


@dataclass(frozen=True)
class _Version:
    """The one field that manifests of every version have."""

    format: int


_SCHEMA, _VERSION = TypeAdapter(Manifest), TypeAdapter(_Version)


def step_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def rank_name(tp_rank: int, data_rank: int, stage: Seat = ALONE) -> str:
    """The name of one rank, with its stage where there are several."""
    within = f"tp{tp_rank:02d}-dp{data_rank:02d}"
    return f"pp{stage.rank:02d}-{within}" if stage.size > 1 else within


def file_name(role: str, tp_rank: int, data_rank: int, stage: Seat = ALONE) -> str:
    """The file name of one rank; ``role`` is weights or optimizer."""
    return f"{role}-{rank_name(tp_rank, data_rank, stage)}.safetensors"


def run_key(name: str, kind: str, run: Run) -> str:
    """The name of a run inside its file."""
    return f"{name}:{kind}@{run.start}"


def write_manifest(folder: Path, manifest: Manifest, config_text: str) -> None:
    """Write config.toml and manifest.json; ``write_done`` then makes the folder a checkpoint.

    Raises CheckpointError if the manifest is inconsistent, or the disk refuses it.
    """
    if problem := manifest.problem():
        raise CheckpointError(f"{folder} was not saved: {problem}")
    if config_text:
        write_durable(folder / CONFIG_TOML, config_text)
        manifest = replace(manifest, config_sha256=hashlib.sha256(config_text.encode()).hexdigest())
    write_durable(folder / MANIFEST, _SCHEMA.dump_json(manifest).decode())


def write_done(folder: Path) -> None:
    """Declare a checkpoint complete; nothing is written into its folder afterwards."""
    write_durable(
        folder / DONE, hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() + "\n"
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint, with every check that reads no tensor file.

    Raises CheckpointError if ``done`` is missing, the manifest was changed or is inconsistent, or a
    file is missing, lies outside the folder or has another size.
    """
    if not (folder / DONE).is_file():
        raise CheckpointError(f"{folder} has no file 'done': saving it never finished")
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        expected = (folder / DONE).read_text(errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    actual = hashlib.sha256(text).hexdigest()
    if actual != expected:
        raise CheckpointError(
            f"{path} changed after it was saved: its sha256 is {actual}, "
            f"the file 'done' says {expected[:64]!r}"
        )
    try:
        version = _VERSION.validate_json(text).format
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {version}, this llamax {LLAMAX} reads "
                f"{FORMAT_VERSION}; read it with the version of llamax that wrote it"
            )
        manifest = _SCHEMA.validate_json(text)
        problem = manifest.problem()
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{ascii('.'.join(map(str, first['loc'])))[1:-1]:.80}: {first['msg']}"
    if problem:
        raise CheckpointError(f"{path} is broken: {problem}")
    if STEP_FOLDER.fullmatch(folder.name) and step_of(folder) != manifest.step:
        raise CheckpointError(
            f"{folder} holds step {manifest.step}; rename it to {step_name(manifest.step)}"
        )
    if manifest.config_sha256:
        verify_files(folder, [FileRecord(CONFIG_TOML, 0, manifest.config_sha256)])
    for record in manifest.files:
        file = folder / record.name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.resolve().parent != folder.resolve():
            raise CheckpointError(f"{file} is a link out of its folder; put the file itself there")
        size = file.stat().st_size
        if size != record.size_bytes:
            raise CheckpointError(f"{file} has {size} bytes, {record.size_bytes} were saved")
    return manifest


def verify_files(
    folder: Path, records: Sequence[FileRecord], progress: Progress = no_progress
) -> None:
    """Hash whole files on two threads and compare with the manifest.

    Calls ``progress`` with the bytes of each file.  Raises CheckpointError that names the first
    file that differs.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        hashes = pool.map(lambda record: _hash(folder / record.name), records)
        try:
            for record, actual in zip(records, hashes, strict=True):
                if actual != record.sha256:
                    raise CheckpointError(
                        f"{folder / record.name} changed after it was saved: its sha256 is "
                        f"{actual}, the manifest says {record.sha256}"
                    )
                progress(record.size_bytes)
        finally:  # after a failure the remaining files are not hashed
            pool.shutdown(wait=False, cancel_futures=True)


def _hash(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
