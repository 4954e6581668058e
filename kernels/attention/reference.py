"""Causal attention in float64, one row at a time (Vaswani et al. 2017, equation 1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def attention(q: Array, k: Array, v: Array, documents: NDArray[np.integer] | None = None) -> Array:
    """Causal self-attention: [B, S, H, E], [B, T, K, E] twice, [B, T] or None -> [B, S, H, E].

    The queries are those of the last S of T tokens.
    """
    past = k.shape[1] - q.shape[1]
    out = np.empty_like(q)
    for b, s, h in np.ndindex(q.shape[:3]):
        head = h * k.shape[2] // q.shape[2]
        visible = np.arange(past + s + 1)
        if documents is not None:
            visible = visible[documents[b, visible] == documents[b, past + s]]
        out[b, s, h] = _weights(q[b, s, h], k[b, visible, head]) @ v[b, visible, head]
    return out


def attention_backward(
    dout: Array, q: Array, k: Array, v: Array, documents: NDArray[np.integer] | None = None
) -> tuple[Array, Array, Array]:
    """The gradients of q, k and v."""
    past = k.shape[1] - q.shape[1]
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    scale = q.shape[-1] ** -0.5
    for b, s, h in np.ndindex(q.shape[:3]):
        head = h * k.shape[2] // q.shape[2]
        visible = np.arange(past + s + 1)
        if documents is not None:
            visible = visible[documents[b, visible] == documents[b, past + s]]
        p = _weights(q[b, s, h], k[b, visible, head])
        dp = v[b, visible, head] @ dout[b, s, h]
        ds = p * (dp - p @ dp) * scale
        dq[b, s, h] = ds @ k[b, visible, head]
        dk[b, visible, head] += np.outer(ds, q[b, s, h])
        dv[b, visible, head] += np.outer(p, dout[b, s, h])
    return dq, dk, dv


def _weights(q: Array, keys: Array) -> Array:
    scores = keys @ q * q.shape[-1] ** -0.5
    exponentials = np.exp(scores - scores.max())
    weights: Array = exponentials / exponentials.sum()
    return weights
