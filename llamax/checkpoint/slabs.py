"""A source's tensors on their way into new files, a slab of at most 16 MiB at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from llamax.checkpoint.container import SLAB_BYTES, Outgoing
from llamax.checkpoint.layout import Run
from llamax.checkpoint.load import Source


class Slabs:
    """Chunks of one run of a source, read when the writer asks; each reuses ``buffer``."""

    def __init__(
        self, source: Source, name: str, kind: str, run: Run, dtype: torch.dtype, buffer: Tensor
    ) -> None:
        self.source, self.name, self.kind, self.run = source, name, kind, run
        self.slab = buffer.view(dtype)

    def __iter__(self) -> Iterator[Tensor]:
        rows = max(1, len(self.slab) // self.run.width)
        most = min(len(self.slab), rows * self.run.width)  # whole rows, where a row fits
        for start in range(self.run.start, self.run.stop, most):
            length = min(most, self.run.stop - start)
            part = self.slab[:length]
            run = Run(self.run.left, self.run.width, start, length)
            self.source.fill(self.name, self.kind, run, part, convert=True)
            yield part


def new_buffer() -> Tensor:
    """The bytes of one slab."""
    return torch.empty(SLAB_BYTES, dtype=torch.uint8)


def whole(source: Source, name: str, kind: str, dtype: torch.dtype, buffer: Tensor) -> Outgoing:
    """A whole Hub tensor as it goes into a file."""
    shape = source.shape(name)
    run = Run(0, math.prod(shape[1:]), 0, math.prod(shape))
    return Outgoing(name, dtype, shape, Slabs(source, name, kind, run, dtype, buffer))
