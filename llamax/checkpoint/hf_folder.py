"""Hugging Face folders as a source of tensors: ``config.json`` and one or more safetensors files.

``hf_files`` lists the files and finds the tensors in them; weights in bitsandbytes' 4 bits are made
dense when they are read (``hf_quantized``).

Nothing outside the folder is opened and nothing in it is executed: the index may name only plain
files, links must stay in the folder (or point into ``blobs`` of the Hub's cache), and pickled
weights are refused.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamax.checkpoint.adapter_folders import (
    ADAPTER_SHARDS,
    adapter_folder,
    holds_adapters,
)
from llamax.checkpoint.atomic import explain_write_errors
from llamax.checkpoint.hf_files import StoredWeight, names_without_index, read_weights
from llamax.checkpoint.hf_quantized import check_quantization
from llamax.checkpoint.listing import find_checkpoint, newest_checkpoint
from llamax.checkpoint.reader import Checkpoint
from llamax.checkpoint.runs import Run, boxes, row_width
from llamax.checkpoint.safetensors_io import SLAB_BYTES
from llamax.checkpoint.source import FileSource, Piece, Source
from llamax.config.model import MAX_LAYERS
from llamax.config.step_folders import MANIFEST, is_checkpoint
from llamax.runtime import json_reader
from llamax.runtime.errors import CheckpointError
from llamax.runtime.files import is_file_name, new_file
from llamax.runtime.hub import local_folder
from llamax.runtime.hub_files import (
    ADAPTER_WEIGHTS,
    CONFIG_JSON,
    GENERATION_CONFIG,
    INDEX_JSON,
    MODEL,
    SINGLE_FILE,
    TOKENIZER_FILES,
)
from llamax.runtime.json_reader import JsonError
from llamax.runtime.logging import logger

PICKLED_WEIGHTS = "adapter_model.bin"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
MAX_JSON_BYTES = 64 << 20
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
OWN_HEAD = (
    "%s ties lm_head to the embedding, but the files hold an lm_head with other values: it is "
    "kept, and the model is not tied; set tie_word_embeddings to false there"
)


class HfFolder(FileSource):
    """A LlamaForCausalLM in the form in which transformers saves it.

    Raises CheckpointError if files are missing, link out of the folder, or hold another model.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"there is no folder {self.folder}; check the path")
        _check_no_adapters(self.folder)
        for name in (CONFIG_JSON, GENERATION_CONFIG, INDEX_JSON, *TOKENIZER_FILES):
            if os.path.lexists(self.folder / name):
                self._inside(self.folder / name)
        if not (self.folder / CONFIG_JSON).exists():
            remedy = (
                "it is a checkpoint of llamax: convert it with llamax consolidate"
                if is_checkpoint(self.folder) or newest_checkpoint(self.folder)
                else "give a folder that save_pretrained or llamax consolidate wrote"
            )
            raise CheckpointError(
                f"{self.folder} has no {CONFIG_JSON}: it is not a Hugging Face folder; {remedy}"
            )
        self.model = read_json(self.folder / CONFIG_JSON)
        if self.model.get("model_type") != "llama":
            raise CheckpointError(
                f"{self.folder} holds a {self.model.get('model_type')!r} model, not a Llama; "
                "llamax reads model_type 'llama'"
            )
        check_quantization(self.folder, self.model)
        self._entries: dict[str, StoredWeight] = read_weights(self._paths())
        quantised = self.model.pop("quantization_config", None)  # reading makes weights dense
        if quantised and not any(entry.packed for entry in self._entries.values()):
            raise CheckpointError(
                f"{self.folder / CONFIG_JSON} states weights in 4 bits, but the files hold none; "
                "remove quantization_config if they are whole"
            )
        self._generation: dict[str, Any] = {}
        if (self.folder / GENERATION_CONFIG).exists():
            found = read_json(self.folder / GENERATION_CONFIG)
            dropped = ("transformers_version", "_from_model_config")
            self._generation = {k: v for k, v in found.items() if k not in dropped}
        if (ends := self._generation.get("eos_token_id")) is not None:
            self.model["eos_token_id"] = ends  # transformers stops at these, not at config.json's
        for name in [*self._entries]:
            if name.endswith(".rotary_emb.inv_freq"):  # computed
                del self._entries[name]
        check_floating({name: entry.dtype for name, entry in self._entries.items()}, self.folder)
        if self.model.get("tie_word_embeddings") is True and HEAD in self._entries:
            self._tie()
        if EMBEDDING not in self._entries:
            raise CheckpointError(
                f"{self.folder} has no model.embed_tokens.weight: it is not a LlamaForCausalLM"
            )
        if HEAD not in self._entries and not self.model.get("tie_word_embeddings"):
            raise CheckpointError(
                f"{self.folder} has no lm_head.weight, and its {CONFIG_JSON} does not tie it to "
                "the embedding; download it again, or set tie_word_embeddings to true if it is tied"
            )
        self._check_layers()

    @property
    def generation(self) -> dict[str, Any]:
        return self._generation

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        return self._entries[name].dtype

    def pieces(self, name: str, kind: str, run: Run) -> list[Piece]:
        return self._entries[name].pieces

    def _fetch(self, name: str, kind: str, run: Run, into: Tensor) -> None:
        packed = self._entries[name].packed
        if packed is None:
            super()._fetch(name, kind, run, into)
            return
        columns = row_width(packed.shape)
        for box in boxes(run):
            rows, width = box.bottom - box.top, box.right - box.left
            dense = packed.dense(box.top * columns, box.bottom * columns).view(rows, columns)
            part = into[box.offset : box.offset + rows * width].view(rows, width)
            part.copy_(dense[:, box.left : box.right])

    def total_bytes(self) -> int:
        """The size of all weights in bytes."""
        return sum(math.prod(e.shape) * e.dtype.itemsize for e in self._entries.values())

    def _tie(self) -> None:
        """Make the head and the embedding one tensor, unless their values differ.

        As transformers 5: a head with other values is kept, whatever config.json says, and a head
        alone is the embedding too.
        """
        if EMBEDDING not in self._entries:
            self._entries[EMBEDDING] = self._entries.pop(HEAD)
        elif self._equal(HEAD, EMBEDDING):
            del self._entries[HEAD]
        else:
            self.model["tie_word_embeddings"] = False
            _warn_of_own_head(self.folder / CONFIG_JSON)

    def _equal(self, name: str, other: str) -> bool:
        """Whether two tensors have the same shape, dtype and values."""
        first, second = self._entries[name], self._entries[other]
        if first.shape != second.shape or first.dtype != second.dtype:
            return False
        size = math.prod(first.shape)
        step = SLAB_BYTES // first.dtype.itemsize
        slabs = [torch.empty(min(step, size), dtype=first.dtype) for _ in range(2)]
        for start in range(0, size, step):
            run = Run(0, row_width(first.shape), start, min(step, size - start))
            parts = [slab[: run.length] for slab in slabs]
            self.fill(name, "weight", run, parts[0])
            self.fill(other, "weight", run, parts[1])
            if not torch.equal(*parts):
                return False
        return True

    def _check_layers(self) -> None:
        """Raise CheckpointError for more layers than there are, before a model of them is made."""
        stated = self.model.get("num_hidden_layers")
        held = max((int(m[1]) for m in map(_LAYER.match, self._entries) if m), default=-1) + 1
        if isinstance(stated, int) and held < stated <= MAX_LAYERS:
            raise CheckpointError(
                f"{self.folder / CONFIG_JSON} states num_hidden_layers={stated}, but the files "
                f"hold tensors of {held}; download the folder again"
            )

    def _paths(self) -> list[Path]:
        if (self.folder / SINGLE_FILE).exists():
            names = {SINGLE_FILE}
        elif (self.folder / INDEX_JSON).exists():
            index = self.folder / INDEX_JSON
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} has no weight_map; download it again")
            names = set()
            for file in weight_map.values():
                if not is_file_name(file):
                    raise CheckpointError(
                        f"{index} names {file!r:.80}, which is not a file beside it"
                    )
                names.add(file)
        elif not (names := set(names_without_index(self.folder))):
            pickled = (*self.folder.glob("*.bin"), *self.folder.glob("*.pth"))
            found = f"only {pickled[0].name}, a pickle" if pickled else "no weights"
            raise CheckpointError(
                f"{self.folder} has {found}; {SINGLE_FILE} or {INDEX_JSON} is needed: save it with "
                "save_pretrained(safe_serialization=True)"
            )
        return [self._inside(self.folder / name) for name in sorted(names)]

    def _inside(self, path: Path) -> Path:
        home, real = self.folder.resolve(), path.resolve()
        if real.parent not in (home, home.parent.parent / "blobs"):
            raise CheckpointError(f"{path} is a link out of its folder; put the file itself there")
        if not real.is_file():
            raise CheckpointError(f"{path} is missing or not a plain file; download it again")
        return path


