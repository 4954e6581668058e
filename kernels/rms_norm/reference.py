"""RMSNorm in float64 (Zhang and Sennrich 2019, equation 4)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """``weight * x / sqrt(mean(x^2) + eps)``: [..., D], [D] -> [..., D]."""
    y: Array = weight * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    return y


def rms_norm_backward(dy: Array, x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """The gradients of x and weight."""
    scale = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    unit = x * scale
    g = dy * weight
    dx = scale * (g - unit * np.mean(g * unit, axis=-1, keepdims=True))
    return dx, (dy * unit).reshape(-1, x.shape[-1]).sum(axis=0)
