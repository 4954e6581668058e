"""The operations of a Llama: each has a reference in plain torch and a table of faster kernels.

Nothing else imports ``kernels/``: a model calls these functions, and ``TABLE`` chooses the kernel.
Its rows (name, supported, kernel) are tried from the top, the reference last.  A kernel is a
function here, or "module:function" below ``llamax.kernels``, imported when it is first chosen, so
that a machine imports only what it can run.

Letters of shapes as in ``model/llama.py``: B batch, S sequence, D hidden, H query heads, K
key/value heads, E head dim, F feed-forward; T is the length of a key/value cache.  Tensors may be
bf16 or fp16; sums and products in an operation are fp32, and the result has the input's dtype.
Sources: RMSNorm, Zhang and Sennrich 2019; rotary embedding, Su et al. 2021, section 3.4; SwiGLU,
Shazeer 2020; grouped-query attention, Ainslie et al. 2023.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llamax.config.constants import ATTENTION_LENGTHS

FUSED = "attention.fused:attention"
IGNORE_INDEX = -100  # the label of a position without loss, as in torch


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``: [..., in], [out, in] -> [..., out]."""
    return kernel("linear", x, weight)(x, weight)


def matmul_grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient of ``linear`` with respect to x: [..., out], [out, in] -> [..., in]."""
    return kernel("matmul_grad_input", dy, weight)(dy, weight)


def matmul_grad_weight(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``linear`` with respect to its weight: [..., out], [..., in] -> [out, in].

    Where a product of 16-bit tensors is computed in fp32 it stays so, for the sum of microsteps.
    """
    return kernel("matmul_grad_weight", dy, x)(dy, x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)``: [..., D], [D] -> [..., D]."""
    return kernel("rms_norm", x, weight)(x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the half-split rotary embedding: [B, S, H, E], 2 x [B or 1, S, E] -> [B, S, H, E]."""
    return kernel("rotate", x, cos, sin)(x, cos, sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the two halves of the last dim: [..., 2F] -> [..., F]."""
    return kernel("swiglu", gate_up)(gate_up)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Causal self-attention: [B, S, H, E], 2 x [B, T, K, E], [B, T] or None -> [B, S, H, E].

    The queries are those of the last S of T tokens.  Query head h reads key/value head
    ``h * K // H``.  With ``documents`` (integers), a token attends only to itself and to earlier
    tokens with the same number.
    """
    return kernel("attention", q, k, v, documents)(q, k, v, documents)


def rotated_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, documents: Tensor | None = None
) -> Tensor:
    """``attention`` after ``rotate``: [B, S, (H + 2K) E], 2 x [B or 1, S, E] -> [B, S, H E].

    ``qkv`` has the ``heads`` query heads of a fused projection, then its key and its value heads.
    """
    return kernel("rotated_attention", qkv, cos, documents)(qkv, cos, sin, heads, documents)


def attention_by_blocks(q: Tensor, kv: Tensor, documents: Tensor | None, ranks: Any) -> Tensor:
    """Attention of a rank to the tokens of n that share sequences: ``kernels/attention/blocks``."""
    return kernel("attention_by_blocks", q, kv, documents, ranks)(q, kv, documents, ranks)