def check_floating(dtypes: Mapping[str, torch.dtype], folder: Path) -> None:
    """Raise CheckpointError for a tensor of integers, such as a quantised one without its scale."""
    for name, dtype in dtypes.items():
        if not dtype.is_floating_point:
            raise CheckpointError(
                f"{folder}: {name[:80]} is {dtype}; llamax reads floating-point weights"
            )


def _check_no_adapters(folder: Path) -> None:
    """Raise CheckpointError for a folder of PEFT, which has adapters and no weights of a model."""
    names = (ADAPTER_WEIGHTS, PICKLED_WEIGHTS, ADAPTER_SHARDS)
    place = adapter_folder(folder)
    adapters = any((place / name).exists() for name in names)
    model = any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_JSON))
    if holds_adapters(place) and adapters and not model:
        raise CheckpointError(
            f"{folder} holds adapters, not a model; merge them with llamax merge first"
        )


@cache
def _warn_of_own_head(path: Path) -> None:
    """Warn of a head with other values, once for each folder."""
    logger.warning(OWN_HEAD, path)


def open_source(path: Path | str) -> Source:
    """Open a model to read: a Hugging Face folder or name, a checkpoint, or the newest of a run.

    Raises CheckpointError if ``path`` is none of these, HubError if it cannot be downloaded.
    """
    path = local_folder(path, MODEL)
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}; give a folder with a model in it")
    _check_no_adapters(path)
    if (path / CONFIG_JSON).is_file():
        return HfFolder(path)
    if not (path / MANIFEST).exists() and newest_checkpoint(path) is None:
        raise CheckpointError(
            f"{path} holds no model: give a Hugging Face folder (with {CONFIG_JSON}), the folder "
            "of a checkpoint, or a run's folder with a complete checkpoint"
        )
    return Checkpoint(find_checkpoint(path))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; CheckpointError if the file holds anything else."""
    try:
        return json_reader.read_object(path, MAX_JSON_BYTES, strict=False)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except JsonError as error:
        raise CheckpointError(f"{path} {error}; download it again") from None


def write_json(path: Path, value: dict[str, object]) -> None:
    """Write an indented JSON file; CheckpointError or NoRoom if the disk refuses."""
    text = json.dumps(value, indent=2) + "\n"
    with (
        explain_write_errors(path, len(text)),
        open(path, "w", encoding="utf-8", opener=new_file) as file,
    ):
        file.write(text)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES[:2])
