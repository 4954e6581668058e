"""What instructions share: the checks of their operands, and the count of their cycles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llamax.kernels.simulator.machine import GPSIMD_START_CYCLES, STATE, fail, need
from llamax.kernels.simulator.memory import Array, Tensor
from llamax.kernels.simulator.operators import Operator


def count_cycles(name: str, where: str, cycles: float, *tiles: Tensor) -> None:
    if where == "gpsimd":
        cycles += GPSIMD_START_CYCLES
    STATE.tally.run(where, name, cycles, {tile.memory for tile in tiles})


def pick_engine(choice: Any, allowed: Sequence[str], who: str) -> str:
    """The engine that runs an instruction: the first allowed one unless the kernel chooses."""
    name = "unknown" if choice is None else choice.name
    if name == "unknown":
        return allowed[0]
    need(name in allowed, f"{who} does not run on the {name} engine; use {' or '.join(allowed)}")
    return str(name)


def check_alike(who: str, where: str, *tiles: Tensor) -> None:
    """Check tiles of an elementwise instruction; gpsimd cannot reach PSUM."""
    memories = ("sbuf",) if where == "gpsimd" else ("sbuf", "psum")
    for tile in tiles:
        tile.check(who, memories)
        need(
            (tile.partitions, tile.free) == (tiles[0].partitions, tiles[0].free),
            f"{who}: {tile!r} and {tiles[0]!r} differ in partitions or elements",
        )


def operand_values(value: Any, tile: Tensor, who: str) -> Any:
    """A number, or the values of a tile [partitions, 1], as something that broadcasts."""
    if not isinstance(value, Tensor):
        return np.float32(value)
    value.check(who)
    need(
        (value.partitions, value.free) == (tile.partitions, 1),
        f"{who}: an operand is {value!r}; it must be a number or ({tile.partitions}, 1)",
    )
    return value.rows()


def apply_operator(op: Operator, x: Any, y: Any, reverse: bool, who: str) -> Array:
    need(isinstance(op, Operator), f"{who}: {op!r} is no operator of nki.language")
    if op.activation:
        return np.asarray(op.apply(x), np.float32)
    result = op.apply(y, x) if reverse else op.apply(x, y)
    return np.asarray(result, None if op.bitwise else np.float32)


def check_bitwise(who: str, op: Any, *tiles: Tensor) -> None:
    if isinstance(op, Operator) and op.bitwise:
        need(
            all(not tile.dtype.floating for tile in tiles),
            f"{who}: {op!r} takes integers, not floats",
        )


def fold(op: Any, values: Array, axes: tuple[int, ...], who: str) -> Array:
    reduce: Callable[..., Array] | None = getattr(op, "reduce", None)
    if reduce is None:
        fail(f"{who}: {op!r} does not reduce")
    return np.asarray(reduce(values, axis=axes))
