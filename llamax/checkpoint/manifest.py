"""The manifest of a checkpoint: which runs of which tensors lie in which file, with checksums.

::

    checkpoints/step-00000100/
        weights-tp00-dp00.safetensors     runs of weights, one file per rank
        optimizer-tp00-dp00.safetensors   runs of masters and moments, and the random state
                                          (of a pipeline weights-pp00-tp00-dp00, ...)
        config.toml                       the resolved configuration
        manifest.json                     what is where; sha256 of config.toml and index.bin
        index.bin                         every run and every block checksum (``manifest_index``)
        done                              the sha256 of the manifest: written last, deleted first

A folder without ``done`` is not a checkpoint.  The manifest describes no mesh that a reader would
have to rebuild: for every tensor the index lists the runs (see ``runs``) and the file that holds
each.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llamax.checkpoint.atomic import write_durable
from llamax.checkpoint.checksums import CHECKSUM_BYTES
from llamax.checkpoint.manifest_index import INDEX as INDEX
from llamax.checkpoint.manifest_index import Index, KindRecord, changed, pack, tiles
from llamax.checkpoint.runs import Run
from llamax.checkpoint.safetensors_header import DTYPE_NAMES, MAX_HEADER_BYTES
from llamax.config.constants import CONFIG_FILE
from llamax.config.step_folders import DONE, MANIFEST, STEP_FOLDER, step_name, step_of
from llamax.parallel.mesh import ALONE, Seat
from llamax.runtime.errors import CheckpointError
from llamax.runtime.files import SHA256, plain_file, sha256
from llamax.runtime.versions import LLAMAX

FORMAT_VERSION = 4
CONFIG_TOML = CONFIG_FILE
RANK_FILE = re.compile(r"(weights|optimizer)-(pp\d{2,}-)?tp\d{2,}-dp\d{2,}\.safetensors")
RNG = "rng"  # the name of the random state inside an optimizer file


@dataclass(frozen=True)
class FileRecord:
    """The file of one rank as it was written; ``sums`` are its block checksums (``checksums``)."""

    name: str
    size_bytes: int
    header_bytes: int
    sums: bytes | memoryview


@dataclass(frozen=True)
class TensorRecord:
    """A Hub tensor: the shape of the whole, and the kinds that were saved."""

    shape: tuple[int, ...]
    kinds: dict[str, KindRecord]


@dataclass(frozen=True, kw_only=True)
class _Head:
    """What a manifest says apart from its files and tensors.

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
    score: float | None = None
    config_sha256: str = ""


@dataclass(frozen=True)
class _StoredFile:
    """A ``FileRecord`` in manifest.json, with the number of its blocks in the index."""

    name: str
    size_bytes: int
    header_bytes: int
    blocks: int


@dataclass(frozen=True)
class _StoredKind:
    """A ``KindRecord`` in manifest.json, with the number of its runs in the index."""

    dtype: str
    runs: int


@dataclass(frozen=True)
class _StoredTensor:
    """A ``TensorRecord`` in manifest.json."""

    shape: tuple[int, ...]
    kinds: dict[str, _StoredKind]


@dataclass(frozen=True, kw_only=True)
class _Stored(_Head):
    """The content of manifest.json."""

    files: list[_StoredFile]
    tensors: dict[str, _StoredTensor]
    index_sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest(_Head):
    """The contents of a checkpoint, as ``manifest.json`` and ``index.bin`` hold them."""

    files: list[FileRecord] = field(default_factory=list)
    tensors: dict[str, TensorRecord] = field(default_factory=dict)

    def kind(self, name: str, kind: str, shape: tuple[int, ...], dtype: str) -> KindRecord:
        """The record of a kind of a tensor, new where there is none yet."""
        kinds = self.tensors.setdefault(name, TensorRecord(shape, {})).kinds
        return kinds.setdefault(kind, KindRecord(dtype))

    def problem(self) -> str:
        """The first inconsistency found, or an empty string."""
        if self.step < 0:
            return f"step {self.step} is below 0"
        for file in self.files:
            if not RANK_FILE.fullmatch(file.name):
                return f"{file.name!r:.80} is not the name of a checkpoint file"
            if not 8 <= file.header_bytes <= min(file.size_bytes, 8 + MAX_HEADER_BYTES):
                return f"{file.name} has an impossible header of {file.header_bytes} bytes"
        if self.config_sha256 and not SHA256.fullmatch(self.config_sha256):
            return f"{CONFIG_TOML} has no valid checksum"
        usual = {kind for tensor in self.tensors.values() for kind in tensor.kinds} - {"master"}
        for name, tensor in self.tensors.items():
            if not name.isprintable():
                return f"{name!r:.80} is not the name of a tensor"
            if min(tensor.shape, default=1) < 1:
                return f"{name} has the impossible shape {list(tensor.shape)}"
            for kind, record in tensor.kinds.items():
                if record.dtype not in DTYPE_NAMES:
                    return f"{name} ({kind}) has the unknown dtype {record.dtype}"
                numbers = record.runs[:, 0]
                if not ((numbers >= 0) & (numbers < len(self.files))).all():
                    return f"{name} ({kind}) refers to a file that is not listed"
                if not tiles(tensor.shape, record.runs):
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


