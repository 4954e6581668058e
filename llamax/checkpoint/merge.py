"""``llamax merge [BASE] ADAPTER --out DIR``: a base and its adapters become a Hugging Face folder.

A merge is a source whose weights are W + s B A, in the dtype of the base: whatever reads a model
from files can read it, and here it is read into new files a slab of rows at a time.  The sum is
taken in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamax.checkpoint import hf_folder, hf_writer, slabs
from llamax.checkpoint.build_model import finetune_info
from llamax.checkpoint.peft import AdapterInfo, base_of, open_adapter
from llamax.checkpoint.runs import Run
from llamax.checkpoint.safetensors_io import Progress, building, silent
from llamax.checkpoint.source import Piece, Source
from llamax.config.model import ModelConfig
from llamax.config.schema import FinetuneConfig
from llamax.model import lora
from llamax.runtime.errors import CheckpointError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Merged(Source):
    """A base plus its adapters.

    Raises CheckpointError where they do not belong together.
    """

    def __init__(self, base: Source, adapter: Source, found: AdapterInfo) -> None:
        found.check(adapter.folder, base)
        ModelConfig.from_hub(
            base.model
        )  # refuses what llamax does not compute, quantised bases too
        self.base, self.adapter, self.scale = base, adapter, lora.scale(found.finetune)
        self.folder, self.model = base.folder, base.model
        self._factors: tuple[str, Tensor, Tensor] | None = None
        for name in adapter.names():
            into, own = name.split(".lora_")[0] + ".weight", adapter.shape(name)
            there = base.shape(into) if into in base.names() else None
            r = found.finetune.r
            if there and own == ((r, there[1]) if ".lora_A." in name else (there[0], r)):
                continue
            raise CheckpointError(
                f"{adapter.folder}: {name} is {list(own)}, but {into} of {base.folder} is "
                f"{list(there) if there else 'missing'}; use the base it was trained on"
            )

    @property
    def state(self) -> dict[str, Any]:
        return self.base.state

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
        """Write whole rows of a merged weight, or any run of another; see ``Source.fill``."""
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


def merge(
    base: Path | str | None,
    adapter: Path | str,
    out: Path | str,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = hf_writer.FILE_BYTES,
    progress: Progress = silent,
) -> Path:
    """Write a base with its adapters as a Hugging Face folder, in the base's dtype unless given.

    Without ``base`` it is the one that the adapter names.
    Raises CheckpointError where they do not belong together, ``out`` is in use or the disk is full.
    """
    source, found = open_adapter(adapter)
    first = hf_folder.open_source(base or base_of(source.folder, found))
    finetune_info(FinetuneConfig(), first)
    merged = Merged(first, source, found)
    planned, buffers = hf_writer.plan(merged, dtype, max_shard_bytes), slabs.new_buffers()
    own = any((merged.folder / name).is_file() for name in hf_folder.TOKENIZER_FILES[:2])
    with building(Path(out)) as folder:
        hf_writer.write_rest(merged, planned, folder, merged.folder if own else None)
        offsets = hf_writer.lay_out(folder, planned)
        for one in planned:
            progress(hf_writer.fill(merged, folder, one, offsets[one.name], buffers))
    return Path(out)
