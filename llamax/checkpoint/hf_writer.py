"""Writing Hugging Face folders, with any number of processes or ranks at work on one folder.

::

    plan_files       the file of every tensor, known before anything is read
    allocate_files   files of their final size, with headers; the byte offset of every tensor
    write_tensor     one tensor to its offset, through a slab of 16 MiB; in any order
    write_metadata   config.json, generation_config.json, the index and the tokenizer

``consolidate`` writes tensors with processes; ``Saver`` lets every rank write its share of the
files while training continues (``checkpoint.also_hf``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llamax.checkpoint import slabs
from llamax.checkpoint.atomic import explain_write_errors
from llamax.checkpoint.hf_folder import HfFolder, write_json
from llamax.checkpoint.places import cut_from, dataset_of, find_folder
from llamax.checkpoint.plain_llama import check_plain
from llamax.checkpoint.prompt_record import prompt_of, write_prompt
from llamax.checkpoint.safetensors_io import build_header, write_tensor_at
from llamax.checkpoint.source import Source, dtype_name
from llamax.config.load import config_in
from llamax.config.model import ModelConfig
from llamax.data.tokenizer.hf_export import export_tokenizer
from llamax.data.tokenizer.hf_tokenizer import HuggingFace
from llamax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from llamax.runtime.errors import CheckpointError, HubError
from llamax.runtime.files import copy_file, new_file
from llamax.runtime.hub import local_folder
from llamax.runtime.hub_files import (
    CONFIG,
    CONFIG_JSON,
    GENERATION_CONFIG,
    INDEX_JSON,
    SINGLE_FILE,
    TOKENIZER_FILES,
)
from llamax.runtime.hub_name import hub_name
from llamax.runtime.logging import logger

FILE_BYTES = 5 * 10**9


class PlannedTensor(NamedTuple):
    """A tensor to write: the kind to read it from, its dtype and shape, and its file."""

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
    """The tensors in the order of their files; a file has at most ``max_shard_bytes``.

    A larger tensor has a file for itself.  ``dtype`` defaults to that of the weights; float32 takes
    the master weights where they exist.  Raises CheckpointError for a checkpoint of adapters, and
    for one with tensors that no Llama has.
    """
    if "model.embed_tokens.weight" not in source.names():
        raise CheckpointError(
            f"{source.folder} holds adapters, not a whole model; join them to their base with "
            "llamax merge"
        )
    check_plain(source, "a Hugging Face folder")
    planned = []
    for name in source.names():
        masters = dtype == torch.float32 and "master" in source.kinds(name)
        kind, as_dtype = "master" if masters else "weight", dtype or source.dtype(name)
        planned.append(PlannedTensor(name, kind, as_dtype, source.shape(name), ""))
    files = assign_files({tensor.name: tensor.size_bytes for tensor in planned}, max_shard_bytes)
    return [tensor._replace(file=files[tensor.name]) for tensor in planned]


def assign_files(sizes: Mapping[str, int], max_shard_bytes: int) -> dict[str, str]:
    """The file of each tensor, in the order of ``sizes`` (bytes by name); see ``plan_files``."""
    numbers, number, held = {}, 1, 0
    for name, size_bytes in sizes.items():
        if held and held + size_bytes > max_shard_bytes:
            number, held = number + 1, 0
        numbers[name], held = number, held + size_bytes
    if number == 1:
        return dict.fromkeys(numbers, SINGLE_FILE)
    return {name: f"model-{n:05d}-of-{number:05d}.safetensors" for name, n in numbers.items()}


def write_index(folder: Path, files: Mapping[str, str], size_bytes: int) -> None:
    """Write which tensor is in which file, of ``size_bytes`` in all; a single file needs none."""
    if SINGLE_FILE not in files.values():
        index = {"metadata": {"total_size": size_bytes}, "weight_map": dict(sorted(files.items()))}
        write_json(folder / INDEX_JSON, index)


def allocate_files(folder: Path, planned: Sequence[PlannedTensor]) -> dict[str, int]:
    """Create the files with headers and room for the tensors; the byte offset of each, by name."""
    offsets: dict[str, int] = {}
    for file in dict.fromkeys(tensor.file for tensor in planned):
        tensors = [
            (tensor.name, tensor.dtype, tensor.shape) for tensor in planned if tensor.file == file
        ]
        header, file_offsets, size_bytes = build_header(tensors)
        with (
            explain_write_errors(folder / file, size_bytes),
            open(folder / file, "wb", opener=new_file) as out,
        ):
            out.write(header)
            out.truncate(size_bytes)
        offsets |= file_offsets
    return offsets


def write_tensor(
    source: Source,
    folder: Path,
    tensor: PlannedTensor,
    offset: int,
    buffers: slabs.Buffers,
    check: bool = False,
) -> int:
    """Write one tensor to its offset in its file; return its size in bytes.

    ``check``: warn of numbers that are not finite.  Raises CheckpointError for a number beyond the
    largest of float16, which would become infinite.
    """
    stream = slabs.stream_tensor(source, tensor.name, tensor.kind, tensor.dtype, buffers)
    check |= tensor.dtype == torch.float16 != source.dtype(tensor.name, tensor.kind)
    chunks = check_finite(source, tensor, stream.chunks) if check else stream.chunks
    write_tensor_at(folder / tensor.file, offset, chunks, tensor.size_bytes)
    return tensor.size_bytes


def check_finite(
    source: Source, tensor: PlannedTensor, chunks: Iterable[Tensor]
) -> Iterator[Tensor]:
    """The chunks of a tensor, with a warning if it holds numbers that are not finite.

    Raises CheckpointError where only its type makes them infinite.
    """
    finite = True
    for chunk in chunks:
        if finite and not chunk.isfinite().all():
            finite = False
            if source.read(tensor.name, tensor.kind).isfinite().all():
                raise CheckpointError(
                    f"{source.folder}: {tensor.name} holds numbers beyond the largest of float16, "
                    "which would become infinite; use `dtype=bfloat16`"
                )
            logger.warning(
                "%s: %s holds numbers that are not finite, which are copied: its training diverged "
                "or the files are damaged; use an earlier checkpoint",
                source.folder,
                tensor.name,
            )
        yield chunk


def write_metadata(
    source: Source, planned: Sequence[PlannedTensor], folder: Path, tokenizer: Path | None = None
) -> None:
    """Write everything of a Hugging Face folder except the weights, and the prompt record.

    ``tokenizer``: a tokenizer file or folder; by default that of the dataset.  Raises
    CheckpointError if the tokenizer does not belong to the model.
    """
    model = ModelConfig.from_hub(source.model)
    if model.hidden_size % model.num_attention_heads:
        logger.warning(
            "transformers 5 loads no model whose num_attention_heads=%d does not divide "
            "hidden_size=%d, although its head_dim=%d is given; llamax does",
            model.num_attention_heads,
            model.hidden_size,
            model.head_dim,
        )
    write_json(folder / CONFIG_JSON, model.to_hub(dtype_name(planned[0].dtype)))
    write_json(folder / GENERATION_CONFIG, generation_config(source, model))
    files = {tensor.name: tensor.file for tensor in planned}
    write_index(folder, files, sum(tensor.size_bytes for tensor in planned))
    write_tokenizer(source, model, tokenizer, folder)
    write_prompt(source, folder)


def generation_config(source: Source, model: ModelConfig) -> dict[str, object]:
    """The content of generation_config.json: what the model's folder, or that of its base, says.

    A text ends with the tokens that the model or the folder names, and with those that end an
    answer of the dataset.
    """
    generation = dict(source.generation)
    if not generation and (base := _base_folder(source)):
        generation = dict(HfFolder(base).generation)
    ends = [*model.eos_token_ids, *_ids(generation.get("eos_token_id"))]
    prompt = prompt_of(source)
    ends = list(dict.fromkeys([*ends, *(prompt.turn_ends if prompt else ())]))
    special = {
        "bos_token_id": model.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
    }
    return generation | {key: value for key, value in special.items() if value is not None}


def _ids(value: object) -> list[int]:
    """The ids in a number, a list or nothing."""
    values = value if isinstance(value, list) else [value]
    return [number for number in values if type(number) is int]


def _base_folder(source: Source) -> Path | None:
    """The Hugging Face folder from which a checkpoint's run started, if it is present."""
    config = config_in(source.folder)
    if config is None or not config.checkpoint.init_from:
        return None
    named = config.checkpoint.init_from
    folder = find_folder(named, source.folder, source.state)
    if folder is None and hub_name(named) is not None:
        try:
            folder = local_folder(named, CONFIG)
        except HubError:  # as a folder that is not present
            return None
    return folder if folder and (folder / GENERATION_CONFIG).is_file() else None


