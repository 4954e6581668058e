"""Cross-entropy of a linear layer by the NKI kernels of this folder: inputs, limits, choice.

The kernels compute what ``op`` defines, without the logits.  Collectives between the forward and
the backward kernel are in ``llamax.parallel.cross_entropy``.  Nothing here depends on the rank, and
no shape on data: one program for all ranks.  The simulator executed the kernels; neuronx-cc has not
compiled them, and they have not run on Trainium.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llamax.config.constants import NKI_MULTIPLE as TILE
from llamax.config.constants import nki_loss_refusal
from llamax.config.hidden import HIDDEN
from llamax.kernels.attention.nki_op import available, launch


def statistics(x: Tensor, weight: Tensor, columns: Tensor, padding: Tensor | None) -> Tensor:
    """``op.statistics`` in float32: [T, D], [V, D], [T], [V] or None -> [3, T]."""
    inputs = [x.t().contiguous(), weight.contiguous(), _by_tiles(columns), *_spread(padding)]
    name = "cross_entropy_forward" + ("" if padding is None else "_padded")
    found: tuple[Tensor, ...] = launch("cross_entropy.nki_forward", name, *inputs)
    return torch.stack([each.t().flatten() for each in found])


def gradients(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    log_sums: Tensor,
    padding: Tensor | None,
    trains: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``op.gradients``, of the weight in float32: [T, D], [V, D] or None."""
    minus = torch.maximum(-log_sums, torch.full_like(log_sums, HIDDEN))
    inputs = [x.contiguous(), x.t().contiguous(), weight.contiguous()]
    inputs += [_by_tiles(columns), _by_tiles(minus), *_spread(padding)]
    name = "cross_entropy_backward" + ("" if trains else "_frozen")
    name += "" if padding is None else "_padded"
    found: Any = launch("cross_entropy.nki_backward", name, *inputs)
    return (found[0], found[1]) if trains else (found, None)


def supported(x: Tensor, weight: Tensor, labels: Tensor, *_: Tensor | None) -> bool:
    """Whether the kernels are available, accept these tensors and pay; logs once what is chosen."""
    if not available():
        return False
    why = nki_loss_refusal(labels.numel(), weight.shape[1])
    if {x.dtype, weight.dtype} != {torch.bfloat16}:
        why = f"the tensors are {x.dtype} and {weight.dtype}, not torch.bfloat16"
    log_choice(why)
    return not why


@cache
def log_choice(why: str) -> None:
    """Log once that the kernels run, or each reason why they do not."""
    logger = logging.getLogger("llamax")
    if why:
        logger.info("the loss runs by plain operations in place of llamax's NKI kernels: %s", why)
    else:
        logger.info("the loss runs by llamax's NKI kernels, which were tested in a simulator only")


def _by_tiles(x: Tensor) -> Tensor:
    """Token 128 t + p at [p, t], in float32: [T] -> [128, T / 128]."""
    return x.to(torch.float32).reshape(-1, TILE).t().contiguous()


def _spread(padding: Tensor | None) -> list[Tensor]:
    """What is added to the logits of each row, in every partition: [V] -> [128, V], if any."""
    if padding is None:
        return []
    return [(padding.to(torch.float32) * HIDDEN).expand(TILE, -1).contiguous()]
