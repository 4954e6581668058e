"""Tensors cut over the data ranks, gathered when they are used and dropped after.

::

    data rank 0  [ run ] ──┐                      ┌──> dense weight, for one product
                           ├── gather when used ──┤
    data rank 1  [ run ] ──┘                      └──> its gradient ── reduce-scatter ──> [ run ]

``Spread`` is the cut: a flat tensor in runs of equal length, the last one padded.  The quantised
base of QLoRA keeps its bytes so.  ``SpreadWeight`` is a dense weight on top of it, frozen or with a
gradient (ZeRO-3, Rajbhandari et al. 2020, section 5.3; FSDP, Zhao et al. 2023).  It is gathered in
forward, and again wherever forward is recomputed in backward, so no rank keeps a whole weight.
"""

from __future__ import annotations

from math import ceil
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamax.parallel import regions
from llamax.parallel.collectives import Axis


class Store(Protocol):
    """A weight that has to be made before it can be used."""

    def weight(self) -> Tensor:
        """This tensor rank's share, dense, in the dtype of computation: [f, D]."""
        ...


class Spread:
    """A flat tensor cut over the data ranks, one run each; ``gather`` joins the runs."""

    def __init__(self, pieces: list[Tensor], data: Axis, device: torch.device) -> None:
        whole = torch.cat([piece.flatten() for piece in pieces])
        self.data, self.length = data, len(whole)
        run = ceil(self.length / data.size)
        kept = whole[data.rank * run : (data.rank + 1) * run]
        self.run = torch.nn.functional.pad(kept, (0, run - len(kept))).to(device)

    def gather(self) -> Tensor:
        return self.data.all_gather(self.run, 0)[: self.length]

    def reduce(self, whole: Tensor) -> Tensor:
        """This rank's run of the sum of ``whole`` [n] over the data ranks, in float32."""
        padding = self.data.size * len(self.run) - self.length
        return self.data.reduce_scatter(torch.nn.functional.pad(whole.float(), (0, padding)), 0)


class _Gather(torch.autograd.Function):
    """The whole weight of a run; backward sums its gradient over the data ranks at once."""

    @staticmethod
    def forward(ctx: Any, run: Tensor, store: SpreadWeight) -> Tensor:
        ctx.store = store
        return store.dense()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw: Tensor) -> tuple[None, None]:
        ctx.store.add_gradient(dw)
        return None, None


class SpreadWeight:
    """A weight of which each data rank keeps a run; a ``Store``.

    A ``trained`` one sums its gradient over the data ranks into ``gradient``, a float32 run.
    """

    def __init__(self, weight: Tensor, data: Axis, trained: bool) -> None:
        self.shape = weight.shape
        self.spread = Spread([weight.detach()], data, weight.device)
        self.gradient: Tensor | None = None
        if trained:
            self.gradient = torch.zeros(len(self.run), dtype=torch.float32, device=weight.device)
            self._leaf = self.run.detach().requires_grad_()  # the same memory

    @property
    def run(self) -> Tensor:
        """The elements that this rank keeps, with padding."""
        return self.spread.run

    def weight(self) -> Tensor:
        """The whole weight, gathered; its gradient arrives in ``gradient``."""
        if self.gradient is None:
            return self.dense()
        return regions.apply(_Gather, self._leaf, self)

    def dense(self) -> Tensor:
        """The whole weight, gathered, without a gradient."""
        return self.spread.gather().view(self.shape)

    def add_gradient(self, dw: Tensor) -> None:
        """Add this rank's run of the sum of all data ranks' ``dw``."""
        assert self.gradient is not None
        self.gradient.add_(self.spread.reduce(dw.reshape(-1)))
