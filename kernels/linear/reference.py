"""Matrix products in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def linear(x: Array, weight: Array) -> Array:
    """``x @ weight.T``: [..., in], [out, in] -> [..., out]."""
    y: Array = x @ weight.T
    return y


def grad_input(dy: Array, weight: Array) -> Array:
    """The gradient of the input: [..., out], [out, in] -> [..., in]."""
    return dy @ weight


def grad_weight(dy: Array, x: Array) -> Array:
    """The gradient of the weight: [..., out], [..., in] -> [out, in]."""
    dweight: Array = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return dweight
