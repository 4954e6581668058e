"""``nki.language``: allocation, loops and the names of dtypes, memories and operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from llamax.kernels.simulator.machine import (
    BANK_BYTES,
    MOVING_COLUMNS,
    PARTITIONS,
    PSUM_BANKS,
    SBUF_BYTES,
    STATE,
    STATIONARY_COLUMNS,
    fail,
)
from llamax.kernels.simulator.memory import DTYPES, FLOAT32, Dtype, Tensor
from llamax.kernels.simulator.operators import OPERATORS

MEMORIES = {
    "sbuf": "sbuf",
    "psum": "psum",
    "hbm": "hbm",
    "shared_hbm": "hbm",
    "private_hbm": "hbm",
}


class Memory(str):
    """A name of a memory; kernels compare it and pass it as ``buffer``."""


class Register:
    """An integer in a register of the engines: the device knows it, the compiler does not."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value

    __int__ = __index__

    def __bool__(self) -> bool:
        fail("a register has no value for the compiler; use it as a bound of nl.dynamic_range")


class NKIObject:
    """The base class of the classes that a kernel defines."""


class tile_size:
    """The sizes of tiles, as attributes."""

    pmax = PARTITIONS
    psum_fmax = psum_bank_fmax = BANK_BYTES // 4
    psum_num_banks = PSUM_BANKS
    gemm_stationary_fmax = STATIONARY_COLUMNS
    gemm_moving_fmax = MOVING_COLUMNS
    total_available_sbuf_size = SBUF_BYTES
    bn_stats_fmax = 512


def ndarray(
    shape: tuple[int, ...], dtype: Any, buffer: Any = None, name: str = "", address: Any = None
) -> Tensor:
    """A tensor in a memory, SBUF by default; its elements are not written yet."""
    return Tensor.new(shape, dtype, MEMORIES[str(buffer or "sbuf")], name)


def zeros(shape: tuple[int, ...], dtype: Any, buffer: Any = None, name: str = "") -> Tensor:
    """A tensor of zeros."""
    tensor = ndarray(shape, dtype, buffer, name)
    tensor.write(np.zeros(shape, np.float32))
    return tensor


def shared_identity_matrix(n: int, dtype: Any = "uint8") -> Tensor:
    """An identity matrix in SBUF, [n, n]."""
    tensor = ndarray((n, n), dtype, "sbuf", "identity")
    tensor.write(np.eye(n))
    return tensor


def ds(start: Any, size: int) -> slice:
    """The slice of ``size`` elements from ``start`` on."""
    return slice(int(start), int(start) + int(size))


def static_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """A loop that the compiler unrolls."""
    return range(start) if stop is None else range(start, stop, step)


affine_range = sequential_range = static_range


def dynamic_range(start: Any, stop: Any = None, step: int = 1) -> Iterator[Register]:
    """A loop that runs on the device; its bounds may be registers."""
    low, high = (0, start) if stop is None else (start, stop)
    STATE.dynamic_loops += 1
    try:
        for value in range(int(low), int(high), step):
            yield Register(value)
    finally:
        STATE.dynamic_loops -= 1


def program_id(axis: int = 0) -> int:
    """The number of this program: a NeuronCore-v2 is one core, so 0."""
    return 0


def num_programs(axes: int = 0) -> int:
    """The number of programs, 1."""
    return 1


def program_ndim() -> int:
    """The dimensions of the grid, 0."""
    return 0


NAMES: dict[str, Any] = {
    **OPERATORS,
    **DTYPES,
    **{name: Memory(name) for name in MEMORIES},
    "tfloat32": Dtype("tfloat32", 4, FLOAT32.storage),
    "NKIObject": NKIObject,
    "tile_size": tile_size,
}
for _function in (
    ndarray,
    zeros,
    shared_identity_matrix,
    ds,
    static_range,
    dynamic_range,
    program_id,
    num_programs,
    program_ndim,
):
    NAMES[_function.__name__] = _function
NAMES |= {"affine_range": static_range, "sequential_range": static_range}
