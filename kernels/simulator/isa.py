"""``nki.isa``: the instructions that move data and multiply matrices; all of them in a table.

Each instruction checks where its operands are, their shapes and dtypes, computes, writes ``dst`` in
its dtype, and adds its documented cycles to the tally.  N is the number of elements of a partition.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import numpy as np

from llamax.kernels.simulator.elementwise import (
    activation,
    activation_reduce,
    reciprocal,
    scalar_tensor_tensor,
    tensor_partition_reduce,
    tensor_reduce,
    tensor_scalar,
    tensor_scalar_reduce,
    tensor_tensor,
)
from llamax.kernels.simulator.language import Register
from llamax.kernels.simulator.machine import (
    BANK_BYTES,
    FULL_DESCRIPTOR_BYTES,
    LEAST_CYCLES,
    MOVING_COLUMNS,
    PARTITIONS,
    STATE,
    STATIONARY_COLUMNS,
    need,
)
from llamax.kernels.simulator.memory import FLOAT32, Array, Tensor
from llamax.kernels.simulator.operands import check_alike, count_cycles, pick_engine
from llamax.kernels.simulator.operators import OPERATORS, Operator

engine = enum.Enum("engine", "unknown tensor vector scalar gpsimd dma sync")
reduce_cmd = enum.Enum("reduce_cmd", "idle reset reduce reset_reduce load_reduce")
dge_mode = enum.Enum("dge_mode", "unknown swdge hwdge none")
oob_mode = enum.Enum("oob_mode", "error skip")
nc_version = enum.Enum("nc_version", "gen2 gen3 gen4")
matmul_perf_mode = enum.Enum("matmul_perf_mode", "none double_row")
TRANSPOSE_BLOCK = 32  # partitions and columns of a transpose on the vector engine
EQUAL = OPERATORS["equal"]


def get_nc_version() -> enum.Enum:
    """The version of the simulated core."""
    return nc_version.gen2


def dma_copy(
    dst: Tensor,
    src: Tensor,
    dst_rmw_op: Any = None,
    oob_mode: Any = None,
    dge_mode: Any = None,
    unique_indices: bool = True,
    priority: Any = None,
    engine: Any = None,
    name: Any = None,
) -> None:
    """Copy between HBM and SBUF, or within one of them; dtypes may differ."""
    for tile in (dst, src):
        need(tile.memory != "psum", "dma_copy cannot reach PSUM; copy through SBUF by tensor_copy")
        need(not tile.on_chip or tile.partitions <= PARTITIONS, f"dma_copy: {tile!r} has too many")
    need(dst.data.size == src.data.size, f"dma_copy: {dst!r} and {src!r} differ in size")
    need(dst_rmw_op is None, "dma_copy(dst_rmw_op=...) is not simulated")
    dst.write(src.read())
    tally, bytes_moved = STATE.tally, max(x.data.size * x.dtype.itemsize for x in (dst, src))
    tally.instructions["dma.dma_copy"] += 1
    tally.dma_bytes += bytes_moved
    outside = [x for x in (dst, src) if not x.on_chip]
    if outside:
        tally.hbm_bytes += max(x.data.size * x.dtype.itemsize for x in outside)
    if any(x.ndim and _run_bytes(x) < FULL_DESCRIPTOR_BYTES for x in outside):
        tally.short_descriptors += 1


def _run_bytes(tensor: Tensor) -> int:
    """The bytes of a run of neighbouring elements."""
    size = 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.data.strides), strict=True):
        if length > 1 and stride != size * tensor.data.itemsize:
            break
        size *= length
    return size * tensor.dtype.itemsize


def tensor_copy(dst: Tensor, src: Tensor, engine: Any = None, name: Any = None) -> None:
    """Copy a tile.  N cycles; not on the scalar engine of a NeuronCore-v2."""
    where = pick_engine(engine, ("vector", "gpsimd"), "tensor_copy")
    check_alike("tensor_copy", where, dst, src)
    dst.write(src.read())
    count_cycles("tensor_copy", where, src.free, dst, src)


def memset(dst: Tensor, value: Any, engine: Any = None, name: Any = None) -> None:
    """Set every element.  N cycles, N / 2 for zeros of two bytes."""
    where = pick_engine(engine, ("vector", "gpsimd"), "memset")
    check_alike("memset", where, dst)
    dst.write(np.full(dst.shape, value, np.float32))
    count_cycles(
        "memset", where, dst.free / (2 if value == 0 and dst.dtype.itemsize == 2 else 1), dst
    )


def _affine(tile: Tensor, pattern: Any, offset: int, channel_multiplier: int, who: str) -> Array:
    """offset + partition * channel_multiplier + the pattern's steps, as [partitions, free]."""
    steps = np.zeros(1, np.int64)
    for step, count in pattern:
        steps = (steps[:, None] + np.arange(count) * step).reshape(-1)
    need(steps.size == tile.free, f"{who}: the pattern has {steps.size} elements, {tile!r} others")
    return offset + np.arange(tile.partitions)[:, None] * channel_multiplier + steps


