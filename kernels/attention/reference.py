"""Causal attention in float64, one row at a time (Vaswani et al. 2017, equation 1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def attention(q: Array, k: Array, v: Array, documents: NDArray[np.integer] | None = None) -> Array:
    """[B, S, H, E], [B, S, K, E] twice, [B, S] or None -> [B, S, H, E]."""
    out = np.empty_like(q)
    for b, s, h in np.ndindex(q.shape[:3]):
        head = h * k.shape[2] // q.shape[2]
        seen = np.arange(s + 1)
        if documents is not None:
            seen = seen[documents[b, seen] == documents[b, s]]
        out[b, s, h] = _weights(q[b, s, h], k[b, seen, head]) @ v[b, seen, head]
    return out


def attention_backward(
    dout: Array, q: Array, k: Array, v: Array, documents: NDArray[np.integer] | None = None
) -> tuple[Array, Array, Array]:
    """The gradients by q, k and v."""
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    scale = q.shape[-1] ** -0.5
    for b, s, h in np.ndindex(q.shape[:3]):
        head = h * k.shape[2] // q.shape[2]
        seen = np.arange(s + 1)
        if documents is not None:
            seen = seen[documents[b, seen] == documents[b, s]]
        p = _weights(q[b, s, h], k[b, seen, head])
        dp = v[b, seen, head] @ dout[b, s, h]
        ds = p * (dp - p @ dp) * scale
        dq[b, s, h] = ds @ k[b, seen, head]
        dk[b, seen, head] += np.outer(ds, q[b, s, h])
        dv[b, seen, head] += np.outer(p, dout[b, s, h])
    return dq, dk, dv


def _weights(q: Array, keys: Array) -> Array:
    scores = keys @ q * q.shape[-1] ** -0.5
    exponentials = np.exp(scores - scores.max())
    weights: Array = exponentials / exponentials.sum()
    return weights