_SCHEMA, _VERSION = TypeAdapter(_Stored), TypeAdapter(_Version)


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
    """Write config.toml, index and manifest; ``write_done`` then makes the folder a checkpoint.

    Raises CheckpointError if the manifest is inconsistent, or the disk refuses it.
    """
    if problem := manifest.problem():
        raise CheckpointError(f"{folder} was not saved: {problem}")
    if config_text:
        write_durable(folder / CONFIG_TOML, config_text.encode())
        manifest = replace(manifest, config_sha256=hashlib.sha256(config_text.encode()).hexdigest())
    stored, index = _split(manifest)
    write_durable(folder / INDEX, index)
    write_durable(folder / MANIFEST, _SCHEMA.dump_json(stored))


def write_done(folder: Path) -> None:
    """Declare a checkpoint complete; nothing is written into its folder afterwards."""
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    write_durable(folder / DONE, f"{digest}\n".encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint, with every check that reads no tensor file.

    Raises CheckpointError if ``done`` is missing, the manifest was changed or is inconsistent, or a
    file is missing, lies outside the folder or has another size.
    """
    if not (folder / DONE).is_file():
        raise CheckpointError(f"{folder} has no file 'done': saving it never finished")
    path = folder / MANIFEST
    try:
        with open(path, "rb", opener=plain_file) as file:
            text = file.read()
        with open(folder / DONE, "rb", opener=plain_file) as file:
            expected = file.read(100).decode(errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    actual = hashlib.sha256(text).hexdigest()
    if actual != expected:
        raise changed(path, actual, f"the file 'done' says {expected[:64]!r}")
    try:
        version = _VERSION.validate_json(text).format
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format {version}, this llamax {LLAMAX} reads "
                f"{FORMAT_VERSION}; read it with the version of llamax that wrote it"
            )
        manifest = _join(folder, _SCHEMA.validate_json(text))
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
        _check_config(folder / CONFIG_TOML, manifest.config_sha256)
    _check_sizes(folder, manifest.files)
    return manifest


def _split(manifest: Manifest) -> tuple[_Stored, bytes]:
    """A manifest as manifest.json and index.bin hold it."""
    kinds = [kind for tensor in manifest.tensors.values() for kind in tensor.kinds.values()]
    index = pack([kind.runs for kind in kinds], [bytes(file.sums) for file in manifest.files])
    return _Stored(
        **{name: getattr(manifest, name) for name in _Head.__dataclass_fields__},
        files=[
            _StoredFile(f.name, f.size_bytes, f.header_bytes, len(f.sums) // CHECKSUM_BYTES)
            for f in manifest.files
        ],
        tensors={
            name: _StoredTensor(
                tensor.shape,
                {k: _StoredKind(one.dtype, len(one.runs)) for k, one in tensor.kinds.items()},
            )
            for name, tensor in manifest.tensors.items()
        },
        index_sha256=hashlib.sha256(index).hexdigest(),
    ), index


def _join(folder: Path, stored: _Stored) -> Manifest:
    """The manifest in manifest.json and index.bin; CheckpointError if they do not fit together."""
    counts = [kind.runs for tensor in stored.tensors.values() for kind in tensor.kinds.values()]
    blocks = [file.blocks for file in stored.files]
    if min([*counts, *blocks], default=0) < 0:
        raise CheckpointError(
            f"{folder / MANIFEST} is broken: it counts fewer than 0 runs or blocks"
        )
    index = Index(folder / INDEX, stored.index_sha256, sum(counts), sum(blocks))
    starts = iter(accumulate(counts, initial=0))
    return Manifest(
        **{name: getattr(stored, name) for name in _Head.__dataclass_fields__},
        files=[
            FileRecord(
                file.name, file.size_bytes, file.header_bytes, index.sums(start, file.blocks)
            )
            for file, start in zip(stored.files, accumulate(blocks, initial=0), strict=False)
        ],
        tensors={
            name: TensorRecord(
                tensor.shape,
                {
                    kind: KindRecord(one.dtype, index.runs(next(starts), one.runs))
                    for kind, one in tensor.kinds.items()
                },
            )
            for name, tensor in stored.tensors.items()
        },
    )


def _check_sizes(folder: Path, records: Sequence[FileRecord]) -> None:
    """Raise CheckpointError for the first file that is missing, a link or of another size."""
    try:
        with os.scandir(folder) as entries:
            present = {entry.name: entry for entry in entries}
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}") from None
    for record in records:
        file, entry = folder / record.name, present.get(record.name)
        if entry is None or not entry.is_file():
            raise CheckpointError(f"{file} is missing")
        if entry.is_symlink() and file.resolve().parent != folder.resolve():
            raise CheckpointError(f"{file} is a link out of its folder; put the file itself there")
        size = entry.stat().st_size
        if size != record.size_bytes:
            raise CheckpointError(f"{file} has {size} bytes, {record.size_bytes} were saved")


def _check_config(path: Path, expected_sha256: str) -> None:
    """Raise CheckpointError if config.toml is missing or has changed."""
    try:
        actual = sha256(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if actual != expected_sha256:
        raise changed(path, actual, f"the manifest says {expected_sha256}")
