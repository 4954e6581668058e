"""NKI kernels run by the simulator in place of a NeuronCore."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llamax.kernels.simulator.machine import Tally
from llamax.kernels.simulator.memory import BFLOAT16
from llamax.kernels.simulator.run import Typed, bf16, install, run


class Launcher:
    """A stand-in for ``launch`` of a kernel's op: simulates, and keeps the tallies in order.

    ``modules`` replaces kernel modules by name, as for mutated ones.
    """

    def __init__(self, modules: dict[str, ModuleType] | None = None) -> None:
        self.tallies: list[Tally] = []
        self.modules = modules or {}
        install()

    def __call__(self, module: str, name: str, *inputs: Any) -> Any:
        source = self.modules.get(module) or import_module(f"llamax.kernels.{module}")
        results, tally = run(getattr(source, name), *map(_array, inputs), typed=True)
        self.tallies.append(tally)
        tensors = tuple(_tensor(x) for x in _tuple(results))
        return tensors if isinstance(results, tuple) else tensors[0]


def mutated(module: str, old: str, new: str, several: bool = False) -> ModuleType:
    """A copy of a kernel module in which ``old`` is ``new``; unchanged if ``old`` is empty.

    ``old`` stands there once, or with ``several`` at least once.
    """
    install()
    path = str(import_module(f"llamax.kernels.{module}").__file__)
    text = Path(path).read_text()
    if old:
        count = text.count(old)
        assert count == 1 or (several and count > 1), f"{old}: {count} times"
        text = text.replace(old, new)
    changed = ModuleType("mutated")
    changed.__file__ = path
    exec(compile(text, "mutated.py", "exec"), changed.__dict__)
    return changed


def _array(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    x = x.detach()
    return bf16(x.float().numpy()) if x.dtype == torch.bfloat16 else x.numpy()


def _tensor(x: Typed) -> Tensor:
    tensor = torch.from_numpy(x.array)
    return tensor.bfloat16() if x.dtype == BFLOAT16 else tensor


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)
