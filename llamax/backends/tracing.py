"""torch-xla without a device: what every rank of any world would compile, in one process.

Operations are recorded as always, but at a step boundary the recorded program is written down
instead of compiled, and every tensor becomes a placeholder that has a shape and no memory::

    rank r of the world   trace ... | boundary: HLO text, placeholders | trace ... | boundary ...

So a model of any size costs what its graph costs, and a world of hundreds of ranks is one process
that takes the place of one rank after the other.  Nothing is compiled and nothing is run; a value
that the host wants to read in the middle of a trace is an error that names the line.

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
    """A step that needs a value on the host; ``source`` is the Python line."""

    def __init__(self, source: str) -> None:
        super().__init__(
            f"{source} reads a device value in the middle of a step, which ends the program there; "
            "keep it a tensor, or read it after the step"
        )
        self.source = source


class Tracer:
    """One process in the place of any rank; ``debug`` lets programs say their Python lines.

    Raises BackendError where torch-xla is absent or does not fit torch.
    """

    def __init__(self, alone: Rendezvous, debug: bool = True) -> None:
        os.environ["PJRT_DEVICE"] = "CPU"
        xla_install.configure(os.environ, alone, stochastic_rounding=False)
        import torch_xla
        import torch_xla.debug.metrics as metrics
        import torch_xla.runtime as runtime

        self.metrics, self.runtime, self.lazy = metrics, runtime, torch_xla._XLAC
        self.device: torch.device = torch_xla.device()
        self.debug(debug)
        self._fallbacks = set(metrics.executed_fallback_ops())
        gc.collect()
        gc.freeze()  # so that looking for tensors passes over what imports have made

    def debug(self, on: bool) -> None:
        """Whether programs say the Python line of each instruction."""
        self.lazy._set_ir_debug(on)

    def axes(self, mesh: Mesh, rank: int) -> Axes:
        """The axes of ``mesh`` as global ``rank`` sees them; this process is that rank now."""
        self.runtime._WORLD_SIZE, self.runtime._ORDINAL = mesh.world_size, rank
        return xla.axes(mesh, rank, self.device)

    def record(self) -> str:
        """The program that a step boundary would compile here; "" where nothing is pending.

        Afterwards all tensors are as if it had run.
        """
        roots = self.pending()
        text: str = self.lazy._get_xla_tensors_hlo(roots) if roots else ""
        self.settle()
        return text

    def pending(self) -> list[Tensor]:
        """The tensors that the device would have to compute now, oldest first."""
        found = [
            each
            for each in gc.get_objects()
            if issubclass(type(each), Tensor) and each.device.type == "xla"
        ]
        pending = [
            each for each in found if self.lazy._check_tensor_need_materialization([each])[0]
        ]
        return sorted(pending, key=self.lazy._xla_get_tensor_id)

    def settle(self) -> None:
        """Make placeholders of all tensors."""
        self.lazy._clear_pending_irs(str(self.device))
        self.lazy._set_all_reduce_token(str(self.device), None)

    def fallbacks(self) -> list[str]:
        """Operations that torch ran on the host, because torch-xla has no program for them."""
        return sorted(set(self.metrics.executed_fallback_ops()) - self._fallbacks)

    @contextmanager
    def no_reads(self) -> Iterator[None]:
        """HostRead where the block reads a device value."""

        def refuse(x: Tensor) -> Any:
            raise HostRead(_line())

        with ExitStack() as stack:
            for name in READS:
                stack.enter_context(_instead(name, refuse))
            yield

    @contextmanager
    def reads(self) -> Iterator[None]:
        """Copies to the host, between steps, are zeros; HostRead where one would compile."""

        def copy(x: Tensor) -> Tensor:
            if self.lazy._check_tensor_need_materialization([x])[0]:
                raise HostRead(_line())
            return torch.zeros(x.shape, dtype=x.dtype)

        with _instead("cpu", copy):
            yield


@contextmanager
def _instead(name: str, function: Callable[[Tensor], Any]) -> Iterator[None]:
    """``function`` in the place of a method of device tensors."""
    kept = getattr(Tensor, name)

    def method(x: Tensor, *args: Any, **options: Any) -> Any:
        return function(x) if x.device.type == "xla" else kept(x, *args, **options)

    setattr(Tensor, name, method)
    try:
        yield
    finally:
        setattr(Tensor, name, kept)


def _line() -> str:
    """The innermost line that is neither torch's nor this file's: "path:line"."""
    frame = sys._getframe()
    while frame.f_back and frame.f_code.co_filename.startswith((__file__, *torch.__path__)):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
