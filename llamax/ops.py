"""Operations of a Llama: the reference in plain torch, and the fastest supported kernel by table.

Every public function looks its operation up in ``TABLES``: rows of (name, supported, load), tried
from the top, the reference last.  A row's ``load`` imports its kernel when it is first chosen, so
a machine never imports what it cannot run::

    rms_norm(x, weight, eps) -> TABLES["rms_norm"]:  cpu        if x lies on a CPU
                                                     reference  always

Shapes are spelled as in ``model.py``: B batch, S sequence, T keys, D hidden, H query heads,
K key/value heads, E head dim, F feed-forward.  Products and sums inside an operation are fp32 for
bf16 tensors; the result has the input's dtype.

Sources: RMSNorm, Zhang and Sennrich 2019; rotary embedding, Su et al. 2021, section 3.4;
SwiGLU, Shazeer 2020; grouped-query attention, Ainslie et al. 2023.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from llamax.config import RopeScaling


# --- the public operations -----------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``: [..., in], [out, in] -> [..., out]."""
    return F.linear(x, weight)


def matmul_grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient of ``linear`` by x: [..., out], [out, in] -> [..., in]."""
    return dy @ weight


def matmul_grad_weight(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``linear`` by its weight: [..., out], [..., in] -> [out, in]."""
    return dy.flatten(0, -2).t() @ x.flatten(0, -2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)``: [..., D], [D] -> [..., D]."""
    return reference_rms_norm(x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split: [B, S, H, E], [B or 1, S, E] twice -> [B, S, H, E]."""
    return reference_rotate(x, cos, sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the two halves of the last dim: [..., 2F] -> [..., F]."""
    return reference_swiglu(gate_up)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Causal self-attention: [B, S, H, E], [B, S, K, E] twice, [B, S] or None -> [B, S, H, E].

    Query head h reads key/value head ``h * K // H``.  With ``documents`` (integers, [B, S]) a token
    sees only earlier tokens of the same number.
    """
    return reference_attention(q, k, v, documents)


def attention_cached(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention to a cache: [B, S, H, E], [B, T, K, E] twice, bool [B, S, T] -> [B, S, H, E].

    A query sees the keys where ``mask`` is true, at least one.
    """
    return reference_masked_attention(q, k, v, mask)


# --- rotary tables -------------------------------------------------------------------------------


def inverse_frequencies(head_dim: int, rope_theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each pair, slowed for long contexts by ``scaling``: -> [E / 2] fp32.

    Llama-3 scaling keeps wavelengths shorter than ``original / high``, divides the frequencies of
    those longer than ``original / low`` by ``factor``, and blends between (Llama 3.1 model card).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope_theta**exponents
    if scaling is None:
        return frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rope_tables(positions: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, both halves alike: [B, S], [E / 2] -> [B, S, E] twice, fp32.

    Positions that are the same in every sequence may be given once, as [1, S].
    """
    angles = positions[..., None].float() * inverse_frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


# --- references ----------------------------------------------------------------------------------


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x_fp32 = x.float()
    scale = torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (x_fp32 * scale).to(x.dtype)


def reference_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos[:, :, None] + turned * sin[:, :, None]).to(x.dtype)


def reference_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    position = torch.arange(q.shape[1], device=q.device)
    mask = (position[:, None] >= position)[None]
    if documents is not None:
        mask = mask & (documents[:, :, None] == documents[:, None, :])
    return reference_masked_attention(q, k, v, mask)


def reference_masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    group = q.shape[2] // k.shape[2]
    q_BHSE = q.transpose(1, 2).float() * q.shape[-1] ** -0.5
    k_BHTE = k.transpose(1, 2).float().repeat_interleave(group, dim=1)
    v_BHTE = v.transpose(1, 2).float().repeat_interleave(group, dim=1)
    scores_BHST = (q_BHSE @ k_BHTE.mT).masked_fill(~mask[:, None], -math.inf)
    return (scores_BHST.softmax(-1) @ v_BHTE).transpose(1, 2).to(q.dtype)