def tensors_of_rank(
    planned: Sequence[PlannedTensor], rank: int, world_size: int
) -> Iterator[PlannedTensor]:
    """The tensors that a rank writes: those of every ``world_size``-th file, from ``rank`` on."""
    files = list(dict.fromkeys(tensor.file for tensor in planned))[rank::world_size]
    return (tensor for tensor in planned if tensor.file in files)


def check_tokenizer_fits(
    tokenizer: Tokenizer,
    name: Path | str,
    vocab_size: int,
    remedy: str,
) -> None:
    """Raise CheckpointError if a tokenizer has more tokens than the model's vocabulary."""
    if tokenizer.base_size > vocab_size:
        raise CheckpointError(
            f"{name} has {tokenizer.base_size} tokens, the model's vocabulary is "
            f"{vocab_size}; {remedy}"
        )


def write_tokenizer(source: Source, model: ModelConfig, given: Path | None, folder: Path) -> None:
    """Write the tokenizer ``given``, or else that of the dataset or of the folder it was cut from.

    Raises CheckpointError if it is not the one the model was trained with, or has more tokens than
    the model's vocabulary.
    """
    given = given or cut_from(source.folder, source.state)
    path = given or dataset_of(source.folder, source.state)
    if path is None or not (given or path.is_dir()):
        return
    tokenizer, trained_with = load_tokenizer(path), source.state.get("tokenizer")
    if given is None and trained_with not in (None, tokenizer.fingerprint):
        raise CheckpointError(
            f"{path} holds another tokenizer (sha256 {tokenizer.fingerprint}) than the model was "
            f"trained with ({trained_with}); give that one with `tokenizer`"
        )
    check_tokenizer_fits(tokenizer, path, model.vocab_size, "give the model's with `tokenizer`")
    copied = isinstance(tokenizer, HuggingFace) or (given and (path / "tokenizer.json").is_file())
    if copied and path.is_dir() and (path / "tokenizer_config.json").is_file():
        for name in TOKENIZER_FILES:
            if (path / name).is_file():
                with explain_write_errors(folder / name, (path / name).stat().st_size):
                    copy_file(path / name, folder / name)
        return
    with explain_write_errors(folder / "tokenizer.json", path.stat().st_size):
        export_tokenizer(tokenizer, folder, model.max_position_embeddings)
