"""Weights gathered one ahead, and gradients summed meanwhile: the same bits and bytes sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from support.metering import Meter, Metered
from support.models import TINY
from support.step_reference import build, share, training
from support.world import Worlds, axes
from torch import Tensor

from llamax.backends.torch_axes import GlooAxis, TorchAxis
from llamax.model.recompute import Recompute
from llamax.parallel.fsdp import fsdp_weights
from llamax.parallel.mesh import Mesh
from llamax.parallel.prefetch import Prefetch
from llamax.parallel.reductions import Reductions
from llamax.training import step as training_step


class Watched(Metered):
    """An axis that counts the gathers, and the sums, that are under way at the same time."""

    under_way = most = sums = most_sums = gathers_in_sums = 0

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        wait = super().start_all_gather(x)
        self.gathers_in_sums += self.sums
        self.under_way += 1
        self.most = max(self.most, self.under_way)

        def arrived() -> Tensor:
            self.under_way -= 1
            return wait()

        return arrived

    def start_reduce_scatter(self, x: Tensor) -> Callable[[], Tensor]:
        wait = super().start_reduce_scatter(x)
        self.sums += 1
        self.most_sums = max(self.most_sums, self.sums)

        def arrived() -> Tensor:
            self.sums -= 1
            return wait()

        return arrived


class AtOnce(Reductions):
    """Sums that end before backward goes on."""

    def add(self, total: Tensor, start: Callable[[], Callable[[], Tensor]]) -> None:
        total.add_(start()())


def trained(
    prefetches: bool,
    recompute: Recompute,
    overlaps: bool = True,
    kind: type[TorchAxis] = GlooAxis,
) -> dict[str, Any]:
    """On a rank: three steps of two microsteps with validations between them."""
    there = axes(Mesh(dp=2))
    data = there.data
    assert isinstance(data, TorchAxis)
    watched = Watched(kind(data.name, data.ranks, torch.device("cpu"), data.group), Meter())
    there = replace(there, data=watched)
    llama = build(TINY, there, False)
    llama.model.mode = recompute
    state = training(llama, there, zero=3)
    for weight in fsdp_weights(llama) if not overlaps else ():
        weight.reductions = AtOnce()
    losses, prefetch = [], Prefetch()
    with mock.patch.object(
        training_step, "prefetched", training_step.prefetched if prefetches else lambda _: prefetch
    ):
        for number in range(1, 4):
            losses.append(state.step(share(there, 2), number).loss.clone())
            losses.append(state.validate([share(there, 1)] * 2).clone())
    runs = [bucket.weights.clone() for group in state.optimizer.groups for bucket in group.buckets]
    return {
        "values": [*losses, *runs],
        "sent": dict(watched.meter.sent_bytes),
        "hits": state._prefetch.hits,
        "most": watched.most,
        "sums": (watched.most_sums, watched.sums),
        "gathers in sums": watched.gathers_in_sums,
    }


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_prefetched_weights_change_no_bit(worlds: Worlds, recompute: Recompute) -> None:
    world = worlds(2)
    plain, ahead = (world.run(trained, flag, recompute) for flag in (False, True))
    for one, other in zip(plain, ahead, strict=True):
        assert all(map(torch.equal, one["values"], other["values"]))
        assert one["sent"] == other["sent"]
        assert one["hits"] == 0
        assert other["hits"] > 100
        assert (one["most"], other["most"]) == (0, 1)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradients_are_summed_while_backward_goes_on(worlds: Worlds, recompute: Recompute) -> None:
    world = worlds(2)
    plain, meanwhile = (world.run(trained, True, recompute, flag) for flag in (False, True))
    for one, other in zip(plain, meanwhile, strict=True):
        assert all(map(torch.equal, one["values"], other["values"]))
        assert one["sent"] == other["sent"]
        assert one["sums"] == other["sums"] == (1, 0)
        assert one["gathers in sums"] == 0
        assert other["gathers in sums"] > 20


def test_the_verbs_of_gpus_train_the_same(worlds: Worlds) -> None:
    """They are torch.distributed's own, here over gloo in place of nccl."""
    ours, theirs = (
        worlds(2).run(trained, True, "none", True, kind) for kind in (GlooAxis, TorchAxis)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, one["values"], other["values"]))
        assert other["hits"] > 100
        assert other["gathers in sums"] > 20
