"""Cross-entropy of a linear layer in float64, over some rows of a vocabulary."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def statistics(x: Array, weight: Array, columns: NDArray[np.integer]) -> Array:
    """Largest logit, sum of exp(logit - largest) and the label's logit: [T, D], [V, D] -> [3, T].

    ``columns`` [T] are the labels as rows of the weight; -1 where a label is not among them, whose
    logit is given as 0.
    """
    logits = x @ weight.T
    top = logits.max(1)
    total = np.exp(logits - top[:, None]).sum(1)
    at_label = logits[np.arange(len(columns)), columns] * (columns >= 0)
    return np.stack((top, total, at_label))


def gradients(
    x: Array, weight: Array, columns: NDArray[np.integer], log_sums: Array
) -> tuple[Array, Array]:
    """Gradients of x and weight of the sum of log-sum-exp - label's logit: [T, D], [V, D].

    ``log_sums`` [T] are over the whole vocabulary, inf for a token without loss.
    """
    dlogits = np.exp(x @ weight.T - log_sums[:, None])
    here = np.flatnonzero(columns >= 0)
    dlogits[here, columns[here]] -= 1
    return dlogits @ weight, dlogits.T @ x
