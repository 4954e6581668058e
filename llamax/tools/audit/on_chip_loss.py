"""A stand-in for the kernels of the loss of a NeuronCore: their tensors without their arithmetic.

A trace with it has what ``llamax.parallel.cross_entropy`` holds around the kernels, and what they
take from HBM (kernels/cross_entropy/nki_op.py): no logits, the input turned.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llamax.backends.tracing import opaque
from llamax.config.constants import nki_loss_refusal
from llamax.config.schema import Config
from llamax.tools.plan.nki_loss import kernels_fit


def accepts(x: Tensor, weight: Tensor, labels: Tensor) -> bool:
    """Whether a NeuronCore's kernels accept these tensors: [.., D], [v, D], [..]."""
    narrow = x.dtype == weight.dtype == torch.bfloat16
    return narrow and not nki_loss_refusal(labels.numel(), weight.shape[1])


def notes(config: Config) -> Iterator[str]:
    """A note where a NeuronCore's kernels compute the loss of this run."""
    if kernels_fit(config):
        yield (
            "the loss is traced as plain operations; on NeuronCores llamax's NKI kernels replace "
            "them, with two collectives in all and no logits in memory"
        )


def statistics(x: Tensor, weight: Tensor, columns: Tensor, padding: Tensor | None) -> Tensor:
    """The shapes of ``logit_statistics``: [T, D], [v, D], [T], [v] or None -> [3, T]."""
    inputs = [x.t().contiguous(), weight, columns, *([] if padding is None else [padding])]
    (found,) = opaque("loss", inputs, [(3, x.shape[0])], [torch.float32])
    return found


def gradients(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    log_sums: Tensor,
    padding: Tensor | None,
    trains: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The shapes of ``logit_gradients``: [T, D] and [v, D] or None."""
    inputs = [x, x.t().contiguous(), weight, columns, log_sums]
    inputs += [] if padding is None else [padding]
    shapes = [tuple(x.shape), tuple(weight.shape)][: 1 + trains]
    found = opaque("loss", inputs, shapes, [x.dtype, torch.float32][: 1 + trains])
    return found[0], found[1] if trains else None
