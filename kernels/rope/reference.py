"""Rotary embedding in float64, as a product of complex numbers (Su et al. 2021, section 3.4.1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rotate(x: Array, angles: Array) -> Array:
    """Rotary embedding: [B, S, H, E], [B, S, E / 2] -> [B, S, H, E].

    The gradient of x is ``rotate(dy, -angles)``.
    """
    first, second = np.split(x, 2, axis=-1)
    rotated = (first + 1j * second) * np.exp(1j * angles)[:, :, None]
    return np.concatenate((rotated.real, rotated.imag), axis=-1)
