"""A base model and its LoRA adapters, merged into a Hugging Face folder.

``Merged`` is a source with the weights W + s B A, in the dtype of the base: whatever reads a model
from files can read it.  ``merge`` reads it into new files, a slab of rows at a time.  The sum is
taken in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamax.checkpoint import hf_folder, hf_writer, slabs
from llamax.checkpoint.atomic import new_folder
from llamax.checkpoint.build_model import finetune_info
from llamax.checkpoint.consolidate import dtype_of, size
from llamax.checkpoint.peft import (
    AdapterInfo,
    find_base_folder,
    open_adapter,
)
from llamax.checkpoint.runs import Run
from llamax.checkpoint.safetensors_io import (
    Progress,
    no_progress,
)
from llamax.checkpoint.source import Piece, Source
from llamax.config.model import ModelConfig
from llamax.config.schema import FinetuneConfig
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.model import lora
from llamax.runtime.errors import CheckpointError


class Merged(Source):
    """A base plus its adapters; ``info`` describes the adapters.

    Raises CheckpointError if they do not belong together.
    """

    def __init__(self, base: Source, adapter: Source, info: AdapterInfo) -> None:
        info.check_base(adapter.folder, base)
        ModelConfig.from_hub(base.model)  # refuses models that llamax cannot compute
        self.base, self.adapter, self.scale = base, adapter, lora.scale(info.finetune)
        self.folder, self.model = base.folder, base.model
        self._factors: tuple[str, Tensor, Tensor] | None = None
        for name in adapter.names():
            target, shape = name.split(".lora_")[0] + ".weight", adapter.shape(name)
            whole = base.shape(target) if target in base.names() else None
            r = info.finetune.r
            if whole and shape == ((r, whole[1]) if ".lora_A." in name else (whole[0], r)):
                continue
            raise CheckpointError(
                f"{adapter.folder}: {name} is {list(shape)}, but {target} of {base.folder} is "
                f"{list(whole) if whole else 'missing'}; use the base it was trained on"
            )

    @property
    def state(self) -> dict[str, Any]:
        return self.base.state

    @property
    def trained_in(self) -> Path:
        return self.adapter.folder

    @property
    def generation(self) -> dict[str, Any]:
        found = dict(self.base.generation)
        if has_tokenizer(self.adapter.folder):
            end = load_tokenizer(self.adapter.folder).eos_id
            ends = found.get("eos_token_id", self.model.get("eos_token_id", 2))
            ends = ends if isinstance(ends, list) else [ends]
            found["eos_token_id"] = [i for i in dict.fromkeys([*ends, end]) if i is not None]
        return found

    def names(self) -> list[str]:
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def kinds(self, name: str) -> tuple[str, ...]:
        return ("weight",)

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        return self.base.dtype(name, kind)

    def pieces(self, name: str, kind: str) -> Sequence[Piece]:
        return self.base.pieces(name, kind)

    def fill(self, name: str, kind: str, run: Run, into: Tensor, convert: bool = False) -> None:
        """Write whole rows of a merged weight, or any run of other weights; see ``Source.fill``."""
        stem = name.removesuffix("weight")
        if f"{stem}lora_A.weight" not in self.adapter.names():
            self.base.fill(name, kind, run, into, convert)
            return
        first, count = run.start // run.width, run.length // run.width
        assert run.width == self.shape(name)[1], "rows are merged whole"
        assert (first * run.width, count * run.width) == (run.start, run.length)
        if self._factors is None or self._factors[0] != name:
            a, b = (self.adapter.read(f"{stem}lora_{factor}.weight") for factor in "AB")
            self._factors = name, a.float(), b.float() * self.scale
        _, a, b = self._factors
        rows = torch.empty(run.length)
        self.base.fill(name, kind, run, rows)
        rows.view(count, -1).addmm_(b[first : first + count], a)
        into.copy_(rows)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in hf_folder.TOKENIZER_FILES[:2])


def merge(
    adapter: Path | str,
    out: Path | str,
    *,
    base: Path | str | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = hf_writer.FILE_BYTES,
    progress: Progress = no_progress,
) -> Path:
    """Write a base model with its adapters merged as the folder ``out``; return that folder.

    Args:
        adapter: PEFT folder, or a run or checkpoint of adapters.
        out: Hugging Face folder to make.
        base: Hugging Face folder, run or checkpoint; by default the one that the adapter names.
        dtype: Type of the written weights, "float32", "bfloat16" or "float16"; by default that of
            the base.
        max_shard_size: Largest size of a weights file: bytes, or text such as "5GB" or "500MB".
        progress: Called with the bytes written, tensor by tensor.

    Raises:
        ConfigError: For a parameter out of range.
        CheckpointError: If base and adapter do not belong together, ``out`` exists or the disk is
            full.
    """
    weight_dtype, file_bytes = dtype_of(dtype), size(max_shard_size)
    adapters, info = open_adapter(adapter)
    base_model = hf_folder.open_source(base or find_base_folder(adapters.folder, info))
    finetune_info(FinetuneConfig(), base_model)
    merged = Merged(base_model, adapters, info)
    planned, buffers = hf_writer.plan_files(merged, weight_dtype, file_bytes), slabs.new_buffers()
    places = (folder for folder in (adapters.folder, merged.folder) if has_tokenizer(folder))
    tokenizer = next(places, hf_writer.dataset_of(adapters.folder))
    if tokenizer is not None and not tokenizer.is_dir():
        tokenizer = None
    with new_folder(Path(out)) as folder:
        hf_writer.write_metadata(merged, planned, folder, tokenizer)
        offsets = hf_writer.allocate_files(folder, planned)
        for tensor in planned:
            progress(hf_writer.write_tensor(merged, folder, tensor, offsets[tensor.name], buffers))
    return Path(out)
