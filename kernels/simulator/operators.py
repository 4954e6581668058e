"""Operators and activation functions that ``nki.language`` names and instructions apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llamax.kernels.simulator.machine import fail

Function = Callable[..., Any]


class Operator(NamedTuple):
    """A name of ``nki.language`` that an instruction takes as ``op``.

    ``reduce`` folds it along axes; ``activation`` marks those of the scalar engine.
    """

    name: str
    apply: Function
    reduce: Function | None = None
    activation: bool = False
    bitwise: bool = False

    def __call__(self, *_: Any, **__: Any) -> Any:
        fail(f"nl.{self.name}(...) allocates its result; use the instruction of nki.isa")

    def __repr__(self) -> str:
        return f"nl.{self.name}"


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


BINARY: dict[str, Function] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "power": np.power,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
}
REDUCES = ("add", "multiply", "maximum", "minimum")
BITWISE: dict[str, Function] = {
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
}
ACTIVATIONS: dict[str, Function] = {
    "copy": lambda x: x,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "square": np.square,
    "abs": np.abs,
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "silu_dx": lambda x: _sigmoid(x) * (1 + x * (1 - _sigmoid(x))),
    "reciprocal": lambda x: 1 / x,
    "sin": np.sin,
}

OPERATORS = {
    **{
        name: Operator(name, apply, apply.reduce if name in REDUCES else None)  # type: ignore[attr-defined]
        for name, apply in BINARY.items()
    },
    **{name: Operator(name, apply, bitwise=True) for name, apply in BITWISE.items()},
    **{name: Operator(name, apply, activation=True) for name, apply in ACTIVATIONS.items()},
}