def iota(
    dst: Tensor, pattern: Any, offset: int = 0, channel_multiplier: int = 0, name: Any = None
) -> None:
    """Write integers of an affine pattern.  150 + N cycles of gpsimd."""
    check_alike("iota", "gpsimd", dst)
    dst.write(_affine(dst, pattern, offset, channel_multiplier, "iota"))
    count_cycles("iota", "gpsimd", dst.free, dst)


def affine_select(
    dst: Tensor,
    pattern: Any,
    channel_multiplier: int,
    on_true_tile: Tensor,
    on_false_value: float,
    cmp_op: Operator = EQUAL,
    offset: int = 0,
    name: Any = None,
) -> None:
    """Keep elements where the affine pattern compares with 0, else a number.  150 + N of gpsimd."""
    check_alike("affine_select", "gpsimd", dst, on_true_tile)
    kept = cmp_op.apply(_affine(dst, pattern, offset, channel_multiplier, "affine_select"), 0)
    dst.write(np.where(kept, on_true_tile.rows(), np.float32(on_false_value)))
    count_cycles("affine_select", "gpsimd", dst.free, dst, on_true_tile)


def nc_matmul(
    dst: Tensor,
    stationary: Tensor,
    moving: Tensor,
    is_stationary_onezero: bool = False,
    is_moving_onezero: bool = False,
    is_transpose: bool = False,
    accumulate: bool | None = None,
    tile_position: Any = (),
    tile_size: Any = (),
    perf_mode: Any = None,
    name: Any = None,
) -> None:
    """``dst (+)= stationary.T @ moving``: [k, m], [k, n] in SBUF -> float32 [m, n] in a PSUM bank.

    The first product that writes a place of PSUM overwrites it, later ones add.  max(64, n) cycles,
    four times as many for float32.
    """
    for tile, who, limit in (
        (stationary, "stationary", STATIONARY_COLUMNS),
        (moving, "moving", MOVING_COLUMNS),
    ):
        tile.check(f"nc_matmul {who}", ("sbuf",))
        need(tile.free <= limit, f"nc_matmul: {who} has {tile.free} columns, above {limit}")
        need(tile.dtype.floating, f"nc_matmul: {who} is {tile.dtype!r}, not a float")
    need(not tile_position and not tile_size, "nc_matmul: tiling of the array is not simulated")
    need(
        perf_mode is None or perf_mode.name == "none",
        "nc_matmul: perf_mode needs a NeuronCore-v3",
    )
    need(
        stationary.partitions == moving.partitions,
        f"nc_matmul: {stationary!r} and {moving!r} differ in partitions, the summed dimension",
    )
    four = [tile.dtype.itemsize == 4 for tile in (stationary, moving)]
    need(four[0] == four[1], "nc_matmul: float32 and narrower operands cannot be mixed")
    dst.check("nc_matmul dst", ("psum",))
    need(dst.dtype == FLOAT32, f"nc_matmul: dst is {dst.dtype!r}; NeuronCore-v2 writes float32")
    need(
        (dst.partitions, dst.free) == (stationary.free, moving.free),
        f"nc_matmul: dst is {dst!r}; it must be ({stationary.free}, {moving.free})",
    )
    banks = dst.parts[3][:1] * 4 // BANK_BYTES
    need(banks.min() == banks.max(), f"nc_matmul: {dst!r} crosses a bank of PSUM")
    product = stationary.rows().T @ moving.rows()
    started = dst.parts[2]
    adds = bool(started.all()) if accumulate is None else accumulate
    need(
        adds or accumulate is False or not started.any(),
        f"nc_matmul: {dst!r} covers places with and without an unfinished sum",
    )
    need(
        not adds or bool(started.all()),
        "nc_matmul: accumulate=True where no product began a sum; a NeuronCore-v2 adds to anything",
    )
    if not adds:
        need(
            dst.base.loops == STATE.dynamic_loops,
            "nc_matmul: the first product of a sum runs in a dynamic loop inside its PSUM tile's "
            "scope; begin the sum before the loop",
        )
    old = dst.data.reshape(product.shape) if adds else np.float32(0)
    dst.write(old + product, summing=True)
    tally = STATE.tally
    tally.macs += stationary.partitions * stationary.free * moving.free
    count_cycles("nc_matmul", "tensor", max(LEAST_CYCLES, moving.free) * (4 if four[0] else 1), dst)


