"""Where whole tensors come from: the interface that folders of every format share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamax.checkpoint.runs import Run, StridedCopy, overlaps, whole_run
from llamax.checkpoint.safetensors_io import (
    SLAB_BYTES,
    read_elements,
)
from llamax.runtime.errors import CheckpointError


class Piece(NamedTuple):
    """A run, and where its bytes start."""

    path: Path
    offset: int
    run: Run


class Source(ABC):
    """Hub tensors in files; ``model`` is the Hub's config.json."""

    folder: Path
    model: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        """What the program that wrote the files said beside them: nothing, where none did."""
        return {}

    @property
    def last_trained(self) -> Source:
        """What was trained last: the source itself, or the adapters that were merged into it."""
        return self

    @property
    def untrained(self) -> Source:
        """What adapters were merged into, or the source itself."""
        return self

    @property
    def generation(self) -> dict[str, Any]:
        """The Hub's generation_config.json: tokens that end a text, and sampling settings."""
        return dict(self.state.get("generation") or {})

    @abstractmethod
    def names(self) -> list[str]:
        """The Hub names of all weights."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""

    def kinds(self, name: str) -> tuple[str, ...]:
        """What is kept of a tensor: weight, and perhaps master, exp_avg, exp_avg_sq."""
        return ("weight",)

    @abstractmethod
    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        """The dtype of one kind in its files."""

    @abstractmethod
    def fill(self, name: str, kind: str, run: Run, into: Tensor, convert: bool = False) -> None:
        """Write a run into the ``run.length`` elements of a contiguous tensor on any device.

        Raises CheckpointError where a dtype would have to be rounded and ``convert`` is not given.
        """

    def read(
        self,
        name: str,
        kind: str = "weight",
        dim: int | None = None,
        start: int = 0,
        stop: int = -1,
    ) -> Tensor:
        """Entries [start, stop) along ``dim`` (0 or 1), or all of a tensor, as a new one."""
        shape = list(self.shape(name))
        run = whole_run(shape)
        if dim is not None:
            stop = shape[dim] if stop < 0 else stop
            if dim == 0:
                run = Run(0, run.width, start * run.width, (stop - start) * run.width)
            else:
                inner = math.prod(shape[2:])
                width = (stop - start) * inner
                run = Run(start * inner, width, 0, shape[0] * width)
            shape[dim] = stop - start
        into = torch.empty(shape, dtype=self.dtype(name, kind))
        self.fill(name, kind, run, into)
        return into


class FileSource(Source):
    """A source that reads its tensors from files as they are there."""

    @abstractmethod
    def pieces(self, name: str, kind: str, run: Run) -> Sequence[Piece]:
        """Where the elements of a run lie: pieces that may have some, and all that do."""

    def fill(self, name: str, kind: str, run: Run, into: Tensor, convert: bool = False) -> None:
        stored, flat = self.dtype(name, kind), into.detach().view(-1)
        if stored == flat.dtype and flat.device.type == "cpu":
            self._fetch(name, kind, run, flat)
            return
        if not convert and torch.promote_types(stored, flat.dtype) != flat.dtype:
            raise CheckpointError(
                f"{self.folder}: {name} ({kind}) is {dtype_name(stored)}; taking it as "
                f"{dtype_name(flat.dtype)} would round it; use {dtype_name(stored)} or convert it "
                "first"
            )
        most = SLAB_BYTES // stored.itemsize
        for start in range(0, run.length, most):
            length = min(most, run.length - start)
            slab = torch.empty(length, dtype=stored)
            self._fetch(name, kind, Run(run.left, run.width, run.start + start, length), slab)
            flat[start : start + length].copy_(slab)

    def _fetch(self, name: str, kind: str, run: Run, into: Tensor) -> None:
        for piece in self.pieces(name, kind, run):
            if copies := list(overlaps(piece.run, run)):
                self.read_run(piece, copies, into)

    def read_run(self, piece: Piece, copies: Iterable[StridedCopy], into: Tensor) -> None:
        """Copy elements of a piece into a flat host tensor; sources with checksums verify them."""
        read_elements(piece.path, piece.offset, copies, into)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, as configurations spell it."""
    return str(dtype).removeprefix("torch.")
