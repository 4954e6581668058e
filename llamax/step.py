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
    """What an optimizer step found, 0-d on the device: mean loss in nats, norm, counted tokens."""

    loss: Tensor
    grad_norm: Tensor
    tokens: Tensor


def train_step(
    model: Llama,
    optimizer: Zero1,
    axes: Axes,
    microbatches: Iterable[Batch],
    nominal_tokens: int,
    lr: float,
    step: int,
) -> Step:
    """Accumulate this data rank's microbatches, then update once; ``step`` counts from 1.

    The loss is the mean over all counted tokens of the global batch, the same on every rank:
    microsteps sum ``loss / nominal_tokens``, and the optimizer scales gradients by nominal over
    counted tokens, which is 1 where no label is ignored.
    """
    device = axes.data.rank_index.device
    found = torch.zeros(2, device=device)
    for batch in microbatches:
        total, count = _loss(model, batch)
        (total / nominal_tokens).backward()
        found = found + torch.stack((total.detach(), count))
    total, count = axes.data.all_reduce(found)
    grad_norm = optimizer.step(
        torch.tensor(lr, device=device),
        torch.tensor(float(step), device=device),
        nominal_tokens / count,
    )
    return Step(total / count, grad_norm, count)


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


def _loss(model: Llama, batch: Batch) -> tuple[Tensor, Tensor]:
    device = model.tp.rank_index.device
    ids, labels, positions = (part.to(device, non_blocking=True) for part in batch[:3])
    documents = None if batch.documents is None else batch.documents.to(device, non_blocking=True)
    return model.loss(ids, labels, positions, documents_BS=documents)
