"""Run a kernel in the simulator: ``install`` provides ``nki``, ``run`` executes and tallies.

::

    simulator.run.install()                      # nki, nki.isa, nki.language in sys.modules
    from llamax.kernels.attention import nki_forward
    result, tally = run(nki_forward.kernel, bf16(q), bf16(k), scale)
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np

from llamax.kernels.simulator import isa, language
from llamax.kernels.simulator.machine import STATE, NkiError, Tally, fail, need
from llamax.kernels.simulator.memory import (
    BFLOAT16,
    Array,
    Buffer,
    Dtype,
    Tensor,
    dtype_of,
    rounded,
)
from llamax.kernels.simulator.operators import Operator


class Typed:
    """An array for a kernel with an NKI dtype that NumPy lacks."""

    def __init__(self, array: Array, dtype: Dtype) -> None:
        self.array, self.dtype = rounded(np.array(array), dtype), dtype


def bf16(array: Array) -> Typed:
    """The array rounded to bfloat16, as an input of a kernel."""
    return Typed(array, BFLOAT16)


class Kernel:
    """A function under ``nki.jit``: callable from other kernels, or with arrays."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    def __getitem__(self, grid: Any) -> Kernel:
        size = int(np.prod(grid))
        need(size == 1, f"a grid of {size} programs: a NeuronCore-v2 is one core, so its grid is 1")
        return self

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if any(isinstance(x, Tensor) for x in (*arguments, *named.values())):
            return self.function(*arguments, **named)
        return run(self, *arguments, **named)[0]


def jit(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """``nki.jit``, with or without arguments."""
    return Kernel(function) if function is not None else Kernel


def _input(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        dtype, array = dtype_of(value.dtype), value
    elif isinstance(value, Typed):
        dtype, array = value.dtype, value.array
    else:
        return value
    buffer = Buffer(array.shape, dtype, "hbm", "input")
    buffer.data[...] = array
    buffer.written[...] = True
    return Tensor(buffer, (buffer.data, buffer.written))


def _output(value: Any, typed: bool) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_output(x, typed) for x in value)
    if not isinstance(value, Tensor):
        return value
    if value.memory != "hbm":
        raise NkiError(f"the kernel returns {value!r}; results must be in HBM")
    if not value.parts[1].all():
        raise NkiError(f"the kernel does not write all of its result {value!r}")
    return Typed(value.data, value.dtype) if typed else np.array(value.data)


def run(kernel: Any, *arguments: Any, typed: bool = False, **named: Any) -> tuple[Any, Tally]:
    """The kernel's results as arrays, or as ``Typed`` ones, and its tally.

    Arrays (and ``bf16`` ones) become tensors in HBM; other arguments are compile-time constants.

    Raises:
        NkiError: the kernel breaks a limit of the core or a rule of NKI; with its file and line.
    """
    STATE.tally, STATE.dynamic_loops = Tally(), 0
    function = kernel.function if isinstance(kernel, Kernel) else kernel
    with np.errstate(over="ignore", invalid="ignore"):
        result = function(*map(_input, arguments), **{k: _input(v) for k, v in named.items()})
    return _output(result, typed), STATE.tally


def _unsimulated(name: str) -> Operator:
    """A name of ``nki.language`` that the simulator lacks: kernels may mention it, not use it."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Operator(name, lambda *_: fail(f"nl.{name} is not simulated"))


def modules() -> dict[str, types.ModuleType]:
    """The modules ``nki``, ``nki.isa`` and ``nki.language``."""
    nki, nki_isa, nki_language = (
        types.ModuleType(name) for name in ("nki", "nki.isa", "nki.language")
    )
    nki.__path__ = []
    for name, module in (("nki", nki), ("nki.isa", nki_isa), ("nki.language", nki_language)):
        module.__spec__ = ModuleSpec(name, None)
    for instruction in (*isa.INSTRUCTIONS, *isa.ENUMS):
        setattr(nki_isa, instruction.__name__, instruction)
    for member in isa.engine:
        setattr(nki_isa, f"{member.name}_engine", member)
    for spelled, value in language.NAMES.items():
        setattr(nki_language, spelled, value)
    nki_language.__getattr__ = _unsimulated  # type: ignore[method-assign]
    for spelled, value in (
        ("jit", jit),
        ("dtype", Dtype),
        ("isa", nki_isa),
        ("language", nki_language),
    ):
        setattr(nki, spelled, value)
    return {"nki": nki, "nki.isa": nki_isa, "nki.language": nki_language}


def install() -> None:
    """Provide ``nki`` to kernels that are imported from now on, unless the real one is there."""
    if "nki" not in sys.modules:
        sys.modules.update(modules())
