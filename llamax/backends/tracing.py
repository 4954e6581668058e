"""Traces the programs of every rank of any world in one process, with torch-xla and no device.

Operations are recorded as usual, but at a step boundary the recorded program is returned as text
instead of compiled, and every tensor becomes a placeholder with a shape and no memory::

    rank r of the world   trace ... | boundary: HLO text, placeholders | trace ... | boundary ...

So a model of any size costs only its graph, and one process acts as each rank of a world in turn.
Nothing is compiled or run.  Reading a value on the host in the middle of a trace is an error that
names the line.

Source: torch-xla 2.9, ``_XLAC``: ``_get_xla_tensors_hlo``, ``_clear_pending_irs``.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from llamax.backends import xla, xla_install
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import BackendError

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")


class HostRead(BackendError):
    """A step reads a device value on the host; ``source``: "path:line"."""

    def __init__(self, source: str) -> None:
        super().__init__(
            f"{source} reads a device value in the middle of a step, which ends the program there; "
            "keep it a tensor, or read it after the step"
        )
        self.source = source


class Tracer:
    """A process that traces as any rank; ``debug``: record the Python line of each instruction.

    Raises BackendError where torch-xla is not installed or does not match torch.
    """

    def __init__(self, rendezvous: Rendezvous, debug: bool = True) -> None:
        os.environ["PJRT_DEVICE"] = "CPU"
        xla_install.configure(os.environ, rendezvous, stochastic_rounding=False)
        import torch_xla
        import torch_xla.debug.metrics as metrics
        import torch_xla.runtime as runtime

        self.metrics, self.runtime, self.lazy = metrics, runtime, torch_xla._XLAC
        self.device: torch.device = torch_xla.device()
        self._texts: dict[tuple[bool, bytes], str] = {}
        self.debug(debug)
        self._fallbacks = set(metrics.executed_fallback_ops())
        gc.collect()
        gc.freeze()  # the search for tensors then skips all objects made by imports

    def debug(self, on: bool) -> None:
        """Switch the recording of Python lines on or off."""
        self.lazy._set_ir_debug(on)
        self._with_lines = on

    @contextmanager
    def without_debug(self) -> Iterator[None]:
        """Trace without Python lines while the block runs, which is faster."""
        self.debug(False)
        try:
            yield
        finally:
            self.debug(True)

    def axes(self, mesh: Mesh, rank: int) -> Axes:
        """The axes of ``mesh`` of global ``rank``; this process acts as that rank from now on."""
        self.runtime._WORLD_SIZE, self.runtime._ORDINAL = mesh.world_size, rank
        return xla.axes(mesh, rank, self.device)

    def record(self) -> str:
        """The HLO text that a step boundary would compile here; "" where nothing is pending.

        Afterwards all tensors are placeholders, as if the program had run.
        """
        roots = self.pending()
        text = self._text(roots) if roots else ""
        self.clear_pending()
        return text

    def _text(self, roots: list[Tensor]) -> str:
        """The HLO text of a recorded graph.

        A graph is lowered once for each hash: torch-xla's own, by which it finds the compiled
        program of a graph.  Python lines are those of the first one.
        """
        key = self._with_lines, self.lazy._get_graph_hash(roots)
        if key not in self._texts:
            self._texts[key] = self.lazy._get_xla_tensors_hlo(roots)
        return self._texts[key]

    def pending(self) -> list[Tensor]:
        """The tensors with pending operations, oldest first."""
        found = [
            each
            for each in gc.get_objects()
            if issubclass(type(each), Tensor) and each.device.type == "xla"
        ]
        pending = [
            each for each in found if self.lazy._check_tensor_need_materialization([each])[0]
        ]
        return sorted(pending, key=self.lazy._xla_get_tensor_id)

    def clear_pending(self) -> None:
        """Turn all tensors into placeholders."""
        self.lazy._clear_pending_irs(str(self.device))
        self.lazy._set_all_reduce_token(str(self.device), None)

    def fallbacks(self) -> list[str]:
        """Operations that torch ran on the host because torch-xla cannot compile them."""
        return sorted(set(self.metrics.executed_fallback_ops()) - self._fallbacks)

    @contextmanager
    def forbid_reads(self) -> Iterator[None]:
        """Raise HostRead where the block reads a device value."""

        def refuse(x: Tensor) -> Any:
            raise HostRead(_line_outside())

        with ExitStack() as stack:
            for name in READS:
                stack.enter_context(_patched(name, refuse))
            yield

    @contextmanager
    def zero_reads(self) -> Iterator[None]:
        """Copies to the host return zeros; raise HostRead where one would compile a program."""

        def copy(x: Tensor) -> Tensor:
            if self.lazy._check_tensor_need_materialization([x])[0]:
                raise HostRead(_line_outside())
            return torch.zeros(x.shape, dtype=x.dtype)

        with _patched("cpu", copy):
            yield


def opaque(
    name: str,
    inputs: list[Tensor],
    shapes: list[tuple[int, ...]],
    dtypes: list[torch.dtype],
) -> list[Tensor]:
    """Tensors of these shapes, made from ``inputs`` by one instruction that only has a name."""
    import torch_xla

    found: list[Tensor] = torch_xla._XLAC._xla_custom_call(
        inputs, name, [list(shape) for shape in shapes], dtypes, False, "", 1, {}
    )
    return found


@contextmanager
def _patched(name: str, function: Callable[[Tensor], Any]) -> Iterator[None]:
    """Replace a method of device tensors by ``function`` while the block runs."""
    original = getattr(Tensor, name)

    def method(x: Tensor, *args: Any, **options: Any) -> Any:
        return function(x) if x.device.type == "xla" else original(x, *args, **options)

    setattr(Tensor, name, method)
    try:
        yield
    finally:
        setattr(Tensor, name, original)


def _line_outside() -> str:
    """The innermost line outside torch and this file: "path:line"."""
    frame = sys._getframe()
    while frame.f_back and frame.f_code.co_filename.startswith((__file__, *torch.__path__)):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
