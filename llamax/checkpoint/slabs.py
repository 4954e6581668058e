"""A source's tensors on their way into new files, a slab of at most 16 MiB at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from queue import SimpleQueue

import torch
from torch import Tensor

from llamax.checkpoint.runs import Run
from llamax.checkpoint.safetensors_io import SLAB_BYTES, Outgoing
from llamax.checkpoint.source import Source

Buffers = SimpleQueue[Tensor]


class Slabs:
    """Chunks of one run of a source, read when the writer asks into a borrowed buffer."""

    def __init__(
        self, source: Source, name: str, kind: str, run: Run, dtype: torch.dtype, buffers: Buffers
    ) -> None:
        self.source, self.name, self.kind, self.run = source, name, kind, run
        self.dtype, self.buffers = dtype, buffers

    def __iter__(self) -> Iterator[Tensor]:
        buffer = self.buffers.get()
        try:
            slab = buffer.view(self.dtype)
            rows = max(1, len(slab) // self.run.width)
            most = min(len(slab), rows * self.run.width)  # whole rows, where a row fits
            for start in range(self.run.start, self.run.stop, most):
                length = min(most, self.run.stop - start)
                run = Run(self.run.left, self.run.width, start, length)
                self.source.fill(self.name, self.kind, run, slab[:length], convert=True)
                yield slab[:length]
        finally:
            self.buffers.put(buffer)


def new_buffers(count: int = 2) -> Buffers:
    """Room for as many slabs as there are threads; who borrows one puts it back."""
    buffers: Buffers = SimpleQueue()
    for _ in range(count):
        buffers.put(torch.empty(SLAB_BYTES, dtype=torch.uint8))
    return buffers


def whole(source: Source, name: str, kind: str, dtype: torch.dtype, buffers: Buffers) -> Outgoing:
    """A whole Hub tensor as it goes into a file."""
    shape = source.shape(name)
    run = Run(0, math.prod(shape[1:]), 0, math.prod(shape))
    return Outgoing(name, dtype, shape, Slabs(source, name, kind, run, dtype, buffers))
