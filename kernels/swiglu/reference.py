"""SwiGLU in float64 (Shazeer 2020, equation 6, without the linear maps)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def swiglu(gate_up: Array) -> Array:
    """``silu(gate) * up`` of the two halves: [..., 2F] -> [..., F]."""
    gate, up = np.split(gate_up, 2, axis=-1)
    y: Array = gate / (1 + np.exp(-gate)) * up
    return y


def swiglu_backward(dy: Array, gate_up: Array) -> Array:
    """The gradient of the fused input."""
    gate, up = np.split(gate_up, 2, axis=-1)
    sigmoid = 1 / (1 + np.exp(-gate))
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    return np.concatenate((dy * up * slope, dy * gate * sigmoid), axis=-1)
