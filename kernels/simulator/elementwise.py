"""Instructions of ``nki.isa`` that compute element by element or reduce along partitions.

The engines compute in float32 and round to the dtype of ``dst``.  N is the number of elements of a
partition; the cycles are those of the documentation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llamax.kernels.simulator.machine import LEAST_CYCLES, need
from llamax.kernels.simulator.memory import BFLOAT16, Tensor
from llamax.kernels.simulator.operands import (
    apply_operator,
    check_alike,
    check_bitwise,
    count_cycles,
    fold,
    operand_values,
    pick_engine,
)
from llamax.kernels.simulator.operators import Operator


def activation(
    dst: Tensor,
    op: Operator,
    data: Tensor,
    bias: Any = None,
    scale: Any = 1.0,
    reduce_op: Any = None,
    reduce_res: Tensor | None = None,
    reduce_cmd: Any = None,
    name: Any = None,
) -> None:
    """``op(data * scale + bias)`` on the scalar engine.  N cycles, 64 more to write the sum."""
    who = "activation"
    check_alike(who, "scalar", dst, data)
    need(isinstance(op, Operator) and op.activation, f"{who}: {op!r} is no activation function")
    need(
        bias is None or isinstance(bias, Tensor),
        f"{who}: bias must be a tile (partitions, 1) on a NeuronCore-v2, not a number",
    )
    x = data.rows() * operand_values(scale, data, who)
    if bias is not None:
        x = x + operand_values(bias, data, who)
    with np.errstate(all="ignore"):
        y = np.asarray(op.apply(x.astype(np.float32)), np.float32)
    dst.write(y)
    count_cycles(who, "scalar", data.free, dst, data)
    if reduce_res is not None:
        need(
            reduce_op is None or reduce_op.name == "add", f"{who}: the scalar engine sums, no more"
        )
        reduce_res.check(who)
        need(
            (reduce_res.partitions, reduce_res.free) == (data.partitions, 1),
            f"{who}: reduce_res is {reduce_res!r}; it must be ({data.partitions}, 1)",
        )
        reduce_res.write(y.sum(1, keepdims=True))
        count_cycles("read_sum", "scalar", LEAST_CYCLES, reduce_res)


def activation_reduce(
    dst: Tensor,
    op: Operator,
    data: Tensor,
    reduce_op: Operator,
    reduce_res: Tensor,
    bias: Any = None,
    scale: Any = 1.0,
    name: Any = None,
) -> None:
    """``activation`` that also writes the sum of each partition."""
    activation(dst, op, data, bias, scale, reduce_op, reduce_res)


def reciprocal(dst: Tensor, data: Tensor, name: Any = None) -> None:
    """1 / data.  8 N cycles of the vector engine."""
    check_alike("reciprocal", "vector", dst, data)
    with np.errstate(all="ignore"):
        dst.write(1 / data.rows())
    count_cycles("reciprocal", "vector", 8 * data.free, dst, data)


def tensor_reduce(
    dst: Tensor,
    op: Operator,
    data: Tensor,
    axis: Any,
    negate: bool = False,
    keepdims: bool = False,
    name: Any = None,
) -> None:
    """Reduce the last free dimensions.  N cycles; N / 2 for bfloat16 sums and maxima."""
    for tile in (dst, data):
        tile.check("tensor_reduce")
    axes = tuple(int(a) % data.ndim for a in np.atleast_1d(axis))
    need(
        axes == tuple(range(data.ndim - len(axes), data.ndim)) and 0 not in axes,
        f"tensor_reduce: axis {axis} of {data!r}; only the last free dimensions can be reduced",
    )
    result = fold(op, data.read(), axes, "tensor_reduce")
    need(
        dst.partitions == data.partitions and dst.data.size == result.size,
        f"tensor_reduce: dst is {dst!r}, the result {result.shape}",
    )
    dst.write(-result if negate else result)
    fast = dst.dtype == data.dtype == BFLOAT16 and op.name in ("add", "maximum")
    count_cycles("tensor_reduce", "vector", data.free / (2 if fast else 1), dst, data)


def tensor_partition_reduce(dst: Tensor, op: Operator, data: Tensor, name: Any = None) -> None:
    """Reduce over the partitions.  150 + N cycles of gpsimd (our estimate: none is documented)."""
    check_alike("tensor_partition_reduce", "gpsimd", data)
    dst.check("tensor_partition_reduce", ("sbuf",))
    dst.write(fold(op, data.rows(), (0,), "tensor_partition_reduce"))
    count_cycles("tensor_partition_reduce", "gpsimd", data.free, dst, data)


def tensor_tensor(
    dst: Tensor, data1: Tensor, data2: Tensor, op: Operator, engine: Any = None, name: Any = None
) -> None:
    """``data1 op data2``.  N cycles with one input in PSUM or three bfloat16 tiles, else 2 N."""
    where = pick_engine(engine, ("vector", "gpsimd"), "tensor_tensor")
    check_alike("tensor_tensor", where, dst, data1, data2)
    check_bitwise("tensor_tensor", op, data1, data2)
    memories = (data1.memory, data2.memory)
    need(memories != ("psum", "psum"), "tensor_tensor: both inputs are in PSUM")
    dst.write(apply_operator(op, data1.rows(), data2.rows(), False, "tensor_tensor"))
    narrow = dst.dtype == data1.dtype == data2.dtype == BFLOAT16
    fast = "psum" in memories or (narrow and op.name in ("add", "multiply", "subtract"))
    count_cycles("tensor_tensor", where, data1.free * (1 if fast else 2), dst, data1, data2)


def tensor_scalar(
    dst: Tensor,
    data: Tensor,
    op0: Operator,
    operand0: Any,
    reverse0: bool = False,
    op1: Any = None,
    operand1: Any = None,
    reverse1: bool = False,
    engine: Any = None,
    name: Any = None,
) -> None:
    """``(data op0 operand0) op1 operand1`` with numbers or tiles [partitions, 1].  N cycles."""
    who = "tensor_scalar"
    where = pick_engine(engine, ("vector", "scalar", "gpsimd"), who)
    check_alike(who, where, dst, data)
    check_bitwise(who, op0, dst, data)
    x = apply_operator(op0, data.rows(), operand_values(operand0, data, who), reverse0, who)
    if op1 is not None:
        x = apply_operator(op1, x, operand_values(operand1, data, who), reverse1, who)
    dst.write(x)
    count_cycles(who, where, data.free, dst, data)


def scalar_tensor_tensor(
    dst: Tensor,
    data: Tensor,
    op0: Operator,
    operand0: Any,
    op1: Operator,
    operand1: Tensor,
    reverse0: bool = False,
    reverse1: bool = False,
    name: Any = None,
) -> None:
    """``(data op0 operand0) op1 operand1``.  2 N cycles; N for (x - a) * y of bfloat16."""
    who = "scalar_tensor_tensor"
    check_alike(who, "vector", dst, data, operand1)
    need((data.memory, operand1.memory) != ("psum", "psum"), f"{who}: both inputs are in PSUM")
    x = apply_operator(op0, data.rows(), operand_values(operand0, data, who), reverse0, who)
    dst.write(apply_operator(op1, x, operand1.rows(), reverse1, who))
    narrow = data.dtype == operand1.dtype == BFLOAT16 and data.free % 2 == 0
    fast = narrow and (op0.name, op1.name) == ("subtract", "multiply")
    count_cycles(who, "vector", data.free * (1 if fast else 2), dst, data, operand1)


def tensor_scalar_reduce(
    dst: Tensor,
    data: Tensor,
    op0: Operator,
    operand0: Any,
    reduce_op: Operator,
    reduce_res: Tensor,
    reverse0: bool = False,
    name: Any = None,
) -> None:
    """``data op0 operand0`` and its reduction along each partition.  N + 64 cycles."""
    who = "tensor_scalar_reduce"
    check_alike(who, "vector", dst, data)
    reduce_res.check(who)
    x = apply_operator(op0, data.rows(), operand_values(operand0, data, who), reverse0, who)
    dst.write(x)
    reduce_res.write(fold(reduce_op, x, (1,), who))
    count_cycles(who, "vector", max(LEAST_CYCLES, data.free) + LEAST_CYCLES, dst, data)