def attention_cached(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention to a cache: [B, S, H, E], 2 x [B, T, K, E], bool [B, S, T] -> [B, S, H, E].

    A query attends to the keys at which ``mask`` is true, at least one; on a CPU to all if None.
    """
    return kernel("attention_cached", q, k, v, mask)(q, k, v, mask)


def cache_places(positions: Tensor, cache: Tensor) -> Tensor:
    """Where ``write_cache`` puts the tokens at ``positions``: integers [B, 1], [B, K, T, E]."""
    return kernel("cache_places", cache)(positions, cache)


def write_cache(cache: Tensor, places: Tensor, new: Tensor) -> None:
    """Write a token of each sequence at its ``cache_places``: [B, K, T, E], places, [B, K, E]."""
    kernel("write_cache", cache)(cache, places, new)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """The rows ``ids`` of the weight: integers [...], [V, D] -> [..., D]."""
    return kernel("embedding", weight)(ids, weight)


def at_columns(x: Tensor, column: Tensor) -> Tensor:
    """Element ``column[t]`` of every row t: [T, V], integers [T] -> [T]."""
    return kernel("at_columns", x)(x, column)


def add_at_columns(x: Tensor, column: Tensor, amount: Tensor) -> Tensor:
    """Add ``amount[t]`` in place to element ``column[t]`` of every row t: [T, V], [T], [T]."""
    return kernel("add_at_columns", x)(x, column, amount)


def at_places(x: Tensor, place: Tensor) -> Tensor:
    """One place of each sequence: [B, S, D], integers [B] -> [B, 1, D]."""
    size, step = x.shape[:2].numel(), x.shape[1]
    first = torch.arange(0, size, step, dtype=place.dtype, device=place.device)
    return embedding(first + place, x.flatten(0, 1))[:, None]


# --- references ----------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def reference_grad_weight(dy: Tensor, x: Tensor) -> Tensor:
    return dy.flatten(0, -2).t() @ x.flatten(0, -2)


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)  # only once, because the backward pass keeps it
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y: Tensor = weight * (wide * scale).to(x.dtype)
    return y


def reference_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = _wide(x).chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos[:, :, None] + turned * sin[:, :, None]).to(x.dtype)


def reference_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    return reference_attention_cached(q, k, v, _causal_mask(q, k, documents))


def reference_rotated_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, documents: Tensor | None
) -> Tensor:
    rows = qkv.unflatten(-1, (-1, cos.shape[-1]))
    keys = (rows.shape[2] - heads) // 2
    # Not ``split``: torch-xla's mixes rows where functionalization is off, as torch-neuronx has it.
    qk, v = rows.tensor_split((heads + keys,), dim=2)
    q, k = rotate(qk, cos, sin).tensor_split((heads,), dim=2)
    return attention(q, k, v, documents).flatten(-2)


def reference_attention_cached(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    group = q.shape[2] // k.shape[2]
    q_BHSE = _wide(q).transpose(1, 2) / math.sqrt(q.shape[-1])
    k_BHTE = _wide(k).transpose(1, 2).repeat_interleave(group, dim=1)
    v_BHTE = _wide(v).transpose(1, 2).repeat_interleave(group, dim=1)
    hidden = q.new_zeros((), dtype=torch.bool) if mask is None else ~mask[:, None]
    scores_BHST = (q_BHSE @ k_BHTE.mT).masked_fill(hidden, -math.inf)
    return (scores_BHST.softmax(-1) @ v_BHTE).transpose(1, 2).to(q.dtype)


def _causal_mask(q: Tensor, k: Tensor, documents: Tensor | None) -> Tensor:
    past = k.shape[1] - q.shape[1]
    position = torch.arange(k.shape[1], dtype=torch.int32, device=q.device)
    mask_BST = (position[past:, None] >= position)[None]
    if documents is not None:
        mask_BST = mask_BST & (documents[:, past:, None] == documents[:, None, :])
    return mask_BST


def reference_at_columns(x: Tensor, column: Tensor) -> Tensor:
    return x.gather(1, column.long().unsqueeze(1)).squeeze(1)


def reference_add_at_columns(x: Tensor, column: Tensor, amount: Tensor) -> Tensor:
    return x.scatter_add_(1, column.long().unsqueeze(1), amount.unsqueeze(1))


# --- XLA: comparisons in place of gathers and scatters, which XLA does not fuse with neighbours; no
# --- Python numbers in comparisons and torch.where, because torch-xla makes these 64 bits


def traced_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Any:
    return load("attention.traced:attention_cached")(q, k, v, _causal_mask(q, k, documents))


def _onehot(x: Tensor, column: Tensor) -> Tensor:
    return column.unsqueeze(1) == torch.arange(x.shape[1], dtype=column.dtype, device=x.device)


def compared_at_columns(x: Tensor, column: Tensor) -> Tensor:
    return torch.where(_onehot(x, column), x, torch.zeros_like(x)).sum(1)


def compared_add_at_columns(x: Tensor, column: Tensor, amount: Tensor) -> Tensor:
    return x.add_(torch.where(_onehot(x, column), amount.unsqueeze(1), torch.zeros_like(x)))


def selected_embedding(ids: Tensor, weight: Tensor) -> Tensor:
    rows: Tensor = weight.index_select(0, ids.flatten()).unflatten(0, ids.shape)
    return rows


# --- torch's own fused attention -----------------------------------------------------------------


def fused_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    mask, lengths = None, (q.shape[1], k.shape[1])
    if documents is not None:
        mask = _causal_mask(q, k, documents)
    elif lengths[0] != lengths[1]:  # imported here: that takes as long as importing torch
        mask = import_module("torch.nn.attention.bias").causal_lower_right(*lengths)
    y: Tensor = load(FUSED)(q, k, v, mask)
    return y


# --- the table -----------------------------------------------------------------------------------


class Row(NamedTuple):
    """A kernel; ``supported`` takes the operation's tensors, or None for those left out."""

    name: str
    supported: Callable[..., bool]
    kernel: Callable[..., Tensor] | str


def _anywhere(*_: Tensor | None) -> bool:
    return True


def _on(device: str) -> Callable[..., bool]:
    return lambda x, *_: bool(x.device.type == device)


_on_cpu, _on_cuda, _on_xla = map(_on, ("cpu", "cuda", "xla"))


def _cpu_without_units(x: Tensor, *_: Tensor | None) -> bool:
    slow = not has_bf16_units() if x.dtype == torch.bfloat16 else x.dtype == torch.float16
    return _on_cpu(x) and slow


def _neuron(path: str) -> Callable[..., bool]:
    return lambda x, *others: x.device.type == "xla" and bool(load(path)(x, *others))


def _fused_attention_is_faster(q: Tensor, k: Tensor, _v: Tensor, documents: Tensor | None) -> bool:
    suits = q.dtype == torch.float32 and q.shape[1] == k.shape[1] not in ATTENTION_LENGTHS
    return _on_cuda(q) or (_on_cpu(q) and suits and documents is None)


def _cpu_with_units(x: Tensor) -> bool:
    return _on_cpu(x) and not _cpu_without_units(x)


@cache
def load(path: str) -> Callable[..., Any]:
    """The function at "module:function" below ``llamax.kernels``."""
    module, _, function = path.partition(":")
    loaded: Callable[..., Any] = getattr(import_module(f"llamax.kernels.{module}"), function)
    return loaded


TABLE: dict[str, tuple[Row, ...]] = {
    "linear": (
        Row("fp32", _cpu_without_units, "linear.op:linear"),
        Row("reference", _anywhere, F.linear),
    ),
    "matmul_grad_input": (
        Row("fp32", _cpu_without_units, "linear.op:grad_input"),
        Row("reference", _anywhere, torch.matmul),
    ),
    "matmul_grad_weight": (
        Row("fp32", _cpu_without_units, "linear.op:grad_weight"),
        Row("reference", _anywhere, reference_grad_weight),
    ),
    "rms_norm": (
        Row("cpu", _on_cpu, "rms_norm.op:rms_norm"),
        Row("reference", _anywhere, reference_rms_norm),
    ),
    "rotate": (
        Row("cpu", _on_cpu, "rope.op:rotate"),
        Row("reference", _anywhere, reference_rotate),
    ),
    "swiglu": (
        Row("cpu", _on_cpu, "swiglu.op:swiglu"),
        Row("reference", _anywhere, reference_swiglu),
    ),
    "attention": (
        Row("fused", _fused_attention_is_faster, fused_attention),
        Row("cpu", _on_cpu, "attention.op:attention"),
        Row("nki", _neuron("attention.nki_op:supported"), "attention.nki_op:attention"),
        Row("nxd", _neuron("attention.nki_kernel:supported"), "attention.nki_kernel:attention"),
        Row("traced", _on_xla, traced_attention),
        Row("reference", _anywhere, reference_attention),
    ),
    "rotated_attention": (
        Row("nki", _neuron("attention.nki_op:rotates"), "attention.nki_op:rotated_attention"),
        Row("reference", _anywhere, reference_rotated_attention),
    ),
    "attention_by_blocks": (
        Row("nki", _neuron("attention.nki_kernel:takes_blocks"), "attention.nki_kernel:by_blocks"),
        Row("traced", _on_xla, "attention.blocks:attention"),
        Row("reference", _anywhere, "attention.blocks:attention_by_runs"),
    ),
    "logit_statistics": (  # and logit_gradients: called by parallel/cross_entropy.py
        Row("nki", _neuron("cross_entropy.nki_op:supported"), "cross_entropy.nki_op:statistics"),
        Row("reference", _anywhere, "cross_entropy.op:statistics"),
    ),
    "logit_gradients": (
        Row("nki", _neuron("cross_entropy.nki_op:supported"), "cross_entropy.nki_op:gradients"),
        Row("reference", _anywhere, "cross_entropy.op:gradients"),
    ),
    "embedding": (
        Row("selected", _on_xla, selected_embedding),
        Row("reference", _anywhere, F.embedding),
    ),
    "at_columns": (
        Row("compared", _on_xla, compared_at_columns),
        Row("reference", _anywhere, reference_at_columns),
    ),
    "add_at_columns": (
        Row("compared", _on_xla, compared_add_at_columns),
        Row("reference", _anywhere, reference_add_at_columns),
    ),
    "attention_cached": (
        Row("cpu", lambda q, *_: q.shape[1] == 1 and _cpu_with_units(q), "attention.op:one_query"),
        Row("fused", lambda q, *_: _on_cuda(q) or _cpu_with_units(q), FUSED),
        Row("traced", _on_xla, "attention.traced:attention_cached"),
        Row("reference", _anywhere, reference_attention_cached),
    ),
    "cache_places": (
        Row("compared", _on_xla, "attention.cache:compared_places"),
        Row("reference", _anywhere, "attention.cache:places"),
    ),
    "write_cache": (
        Row("compared", _on_xla, "attention.cache:compared_write"),
        Row("reference", _anywhere, "attention.cache:write"),
    ),
}


def kernel(operation: str, *arguments: Any) -> Callable[..., Tensor]:
    """The first kernel of ``TABLE[operation]`` that supports these tensors."""
    row = _row(operation, *arguments)
    return load(row.kernel) if isinstance(row.kernel, str) else row.kernel


def has_kernel(operation: str, *arguments: Any) -> bool:
    """Whether another kernel than the reference supports these tensors."""
    return _row(operation, *arguments).name != "reference"


def _row(operation: str, *arguments: Any) -> Row:
    return next(row for row in TABLE[operation] if row.supported(*arguments))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are computed: fp32 on a CPU without units for its own."""
    return torch.float32 if _cpu_without_units(x) else x.dtype


@cache
def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware, according to torch."""
    if platform.machine() in ("x86_64", "AMD64"):  # here oneDNN answers true for emulation too
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
