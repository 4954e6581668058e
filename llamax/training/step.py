"""One optimizer step, and the loss over held-out batches: training without the run around it.

Nothing in here waits for the device, and no Python number that differs between ranks or steps
enters.  On a device that traces programs, ``boundary`` ends one: a step is as many runs of the same
program as it has microsteps, and one of the optimizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from llamax.data.loader import Batch, Batches
from llamax.model.llama import Llama
from llamax.optim.zero1 import Zero1
from llamax.parallel.collectives import Axes, Axis


def nothing() -> None:
    """The boundary of a device that runs each operation at once."""


@dataclass(frozen=True)
class Step:
    """What an optimizer step found, 0-d on the device and the same on every rank.

    Mean loss in nats, norm of the gradient, counted tokens, how many ranks wish to stop.
    Where loss or norm is not finite, the norm is not, and no rank has made an update.
    """

    loss: Tensor
    grad_norm: Tensor
    tokens: Tensor
    stop: Tensor


def train_step(
    model: Llama,
    optimizer: Zero1,
    axes: Axes,
    microbatches: Iterable[Batch],
    nominal_tokens: int,
    lr: float,
    step: int,
    stop: bool = False,
    boundary: Callable[[], None] = nothing,
) -> Step:
    """Accumulate this data rank's microbatches, then update once; ``step`` counts from 1.

    ``stop``: this rank's wish to stop; the sum over all ranks comes back.  ``boundary`` is called
    after each microstep and after the update.

    The loss is the mean over all counted tokens of the global batch, the same on every rank:
    microsteps sum ``loss / nominal_tokens``, and the optimizer scales gradients by nominal over
    counted tokens, which is 1 where no label is ignored.
    """
    device = axes.data.rank_index.device
    found = torch.zeros(2).to(device)  # sent, so that the first microstep is like the others
    for number, batch in enumerate(microbatches):
        total, count = _loss(model, batch, _keys(model, axes, batch, step, number))
        (total / nominal_tokens).backward()
        found = found + torch.stack((total.detach(), count))
        boundary()
    # Tensor ranks hold the same loss: the first one's counts. NaN on any rank is NaN in the sum.
    found = _of_first(axes.tp, found)
    lr_now, step_now, wish = torch.tensor([lr, float(step), float(stop)]).to(device).split(1)
    total, count, stops = axes.world.all_reduce(torch.cat((found, wish)))
    grad_norm = optimizer.step(
        lr_now.squeeze(0),
        step_now.squeeze(0),
        nominal_tokens / count + (total - total),  # NaN, which cancels the update, or 0
    )
    result = Step(total / count, grad_norm, count, stops)
    boundary()
    return result


@torch.no_grad()
def validation_loss(
    model: Llama,
    axes: Axes,
    loader: Batches,
    batches: int,
    boundary: Callable[[], None] = nothing,
) -> Tensor:
    """Mean loss in nats over the counted tokens of the first ``batches`` global batches, 0-d.

    The same on every rank.  ``boundary`` is called after each microbatch.
    """
    found = torch.zeros(2).to(axes.data.rank_index.device)
    for microbatches, _ in zip(loader.epoch(), range(batches), strict=False):
        for batch in microbatches:
            found = found + torch.stack(_loss(model, batch))
            total, count = axes.world.all_reduce(_of_first(axes.tp, found))
            mean: Tensor = total / count  # of all so far, so that every batch runs one program
            boundary()
    return mean


def _of_first(axis: Axis, x: Tensor) -> Tensor:
    """x on the axis's first rank, zeros elsewhere."""
    return x * (axis.rank_index == torch.zeros_like(axis.rank_index))


def _keys(model: Llama, axes: Axes, batch: Batch, step: int, number: int) -> Tensor | None:
    """What tells the samples of a step's microbatch apart, the same on every mesh."""
    if model.dropout is None:
        return None
    rows, data = batch.ids.shape[0], axes.data
    return model.dropout.keys(step, (number * data.size + data.rank) * rows, rows)


def _loss(model: Llama, batch: Batch, keys_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    device = model.tp.rank_index.device
    ids, labels, positions = (part.int().to(device, non_blocking=True) for part in batch[:3])
    documents = None if batch.documents is None else batch.documents.to(device, non_blocking=True)
    keys_B = None if keys_B is None else keys_B.to(device, non_blocking=True)
    return model.loss(ids, labels, positions, documents_BS=documents, keys_B=keys_B)
