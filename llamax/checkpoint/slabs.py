"""Streams of tensors from a source into new files, at most 16 MiB at a time."""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue

import torch
from torch import Tensor

from llamax.checkpoint.runs import Run, whole_run
from llamax.checkpoint.safetensors_io import SLAB_BYTES, TensorStream
from llamax.checkpoint.source import Source

Buffers = SimpleQueue[Tensor]


class Slabs:
    """The elements of one run of a source, in chunks that are read when they are asked for.

    Each chunk lies in a buffer borrowed from ``buffers`` and is valid until the next one.
    """

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
            most = min(len(slab), rows * self.run.width)  # whole rows, if a row fits
            for start in range(self.run.start, self.run.stop, most):
                length = min(most, self.run.stop - start)
                run = Run(self.run.left, self.run.width, start, length)
                self.source.fill(self.name, self.kind, run, slab[:length], convert=True)
                yield slab[:length]
        finally:
            self.buffers.put(buffer)


def new_buffers(count: int = 2) -> Buffers:
    """``count`` buffers of 16 MiB: one per thread that iterates over slabs at the same time."""
    buffers: Buffers = SimpleQueue()
    for _ in range(count):
        buffers.put(torch.empty(SLAB_BYTES, dtype=torch.uint8))
    return buffers


def stream_tensor(
    source: Source, name: str, kind: str, dtype: torch.dtype, buffers: Buffers
) -> TensorStream:
    """A whole Hub tensor as a stream into a file, converted to ``dtype``."""
    shape = source.shape(name)
    return TensorStream(
        name, dtype, shape, Slabs(source, name, kind, whole_run(shape), dtype, buffers)
    )
