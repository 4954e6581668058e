"""Checks of replicas: parameters that every tensor rank holds whole.

A replica stays the same on all ranks only if all of them update it by the same gradient.  Where it
acts on whole activations, each rank computes that gradient; where it acts on a share of the
sequence, of the heads or of the features, each rank computes a part, and the parts are summed.  A
module declares which with ``Replica(partial=...)``.  Without a declaration the optimizer sums with
sequence parallelism only, and ``ReplicaCheck`` compares the gradients of the first steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from llamax.config.choices import EAGER_BACKENDS
from llamax.parallel.collectives import Axes
from llamax.runtime.errors import ConfigError

# Relative distances between the gradients of tensor ranks.  Whole ones differ by rounding alone.
SAME, DIFFERENT = 1e-3, 0.05


class ReplicaCheck:
    """Checks, in the first step that has a gradient of it, how each replica's gradient arises.

    On devices that trace programs nothing is checked: values are unknown inside a step there.
    """

    def __init__(self, replicas: Mapping[str, Tensor], axes: Axes, summed: bool) -> None:
        self.axes, self.summed = axes, summed
        eager = axes.tp.rank_index.device.type in EAGER_BACKENDS
        self.pending = dict.fromkeys(replicas) if axes.tp.size > 1 and eager else {}

    def check(self, gradients_of: Callable[[Collection[str]], Mapping[str, Tensor]]) -> None:
        """Raise ConfigError on every rank of the stage if a gradient is not what its cut says."""
        if not self.pending:
            return
        found, tp = gradients_of(self.pending), self.axes.tp
        squares = torch.zeros(len(self.pending), 2, dtype=torch.float64)
        squares = squares.to(tp.rank_index.device)
        for row, name in enumerate(self.pending):
            if name in found:
                gradient = found[name].double()
                mean = tp.all_reduce(gradient) / tp.size
                squares[row, 0] = (gradient - mean).square().sum()
                squares[row, 1] = mean.square().sum()
        totals = tp.all_reduce(self.axes.data.all_reduce(squares)).tolist()
        for name, (apart, common) in zip(list(self.pending), totals, strict=True):
            if not apart + common > 0.0 or apart + common == float("inf"):
                continue  # no gradient yet, or one that is not finite
            distance = (apart / (apart + common)) ** 0.5
            if not self.summed and distance > DIFFERENT:
                raise ConfigError(
                    f"the gradient of {name} differs between tensor ranks, as that of a parameter "
                    "used on a share of heads or features does; give its module the attribute "
                    "shard = Replica(partial=True), so that the ranks' parts are summed"
                )
            if self.summed and distance < SAME:
                raise ConfigError(
                    f"the gradient of {name} is the same on every tensor rank, as that of a "
                    "parameter used on the whole sequence is; give its module the attribute "
                    "shard = Replica(partial=False), so that it is not summed"
                )
            del self.pending[name]


def check_equal(replicas: Mapping[str, Tensor], axes: Axes) -> None:
    """Raise ConfigError on every rank of a stage where a replica has other values on one of them.

    On devices that trace programs nothing is checked.
    """
    eager = axes.world.rank_index.device.type in EAGER_BACKENDS
    if axes.world.size == 1 or not eager or not replicas:
        return
    values = [tensor.detach().double().flatten() for tensor in replicas.values()]
    marks = [
        torch.stack((x.sum(), (x * torch.arange(1.0, len(x) + 1).to(x)).sum())) for x in values
    ]
    all_marks = axes.data.all_gather(axes.tp.all_gather(torch.stack(marks)[None], 0), 0).cpu()
    for row, name in enumerate(replicas):
        if not all_marks[:, row].equal(all_marks[:1, row].expand(len(all_marks), 2)):
            raise ConfigError(
                f"{name} starts with other values on some ranks; give it the same on all: a "
                "constant, or numbers from llamax.model.initial_weights.generator(seed, name)"
            )
