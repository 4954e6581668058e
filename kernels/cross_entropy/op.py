"""Cross-entropy of a linear layer over some rows of a vocabulary, by plain operations.

The logits of all tokens exist at once: for tests, and to define what the kernels compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llamax.config.hidden import HIDDEN


def statistics(x: Tensor, weight: Tensor, columns: Tensor, padding: Tensor | None) -> Tensor:
    """Largest logit, sum of exp(logit - largest), the label's logit: [T, D], [V, D] -> [3, T].

    ``columns`` [T] are the labels as rows of the weight, -1 where a label is not among them, whose
    logit is given as 0.  ``padding`` [V] is true at rows beyond the vocabulary.  At least fp32.
    """
    logits = _logits(x, weight, padding)
    top = logits.amax(1)
    total = (logits - top[:, None]).exp().sum(1)
    at_label = logits.gather(1, columns.clamp(min=0).long()[:, None])[:, 0]
    return torch.stack((top, total, at_label.where(columns >= 0, torch.zeros_like(top))))


def gradients(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    log_sums: Tensor,
    padding: Tensor | None,
    trains: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x, in its dtype, and of the weight (unless not ``trains``), at least in fp32.

    Of the sum of log-sum-exp - label's logit; ``log_sums`` [T] are over the whole vocabulary,
    ``-HIDDEN`` or inf for a token without loss.
    """
    dlogits = (_logits(x, weight, padding) - log_sums[:, None]).exp()
    here = (columns >= 0).to(dlogits.dtype)
    dlogits.scatter_add_(1, columns.clamp(min=0).long()[:, None], -here[:, None])
    dx = (dlogits @ weight.to(dlogits.dtype)).to(x.dtype)
    return dx, dlogits.T @ x.to(dlogits.dtype) if trains else None


def _logits(x: Tensor, weight: Tensor, padding: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(wide) @ weight.to(wide).T
    return logits if padding is None else logits.masked_fill(padding, HIDDEN)
