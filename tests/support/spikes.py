"""A run with spikes in chosen steps on one rank, and the same run without these steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llamax.backends.base import EAGER_DEVICE, Backend
from llamax.config.schema import OptimConfig
from llamax.model.llama import Llama
from llamax.optim.spikes import SpikeFilter
from llamax.optim.zero import Zero
from llamax.parallel.collectives import Axes
from llamax.training.step import TrainState
from support.models import TINY
from support.step_reference import GLOBAL_BATCH, SEQUENCE, build, share

OPTIM = OptimConfig(skip_spikes="both", spike_window=16, beta2=0.999, most_skipped=9)
STEPS, LOSSES, NORMS = 13, (9, 12), (11, 12)  # the steps with a spike, from half the window on
SPIKES = sorted({*LOSSES, *NORMS})


class Spiky:
    """Multiplies loss or gradient of a model, in the steps given, by a tensor of each step."""

    def __init__(self, model: Llama) -> None:
        self.loss, self.factor, self.gradient = model.loss, 1.0, 1.0
        model.loss = self  # type: ignore[assignment, method-assign]

    def __call__(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        total, count = self.loss(*args, **options)
        # With a dim, or a traced program would have the numbers in it.
        factors = torch.tensor([self.factor, self.gradient]).to(total.device)
        factor, gradient = factors.unbind()
        total.register_hook(lambda g: g * gradient)
        return total * factor, count


def train(
    own: Axes,
    zero: int,
    victim: int | None,
    wrong: int | None = None,
    backend: Backend | None = None,
) -> tuple[list[int], list[int], list[Tensor]]:
    """The run with spikes on the rank ``victim``; None: without the steps that have one.

    Returns the skipped steps, the steps that left weights and moments as they were, and weights,
    moments and window in the end.  The window of the rank ``wrong`` accepts everything.
    """
    model = build(TINY, own, False)
    spiky = Spiky(model)
    optimizer = Zero(
        model.sharded_parameters(),
        OPTIM,
        own,
        sequence_parallel=False,
        zero=zero,
        bucket_bytes=4096,
    )
    spikes = SpikeFilter(OPTIM)
    if backend is not None:
        optimizer.to(backend.device)
        spikes.to(backend.device)
    state = TrainState(
        model,
        optimizer,
        own,
        backend or EAGER_DEVICE,
        step_tokens=GLOBAL_BATCH * SEQUENCE,
        learning_rate=lambda number: 1e-3,
        spikes=spikes,
    )
    skipped, unchanged, done = [], [], 0
    for number in range(1, STEPS + 1):
        if victim is None and number in SPIKES:
            continue
        here, done = victim == own.world.rank, done + 1
        spiky.factor = 30.0 if here and number in LOSSES else 1.0
        spiky.gradient = 50.0 if here and number in NORMS else 1.0
        if wrong == own.world.rank and number == SPIKES[0]:
            spikes.window.zero_()
        before = [run.tensor.clone() for run in optimizer.owned()]
        if state.step(share(own, 1), done).result.skipped:
            skipped.append(number)
        if all(map(torch.equal, before, [run.tensor for run in optimizer.owned()])):
            unchanged.append(number)
    return skipped, unchanged, [*(run.tensor for run in optimizer.owned()), spikes.window.cpu()]
