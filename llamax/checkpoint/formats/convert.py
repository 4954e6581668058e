"""Another trainer's checkpoint, converted to a Hugging Face folder or to a llamax checkpoint.

::

    nxd, optimum, nemo, meta  ->  one Hub tensor at a time  ->  hub      weights
                                                            ->  llamax   weights, and the optimizer
                                                                         where it was kept

Numbers are copied bit by bit, in the dtype they have.  Pickles are read by ``torch_pickle``, which
executes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llamax.checkpoint import hf_writer
from llamax.checkpoint import manifest as files
from llamax.checkpoint.adapter_folders import ADAPTER_SHARDS, adapter_folder
from llamax.checkpoint.atomic import explain_write_errors, new_folder
from llamax.checkpoint.consolidate import size
from llamax.checkpoint.formats.base import ForeignCheckpoint
from llamax.checkpoint.formats.meta import RANK_FILE as META_FILE
from llamax.checkpoint.formats.meta import MetaCheckpoint
from llamax.checkpoint.formats.nemo import NemoCheckpoint
from llamax.checkpoint.formats.nxd import NxdCheckpoint
from llamax.checkpoint.formats.optimum import (
    METADATA,
    SHARDS,
    OptimumCheckpoint,
    checkpoints_in,
)
from llamax.checkpoint.hf_folder import EMBEDDING, check_floating, write_json
from llamax.checkpoint.peft import PeftFolder, write_joined
from llamax.checkpoint.runs import whole_run
from llamax.checkpoint.safetensors_io import (
    TAGS,
    Progress,
    TensorStream,
    no_progress,
    write_safetensors,
)
from llamax.checkpoint.source import dtype_name
from llamax.config.choices import FOREIGN_FORMATS
from llamax.runtime.errors import CheckpointError, ConfigError
from llamax.runtime.files import copy_file
from llamax.runtime.hub_files import CONFIG_JSON, TOKENIZER_FILES
from llamax.runtime.logging import logger
from llamax.runtime.versions import LLAMAX

FORMATS: dict[str, Callable[[Path, str, bool, int | None], ForeignCheckpoint]] = {
    "nxd": NxdCheckpoint,
    "optimum": OptimumCheckpoint,
    "nemo": NemoCheckpoint,
    "meta": MetaCheckpoint,
}


NEMO_PATTERNS = ("*mp_rank_*", "tp_rank_*", "*.ckpt", "iter_*", "latest_checkpoint*", "*.distcp")

assert tuple(FORMATS) == FOREIGN_FORMATS


@dataclass(frozen=True)
class Imported:
    """What ``import_checkpoint`` wrote.

    ``origin`` names the tag, step or file that was read; ``kinds`` are "weight" and the optimizer's
    states.
    """

    folder: Path
    step: int
    origin: str
    tensors: int
    kinds: tuple[str, ...]
    size_bytes: int


def import_checkpoint(
    folder: Path | str,
    out: Path | str,
    *,
    format: str = "auto",
    to: Literal["hub", "llamax"] = "hub",
    config: str = "",
    weights_only: bool = False,
    consumed_sequences: int = 0,
    step: int | None = None,
    max_shard_size: int | str = hf_writer.FILE_BYTES,
    started: Progress = no_progress,
    progress: Progress = no_progress,
) -> Imported:
    """Convert another trainer's checkpoint.

    Args:
        folder: The checkpoint's folder.
        out: Folder to make; of adapters in shards of optimum-neuron one that PEFT loads.
        format: "nxd", "optimum", "nemo" or "meta"; "auto" looks at the files.
        to: "hub" writes a Hugging Face folder of the weights, "llamax" a checkpoint that training
            resumes from, with the optimizer's state where there is one.
        config: config.json, TOML file or recipe of the model, where the checkpoint has none.
        weights_only: Leave out the optimizer's state.
        consumed_sequences: Samples that the training had seen; only for "llamax".
        step: The checkpoint to read in a folder of several; by default the newest.
        max_shard_size: Largest size of a weights file: bytes, or text such as "5GB"; only for
            "hub".
        started: Called once, with the bytes to write in all.
        progress: Called with the bytes written.

    Raises:
        ConfigError: For a parameter out of range.
        CheckpointError: If the checkpoint is damaged, is of no known format or does not match
            ``config``, ``out`` exists or the disk is full.
    """
    if consumed_sequences < 0:
        raise ConfigError(f"`consumed_sequences={consumed_sequences}` is below 0")
    if to not in ("hub", "llamax"):
        raise ConfigError(f"`to={to}` is not known; use hub or llamax")
    shard_bytes, out = size(max_shard_size), Path(out)
    chosen = Path(folder) / f"checkpoint-{step}"
    adapters = adapter_folder(chosen if chosen.is_dir() else Path(folder))
    if (adapters / ADAPTER_SHARDS).is_dir():
        if step is not None and adapters.parent.name != chosen.name:
            raise CheckpointError(f"{folder} has no adapters of {chosen.name}; leave `step` out")
        return _import_adapter(adapters, out, to, started, progress)
    source = open_folder(folder, format, config, not weights_only, step)
    kinds = tuple(source.kinds) if to == "llamax" else ("weight",)
    total = sum(size_bytes(source, name, kind) for name in source.shapes for kind in kinds)
    started(total)
    if to == "hub":
        to_hub(source, out, shard_bytes, progress)
    else:
        to_llamax(source, out, consumed_sequences, progress)
    return Imported(out, source.step, source.origin, len(source.shapes), kinds, total)


def _import_adapter(
    folder: Path, out: Path, to: str, started: Progress, progress: Progress
) -> Imported:
    """Write adapters in shards of optimum-neuron as a PEFT folder."""
    if to != "hub":
        raise ConfigError(f"`to={to}`: {folder} holds adapters, which become a PEFT folder: hub")
    source = PeftFolder(folder)
    total = sum(math.prod(source.shape(n)) * source.dtype(n).itemsize for n in source.names())
    started(total)
    write_joined(source, out)
    progress(total)
    origin = f"{folder.parent.name}/{folder.name}"
    return Imported(out, 0, origin, len(source.names()), ("weight",), total)


def guess(folder: Path) -> str:
    """The format of a folder, by the files in it; CheckpointError if it is none of them."""
    shards = folder / SHARDS if (folder / SHARDS).is_dir() else folder
    if (shards / METADATA.format(0)).exists() or checkpoints_in(folder):
        return "optimum"
    if any(META_FILE.fullmatch(path.name) for path in folder.iterdir()):
        return "meta"
    if (folder / "model").is_dir() or any(folder.glob("*/model/dp_rank_*")):
        return "nxd"
    if any(any(folder.glob(pattern)) for pattern in NEMO_PATTERNS):
        return "nemo"
    raise CheckpointError(
        f"{folder} is not a checkpoint of {', '.join(FORMATS)}; a Hugging Face folder needs no "
        "import"
    )


def open_folder(
    folder: Path | str,
    format: str = "auto",
    config: str = "",
    optimizer: bool = True,
    step: int | None = None,
) -> ForeignCheckpoint:
    """Another trainer's checkpoint, opened for reading; see ``import_checkpoint``.

    ``optimizer``: whether to read the optimizer's state too.  Raises CheckpointError if the folder
    is missing, damaged or of no known format, and ConfigError for an unknown ``format``.
    """
    folder = Path(folder)
    if format not in ("auto", *FORMATS):
        raise ConfigError(f"format={format} is not known; use auto, {', '.join(FORMATS)}")
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; check the path")
    format = guess(folder) if format == "auto" else format
    return FORMATS[format](folder, config, optimizer, step)


def outgoing(
    source: ForeignCheckpoint, name: str, kind: str, key: str, flat: bool = False
) -> TensorStream:
    """A tensor to write into a file, under ``key``; ``flat``: as one dimension."""
    shape = source.shapes[name]
    shape = (math.prod(shape),) if flat else shape
    return TensorStream(key, source.dtype(name, kind), shape, joined(source, name, kind))


def joined(source: ForeignCheckpoint, name: str, kind: str) -> Iterator[Tensor]:
    """One tensor, joined from its parts when the writer asks for it.

    Numbers that are not finite are copied as they are, with a warning.
    """
    tensor = source.read(name, kind)
    if not tensor.isfinite().all():
        logger.warning(
            "%s: %s (%s) holds numbers that are not finite: the training diverged or the files are "
            "damaged; use an earlier checkpoint",
            source.folder,
            name,
            kind,
        )
    yield tensor


def size_bytes(source: ForeignCheckpoint, name: str, kind: str = "weight") -> int:
    """The size of a tensor in bytes."""
    return math.prod(source.shapes[name]) * source.dtype(name, kind).itemsize


def check_dtypes(source: ForeignCheckpoint) -> None:
    """Refuse types that llamax does not write, before anything is written."""
    for name in source.shapes:
        dtypes = {f"{name} ({kind})": source.dtype(name, kind) for kind in source.kinds}
        check_floating(dtypes, source.folder)


def to_hub(
    source: ForeignCheckpoint,
    out: Path,
    max_shard_bytes: int = hf_writer.FILE_BYTES,
    progress: Progress = no_progress,
) -> None:
    """Write the weights as a Hugging Face folder, in files of at most ``max_shard_bytes``."""
    check_dtypes(source)
    sizes = {name: size_bytes(source, name) for name in source.shapes}
    placed = hf_writer.assign_files(sizes, max_shard_bytes)
    with new_folder(out) as part:
        for file in dict.fromkeys(placed.values()):
            tensors = [outgoing(source, n, "weight", n) for n in placed if placed[n] == file]
            write_safetensors(part / file, tensors, progress=progress)
        hf_writer.write_index(part, placed, sum(sizes.values()))
        write_json(part / CONFIG_JSON, source.model.to_hub(dtype_name(source.dtype(EMBEDDING))))
        for name in TOKENIZER_FILES:
            found = source.folder / name
            if found.is_file() and found.resolve().parent == source.folder.resolve():
                with explain_write_errors(part / name, found.stat().st_size):
                    copy_file(found, part / name)


def to_llamax(
    source: ForeignCheckpoint, out: Path, consumed: int = 0, progress: Progress = no_progress
) -> None:
    """Write weights and optimizer state as a llamax checkpoint of the source's step.

    Training that resumes from it skips the first ``consumed`` sequences of its data.
    """
    check_dtypes(source)
    manifest = files.Manifest(
        format=files.FORMAT_VERSION,
        step=source.step,
        llamax=LLAMAX,
        torch=torch.__version__,
        mesh={"tensor": 1, "data": 1, "zero": 0},
        model=source.model.to_hub(dtype_name(source.dtype(EMBEDDING))),
        state={"consumed_sequences": consumed},
        files=[],
    )
    with new_folder(out) as part:
        for role in ("weights", "optimizer"):
            kinds = [kind for kind in source.kinds if (kind == "weight") == (role == "weights")]
            if not kinds:
                continue
            file, tensors = files.file_name(role, 0, 0), []
            for name, shape in source.shapes.items():
                run = whole_run(shape)
                for kind in kinds:
                    tag = TAGS[source.dtype(name, kind)]
                    manifest.kind(name, kind, shape, tag).add(len(manifest.files), run)
                    key = files.run_key(name, kind, run)
                    tensors.append(outgoing(source, name, kind, key, flat=True))
            written = write_safetensors(part / file, tensors, progress=progress)
            manifest.files.append(files.FileRecord(file, *written))
        files.write_manifest(part, manifest, "")
        files.write_done(part)
