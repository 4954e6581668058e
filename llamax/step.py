"""One optimizer step, and the loss over held-out batches: training without the run around it.

Nothing in here waits for the device, and no Python number that differs between ranks enters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from llamax.collectives import Axes
from llamax.data.loader import Batch, Loader
from llamax.model import Llama
from llamax.optim.zero1 import Zero1


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
) -> Step:
    """Accumulate this data rank's microbatches, then update once; ``step`` counts from 1.

    ``stop``: this rank's wish to stop; the sum over all ranks comes back.

    The loss is the mean over all counted tokens of the global batch, the same on every rank:
    microsteps sum ``loss / nominal_tokens``, and the optimizer scales gradients by nominal over
    counted tokens, which is 1 where no label is ignored.
    """
    device = axes.data.rank_index.device
    found = torch.zeros(2, device=device)
    for number, batch in enumerate(microbatches):
        total, count = _loss(model, batch, _keys(model, axes, batch, step, number))
        (total / nominal_tokens).backward()
        found = found + torch.stack((total.detach(), count))
    # Tensor ranks hold the same loss: the first one's counts. NaN on any rank is NaN in the sum.
    found = found * (axes.tp.rank_index == 0)
    wish = torch.tensor([float(stop)], device=device)
    total, count, stops = axes.world.all_reduce(torch.cat((found, wish)))
    grad_norm = optimizer.step(
        torch.tensor(lr, device=device),
        torch.tensor(float(step), device=device),
        nominal_tokens / count + (total - total),  # NaN, which cancels the update, or 0
    )
    return Step(total / count, grad_norm, count, stops)


@torch.no_grad()
def validation_loss(model: Llama, axes: Axes, loader: Loader, batches: int) -> Tensor:
    """Mean loss in nats over the counted tokens of the first ``batches`` global batches, 0-d."""
    found = torch.zeros(2, device=axes.data.rank_index.device)
    for microbatches, _ in zip(loader.epoch(), range(batches), strict=False):
        for batch in microbatches:
            found = found + torch.stack(_loss(model, batch))
    total, count = axes.data.all_reduce(found)
    mean: Tensor = total / count
    return mean


def _keys(model: Llama, axes: Axes, batch: Batch, step: int, number: int) -> Tensor | None:
    """What tells the samples of a step's microbatch apart, the same on every mesh."""
    if model.dropout is None:
        return None
    rows, data = batch.ids.shape[0], axes.data
    return model.dropout.keys(step, (number * data.size + data.rank) * rows, rows)


def _loss(model: Llama, batch: Batch, keys_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    device = model.tp.rank_index.device
    ids, labels, positions = (part.to(device, non_blocking=True) for part in batch[:3])
    documents = None if batch.documents is None else batch.documents.to(device, non_blocking=True)
    keys_B = None if keys_B is None else keys_B.to(device, non_blocking=True)
    return model.loss(ids, labels, positions, documents_BS=documents, keys_B=keys_B)
