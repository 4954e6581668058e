"""Tensors of the simulator: dtypes, buffers in HBM, SBUF or PSUM, and views of them.

A buffer knows which of its elements were written, so that reading what nobody wrote is an
error, and in PSUM which of them a matrix product began to sum.  bfloat16 is stored as float32 and
rounded when it is written.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamax.kernels.simulator.machine import (
    BANK_BYTES,
    PARTITIONS,
    PSUM_BANKS,
    PSUM_FREE,
    SBUF_BYTES,
    SBUF_FREE,
    START_PARTITIONS,
    STATE,
    Tally,
    fail,
    need,
)

Array = NDArray[Any]


class Dtype(NamedTuple):
    """A dtype of NKI: its name, the bytes of an element, and the NumPy dtype that stores it."""

    name: str
    itemsize: int
    storage: type

    @property
    def floating(self) -> bool:
        return bool(np.issubdtype(self.storage, np.floating))

    def __repr__(self) -> str:
        return self.name


FLOAT32 = Dtype("float32", 4, np.float32)
BFLOAT16 = Dtype("bfloat16", 2, np.float32)
FLOAT16 = Dtype("float16", 2, np.float16)
INTEGERS = tuple(
    Dtype(np.dtype(kind).name, np.dtype(kind).itemsize, kind)
    for kind in (np.int8, np.int16, np.int32, np.uint8, np.uint16, np.uint32)
)
DTYPES = {dtype.name: dtype for dtype in (FLOAT32, BFLOAT16, FLOAT16, *INTEGERS)}


def dtype_of(name: Any) -> Dtype:
    """The dtype of an NKI name, a string or a NumPy dtype."""
    if isinstance(name, Dtype):
        return name
    key = name if isinstance(name, str) else np.dtype(name).name
    if key not in DTYPES:
        fail(f"dtype {key} is unknown; the simulator has {', '.join(DTYPES)}")
    return DTYPES[key]


def rounded(values: Array, dtype: Dtype) -> Array:
    """The values as the dtype stores them: to nearest, ties to even; integers saturate."""
    if dtype == BFLOAT16:
        wide = np.ascontiguousarray(values, np.float32)
        bits = wide.view(np.uint32)
        kept = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(
            0xFFFF0000
        )
        return np.where(np.isnan(wide), wide, kept.view(np.float32))
    if not dtype.floating and values.dtype.kind == "f":
        limits = np.iinfo(dtype.storage)
        return np.clip(np.rint(values), limits.min, limits.max).astype(dtype.storage)
    return values.astype(dtype.storage)


class Buffer:
    """An allocation in "hbm", "sbuf" or "psum"; its share of SBUF or PSUM is free again with it."""

    def __init__(self, shape: tuple[int, ...], dtype: Dtype, memory: str, name: str) -> None:
        self.memory, self.dtype, self.name = memory, dtype, name
        self.loops = STATE.dynamic_loops
        self.data: Array = np.full(shape, np.nan if dtype.floating else 4, dtype.storage)
        self.written = np.zeros(shape, bool)
        if memory == "hbm":
            return
        need(
            shape[0] <= PARTITIONS, f"a tile {shape} has {shape[0]} partitions, above {PARTITIONS}"
        )
        need(len(shape) > 1, f"a tile {shape} has no free dimension; write ({shape[0]}, 1)")
        free_bytes = int(np.prod(shape[1:])) * dtype.itemsize
        tally = STATE.tally
        if memory == "sbuf":
            tally.sbuf_bytes += free_bytes
            tally.sbuf_high_bytes = max(tally.sbuf_high_bytes, tally.sbuf_bytes)
            weakref.finalize(self, _free, tally, free_bytes, 0)
            need(
                tally.sbuf_bytes <= SBUF_BYTES,
                f"SBUF is full: {tally.sbuf_bytes} bytes of a partition in use, above {SBUF_BYTES}",
            )
        else:
            self.started = np.zeros(shape, bool)
            places = np.arange(int(np.prod(shape[1:])), dtype=np.int32).reshape(shape[1:])
            self.places = np.broadcast_to(places, shape)
            banks = -(-free_bytes // BANK_BYTES)
            tally.psum_banks += banks
            tally.psum_high_banks = max(tally.psum_high_banks, tally.psum_banks)
            weakref.finalize(self, _free, tally, 0, banks)
            need(
                tally.psum_banks <= PSUM_BANKS,
                f"PSUM is full: {tally.psum_banks} banks in use, above {PSUM_BANKS}",
            )


def _free(tally: Tally, sbuf_bytes: int, banks: int) -> None:
    tally.sbuf_bytes -= sbuf_bytes
    tally.psum_banks -= banks


class Tensor:
    """A view of a buffer: the same part of its values, its ``written`` and, in PSUM, its sums."""

    def __init__(
        self, base: Buffer, parts: tuple[Array, ...], start: int = 0, dtype: Dtype | None = None
    ) -> None:
        self.base, self.parts, self.start = base, parts, start
        self.dtype = dtype or base.dtype

    @staticmethod
    def new(shape: Sequence[int], dtype: Any, memory: str, name: str = "") -> Tensor:
        base = Buffer(tuple(int(n) for n in shape), dtype_of(dtype), memory, name or "tensor")
        parts: tuple[Array, ...] = (base.data, base.written)
        if memory == "psum":
            parts += (base.started, base.places)
        return Tensor(base, parts)

    @property
    def data(self) -> Array:
        return self.parts[0]

    @property
    def memory(self) -> str:
        return self.base.memory

    buffer = memory

    @property
    def on_chip(self) -> bool:
        return self.memory != "hbm"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def partitions(self) -> int:
        return self.shape[0]

    @property
    def free(self) -> int:
        """Elements of a partition."""
        return int(np.prod(self.shape[1:]))

    def __repr__(self) -> str:
        return f"{self.memory} {self.dtype!r} {self.shape}"

    def __getitem__(self, index: Any) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        index = tuple(_plain(i) for i in index)
        need(len(index) <= self.ndim, f"index {index} has more dimensions than {self!r}")
        start = self.start
        for place, (i, length) in enumerate(zip(index, self.shape, strict=False)):
            low, high = (
                (i.start or 0, length if i.stop is None else i.stop)
                if isinstance(i, slice)
                else (i, i + 1)
            )
            need(
                0 <= low < high <= length,
                f"index {low}:{high} is outside dimension {place} of {self!r}",
            )
            if place == 0 and self.on_chip:
                need(
                    isinstance(i, slice), f"an index of {self!r} drops its partitions; use a slice"
                )
                need(
                    not isinstance(i, slice) or i.step in (None, 1),
                    f"partitions of {self!r} cannot be strided",
                )
                start += low
        return Tensor(self.base, tuple(x[index] for x in self.parts), start, self.dtype)

    def reshape(self, *shape: Any) -> Tensor:
        """The same elements in another shape; a tile keeps its partitions."""
        new = shape[0] if isinstance(shape[0], tuple | list) else shape
        need(
            not self.on_chip or new[0] == self.partitions,
            f"reshape of {self!r} to {tuple(new)} changes its partitions",
        )
        views = tuple(x.reshape(new) for x in self.parts)
        need(np.shares_memory(views[0], self.data), f"reshape of {self!r} would copy")
        return Tensor(self.base, views, self.start, self.dtype)

    def ap(
        self,
        pattern: Sequence[Sequence[int]],
        offset: int = 0,
        scalar_offset: Any = None,
        vector_offset: Any = None,
        indirect_dim: int = 0,
        dtype: Any = None,
    ) -> Tensor:
        """The access pattern [[step, count], ...] in elements from ``offset`` on.

        ``scalar_offset`` (a tensor of one integer, or a register) counts steps of ``indirect_dim``.
        """
        need(vector_offset is None, "ap(vector_offset=...) is not simulated")
        need(dtype in (None, self.dtype), f"ap: {self!r} as another dtype is not simulated")
        whole = self.base.data
        if scalar_offset is not None:
            tile = isinstance(scalar_offset, Tensor)
            steps = scalar_offset.read().reshape(-1)[0] if tile else scalar_offset
            offset += int(steps) * int(np.prod(whole.shape[indirect_dim + 1 :]))
        sizes = tuple(int(count) for _, count in pattern)
        last = offset + sum(int(step) * (int(count) - 1) for step, count in pattern)
        need(
            offset >= 0 and last < whole.size,
            f"access pattern {list(pattern)} at {offset} leaves {self!r}",
        )

        def view(x: Array) -> Array:
            flat = x.reshape(-1)[offset:]
            strides = tuple(int(step) * x.itemsize for step, _ in pattern)
            return np.lib.stride_tricks.as_strided(flat, sizes, strides)

        base = self.base
        parts = [base.data, base.written] + ([base.started] if base.memory == "psum" else [])
        views = [view(x) for x in parts]
        if base.memory == "psum":
            views.append(view(np.ascontiguousarray(base.places)))
        row = int(np.prod(whole.shape[1:]))
        return Tensor(base, tuple(views), offset // row if self.on_chip else 0, self.dtype)

    def read(self) -> Array:
        """The values: float32 for floating dtypes, else integers.  Refuses what nobody wrote."""
        need(bool(self.parts[1].all()), f"{self!r} ({self.base.name}) is read before it is written")
        return self.data.astype(np.float32) if self.dtype.floating else np.array(self.data)

    def rows(self) -> Array:
        """The values as [partitions, free]."""
        return self.read().reshape(self.partitions, -1)

    def write(self, values: Array, summing: bool = False) -> None:
        """Round and store the values; ``summing``: by a matrix product, into PSUM."""
        self.data[...] = rounded(np.asarray(values).reshape(self.shape), self.dtype)
        self.parts[1][...] = True
        if self.memory == "psum":
            self.parts[2][...] = summing

    def check(self, who: str, memories: tuple[str, ...] = ("sbuf", "psum")) -> None:
        """Refuse a tile that an instruction ``who`` cannot reach."""
        need(
            self.memory in memories,
            f"{who}: an operand is in {self.memory}; it must be in {' or '.join(memories)}",
        )
        limit = PSUM_FREE if self.memory == "psum" else SBUF_FREE
        need(self.free <= limit, f"{who}: {self.free} elements of a partition, above {limit}")
        allowed = next(v for n, v in START_PARTITIONS.items() if self.partitions <= n)
        need(
            self.start in allowed,
            f"{who}: {self.partitions} partitions cannot start at {self.start}; use {allowed}",
        )


def _plain(index: Any) -> Any:
    """An index with integers in place of registers."""
    if isinstance(index, slice):
        return slice(
            *(None if x is None else int(x) for x in (index.start, index.stop, index.step))
        )
    if isinstance(index, int | np.integer) or hasattr(index, "__index__"):
        return int(index)
    fail(f"index {index!r} is neither an integer nor a slice")
