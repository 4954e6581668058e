"""``llamax import FOLDER --from nxd|optimum|nemo|meta|auto --out DIR``: another trainer's
checkpoint becomes a Hugging Face folder, or one of ours.

::

    nxd, optimum, nemo, meta  ->  one Hub tensor at a time  ->  hub      weights
                                                            ->  llamax   weights, and the optimizer
                                                                         where it was kept

Numbers are copied bit by bit, in the dtype they have.  The pickles are read by ``pickles``, which
executes nothing, and only here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import llamax
from llamax.checkpoint import hf_folder
from llamax.checkpoint import manifest as files
from llamax.checkpoint.formats.base import Foreign
from llamax.checkpoint.formats.meta import FILE as META_FILE
from llamax.checkpoint.formats.meta import Meta
from llamax.checkpoint.formats.nemo import Nemo
from llamax.checkpoint.formats.nxd import Nxd
from llamax.checkpoint.formats.optimum import METADATA, SHARDS, Optimum
from llamax.checkpoint.hf_writer import write_json
from llamax.checkpoint.runs import whole
from llamax.checkpoint.safetensors_io import TAGS, Outgoing, Progress, building, silent, write
from llamax.runtime.errors import CheckpointError

FORMATS: dict[str, Callable[[Path, str, bool], Foreign]] = {
    "nxd": Nxd,
    "optimum": Optimum,
    "nemo": Nemo,
    "meta": Meta,
}


class Lazy:
    """One Hub tensor, joined when the writer asks for it."""

    def __init__(self, source: Foreign, name: str, kind: str) -> None:
        self.source, self.name, self.kind = source, name, kind

    def __iter__(self) -> Iterator[Tensor]:
        yield self.source.whole(self.name, self.kind)


def guess(folder: Path) -> str:
    """The format of a folder by the files in it; CheckpointError where none is known."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; check the path")
    shards = folder / SHARDS if (folder / SHARDS).is_dir() else folder
    if (shards / METADATA.format(0)).exists():
        return "optimum"
    if any(META_FILE.fullmatch(path.name) for path in folder.iterdir()):
        return "meta"
    if (folder / "model").is_dir() or any(folder.glob("*/model/dp_rank_*")):
        return "nxd"
    if (
        any(folder.glob("*mp_rank_*"))
        or any(folder.glob("tp_rank_*"))
        or any(folder.glob("*.ckpt"))
    ):
        return "nemo"
    raise CheckpointError(
        f"{folder} is no checkpoint of {', '.join(FORMATS)}; a Hugging Face folder needs no import"
    )


def open_folder(folder: Path, form: str, config: str, optimizer: bool = True) -> Foreign:
    """The model in a folder; ``form`` may be auto."""
    form = guess(folder) if form == "auto" else form
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; check the path")
    return FORMATS[form](folder, config, optimizer)


def outgoing(source: Foreign, name: str, kind: str, key: str, flat: bool = False) -> Outgoing:
    """A Hub tensor on its way into a file, under ``key``."""
    shape = source.shapes[name]
    shape = (math.prod(shape),) if flat else shape
    return Outgoing(key, source.dtype(name, kind), shape, Lazy(source, name, kind))


def size_bytes(source: Foreign, name: str, kind: str = "weight") -> int:
    return math.prod(source.shapes[name]) * source.dtype(name, kind).itemsize


def word(source: Foreign) -> str:
    """The dtype of the weights, as configurations spell it."""
    return str(source.dtype("model.embed_tokens.weight")).removeprefix("torch.")


def check_dtypes(source: Foreign) -> None:
    """Refuse what no file of ours holds, before anything is written."""
    for name in source.shapes:
        for kind in source.kinds:
            dtype = source.dtype(name, kind)
            if dtype not in TAGS or not dtype.is_floating_point:
                raise CheckpointError(
                    f"{source.folder}: {name} ({kind}) is {dtype}; llamax reads floating-point "
                    "weights"
                )


def to_hub(
    source: Foreign, out: Path, max_shard_bytes: int = 5 * 10**9, progress: Progress = silent
) -> None:
    """Write the weights as a Hugging Face folder."""
    check_dtypes(source)
    packed: list[list[str]] = [[]]
    room = max_shard_bytes
    for name in source.shapes:
        if packed[-1] and size_bytes(source, name) > room:
            packed.append([])
            room = max_shard_bytes
        packed[-1].append(name)
        room -= size_bytes(source, name)
    weight_map: dict[str, str] = {}
    with building(out) as part:
        for number, names in enumerate(packed, start=1):
            file = f"model-{number:05d}-of-{len(packed):05d}.safetensors"
            file = hf_folder.SINGLE if len(packed) == 1 else file
            tensors = [outgoing(source, name, "weight", name) for name in names]
            write(part / file, tensors, progress=progress)
            weight_map |= dict.fromkeys(names, file)
        if len(packed) > 1:
            total = sum(size_bytes(source, name) for name in source.shapes)
            sorted_map = dict(sorted(weight_map.items()))
            write_json(
                part / hf_folder.INDEX,
                {"metadata": {"total_size": total}, "weight_map": sorted_map},
            )
        write_json(part / hf_folder.CONFIG, source.model.to_hub(word(source)))
        for name in hf_folder.TOKENIZER_FILES:
            found = source.folder / name
            if found.is_file() and found.resolve().parent == source.folder.resolve():
                (part / name).write_bytes(found.read_bytes())


def to_llamax(source: Foreign, out: Path, consumed: int = 0, progress: Progress = silent) -> None:
    """Write weights and optimizer as a checkpoint of ours, at the step they are from.

    Training that resumes from it goes on after ``consumed`` sequences of its data.
    """
    check_dtypes(source)
    manifest = files.Manifest(
        format=files.FORMAT,
        step=source.step,
        llamax=llamax.__version__,
        torch=torch.__version__,
        mesh={"tensor": 1, "data": 1, "zero1": 0},
        model=source.model.to_hub(word(source)),
        state={"consumed_sequences": consumed},
        files=[],
    )
    with building(out) as part:
        for role in ("weights", "optimizer"):
            kinds = [kind for kind in source.kinds if (kind == "weight") == (role == "weights")]
            if not kinds:
                continue
            file, tensors = files.file_name(role, 0, 0), []
            for name, shape in source.shapes.items():
                run = whole(shape)
                kept = manifest.tensors.setdefault(name, files.Whole(shape, {})).kinds
                for kind in kinds:
                    tag = TAGS[source.dtype(name, kind)]
                    kept[kind] = files.Kept(tag, [(len(manifest.files), *run)])
                    key = files.key(name, kind, run)
                    tensors.append(outgoing(source, name, kind, key, flat=True))
            written = write(part / file, tensors, progress=progress)
            manifest.files.append(files.File(file, *written))
        files.commit(part, manifest, "")
        files.finish(part)