def nc_transpose(dst: Tensor, data: Tensor, engine: Any = None, name: Any = None) -> None:
    """[p, f] -> [f, p]: by the tensor engine from SBUF to PSUM, by the vector one to 32 x 32."""
    for tile in (dst, data):
        tile.check("nc_transpose")
    small = max(data.partitions, data.free) <= TRANSPOSE_BLOCK
    first = ("vector", "tensor") if small and dst.memory == "sbuf" else ("tensor", "vector")
    where = pick_engine(engine, first, "nc_transpose")
    need(
        (dst.partitions, dst.free) == (data.free, data.partitions),
        f"nc_transpose: {dst!r} is not the transpose of {data!r}",
    )
    if where == "vector":
        need(small, f"nc_transpose: {data!r} is above 32 x 32 for the vector engine")
        dst.write(data.rows().T)
        count_cycles("nc_transpose", "vector", data.free, dst, data)
        return
    need(
        (data.memory, dst.memory) == ("sbuf", "psum") and dst.dtype == FLOAT32,
        "nc_transpose on the tensor engine: from SBUF to float32 PSUM on a NeuronCore-v2",
    )
    need(data.free <= STATIONARY_COLUMNS, f"nc_transpose: {data!r} has more than 128 columns")
    values = data.rows()
    need(bool(np.isfinite(values).all()), "nc_transpose: the tensor engine turns inf into NaN")
    dst.write(values.T)
    cycles = max(data.partitions, min(LEAST_CYCLES, data.free))
    count_cycles("nc_transpose", "tensor", cycles * (4 if data.dtype.itemsize == 4 else 1), dst)


def register_alloc(x: int | None = None) -> Register:
    """A register of the sequencers, with a value known to the compiler or to be loaded."""
    return Register(x or 0)


def register_load(dst: Register, src: Tensor) -> None:
    """Load a register from one integer in SBUF or HBM."""
    need(src.data.size == 1, f"register_load: {src!r} has more than one element")
    need(not src.dtype.floating, f"register_load: {src!r} is no integer")
    need(src.memory != "psum", "register_load: from SBUF or HBM, not from PSUM")
    dst.value = int(src.read().reshape(-1)[0])
    STATE.tally.instructions["sync.register_load"] += 1


def register_move(dst: Register, imm: int) -> None:
    """Set a register to a constant."""
    dst.value = int(imm)


INSTRUCTIONS: tuple[Callable[..., Any], ...] = (
    get_nc_version,
    dma_copy,
    tensor_copy,
    memset,
    iota,
    affine_select,
    nc_matmul,
    nc_transpose,
    activation,
    activation_reduce,
    reciprocal,
    tensor_reduce,
    tensor_partition_reduce,
    tensor_tensor,
    tensor_scalar,
    scalar_tensor_tensor,
    tensor_scalar_reduce,
    register_alloc,
    register_load,
    register_move,
)
ENUMS = (engine, reduce_cmd, dge_mode, oob_mode, nc_version, matmul_perf_mode)
