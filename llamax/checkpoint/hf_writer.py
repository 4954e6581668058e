"""From a checkpoint's runs to the files of a Hugging Face folder, by as many hands as there are.

::

    plan     which tensors go into which file, and at which byte: known before anything is read
    fill     one tensor of one file, through a slab of 16 MiB, to its place      in any order
    rest     config.json, generation_config.json, the index, the tokenizer, which may be refused

``consolidate`` fills with processes; ``Saver`` lets every rank fill its share of files while
training goes on (``checkpoint.also_hf``).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from llamax.checkpoint import hf_folder, slabs
from llamax.checkpoint.atomic import explain_write_errors
from llamax.checkpoint.manifest import CONFIG_TOML
from llamax.checkpoint.safetensors_io import build_header, write_tensor_at
from llamax.checkpoint.source import Source
from llamax.config.load import load_config
from llamax.config.model import ModelConfig
from llamax.data.dataset import blend_words
from llamax.data.tokenizer.hf_export import export_tokenizer
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.runtime.errors import CheckpointError, ConfigError

FILE_BYTES = 5 * 10**9


class PlannedTensor(NamedTuple):
    """One tensor to write: what it is made of, and the file it goes into."""

    name: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_files(
    source: Source, dtype: torch.dtype | None = None, max_shard_bytes: int = FILE_BYTES
) -> list[PlannedTensor]:
    """The file of every tensor; a new file begins where ``max_shard_bytes`` would be exceeded.

    ``dtype`` defaults to that of the weights; float32 takes the masters where there are some.
    Raises CheckpointError for a checkpoint of adapters, which is no model by itself.
    """
    if "model.embed_tokens.weight" not in source.names():
        raise CheckpointError(
            f"{source.folder} holds adapters, not a whole model; join them to their base with "
            "llamax merge"
        )
    chosen, files = [], [0]
    for name in source.names():
        masters = dtype == torch.float32 and "master" in source.kinds(name)
        as_dtype = dtype or source.dtype(name)
        one = PlannedTensor(
            name, "master" if masters else "weight", as_dtype, source.shape(name), ""
        )
        if files[-1] and files[-1] + one.size_bytes > max_shard_bytes:
            files.append(0)
        files[-1] += one.size_bytes
        chosen.append((len(files), one))
    several = len(files) > 1
    return [
        one._replace(
            file=f"model-{n:05d}-of-{len(files):05d}.safetensors" if several else hf_folder.SINGLE
        )
        for n, one in chosen
    ]


def allocate_files(folder: Path, planned: Sequence[PlannedTensor]) -> dict[str, int]:
    """Make the files, headers written, all room in them still empty: name -> byte of its data."""
    offsets: dict[str, int] = {}
    for file in dict.fromkeys(one.file for one in planned):
        mine = [(one.name, one.dtype, one.shape) for one in planned if one.file == file]
        start, places, size_bytes = build_header(mine)
        with explain_write_errors(folder / file, size_bytes), open(folder / file, "wb") as out:
            out.write(start)
            out.truncate(size_bytes)
        offsets |= places
    return offsets


def write_tensor(
    source: Source, folder: Path, one: PlannedTensor, offset: int, buffers: slabs.Buffers
) -> int:
    """Write one tensor to its place in its file; how many bytes."""
    outgoing = slabs.stream_tensor(source, one.name, one.kind, one.dtype, buffers)
    write_tensor_at(folder / one.file, offset, outgoing.chunks, one.size_bytes)
    return one.size_bytes


def write_metadata(
    source: Source, planned: Sequence[PlannedTensor], folder: Path, tokenizer: Path | None = None
) -> None:
    """All of a Hugging Face folder but the weights."""
    model = ModelConfig.from_hub(source.model)
    write_json(
        folder / hf_folder.CONFIG, model.to_hub(str(planned[0].dtype).removeprefix("torch."))
    )
    special = {"bos_token_id": model.bos_token_id, "eos_token_id": model.eos_token_id}
    write_json(folder / hf_folder.GENERATION, {k: v for k, v in special.items() if v is not None})
    if planned[-1].file != hf_folder.SINGLE:
        weight_map = {one.name: one.file for one in sorted(planned)}
        total = sum(one.size_bytes for one in planned)
        write_json(
            folder / hf_folder.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    write_tokenizer(source, model, tokenizer, folder)


def share(planned: Sequence[PlannedTensor], rank: int, world_size: int) -> Iterator[PlannedTensor]:
    """The tensors of every ``world_size``-th file, from file ``rank`` on."""
    files = list(dict.fromkeys(one.file for one in planned))[rank::world_size]
    return (one for one in planned if one.file in files)


def write_tokenizer(source: Source, model: ModelConfig, given: Path | None, folder: Path) -> None:
    """Put the tokenizer beside the weights: the one given, or that of the dataset, if it is there.

    Raises CheckpointError where it is not the one the model was trained with.
    """
    path = given or dataset_of(source.folder)
    if path is None or not (given or path.is_dir()):
        return
    tokenizer, trained_with = load_tokenizer(path), source.state.get("tokenizer")
    if given is None and trained_with not in (None, tokenizer.fingerprint):
        raise CheckpointError(
            f"{path} holds another tokenizer (sha256 {tokenizer.fingerprint}) than the model was "
            f"trained with ({trained_with}); give that one with `tokenizer`"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{path} has {tokenizer.vocab_size} tokens, the model's vocabulary is "
            f"{model.vocab_size}; give the model's tokenizer with `tokenizer`"
        )
    if path.is_dir() and (path / "tokenizer_config.json").is_file():
        for name in hf_folder.TOKENIZER_FILES:
            if (path / name).is_file():
                shutil.copyfile(path / name, folder / name)
        return
    export_tokenizer(tokenizer, folder, model.max_position_embeddings)


def dataset_of(checkpoint: Path) -> Path | None:
    """The dataset folder that a checkpoint's configuration names; of a blend one that is here."""
    path = checkpoint / CONFIG_TOML
    if not path.is_file():
        return None
    try:
        named = load_config(str(path)).data.path
    except ConfigError:
        return None
    parts = [Path(word) for word in blend_words(named)[1::2] or [named]]
    return next((part for part in parts if part.is_dir()), parts[0])


def write_json(path: Path, value: dict[str, object]) -> None:
    """A JSON file as people like to read it."""
    text = json.dumps(value, indent=2) + "\n"
    with explain_write_errors(path, len(text)):
        path.write_text(text, encoding="utf-8")
