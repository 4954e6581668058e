"""Causal attention on a NeuronCore by the NKI flash kernel of neuronx-distributed.

::

    q [B, S, H, E] ---------------------> [B, H, E, S] -+
    k [B, S, K, E] -> each head G times -> [B, H, E, S] -+-> nki_flash_attn_func -> [B, H, S, E]
    v [B, S, K, E] -> each head G times -> [B, H, E, S] -+        -> [B, S, H, E]

The kernel is causal, does not separate documents, accepts sequence lengths that are multiples of
2048 and head dims up to 128, and has a backward; autograd sums the gradients of the copies of a
key/value head (``expand``).

Ranks that share a sequence (``blocks.py``) need kernels that return log-sum-exps and take all pairs
of a block: ``flash_fwd`` and ``flash_attn_bwd`` of the compiler, on which the one above is built.

This project has not executed the kernels on Trainium.  The tests run this adapter against stand-ins
with the documented signatures.
Source: neuronx_distributed 0.17, ``kernels/flash_attn.py`` (its docstring gives other layouts than
its code) and its Llama example; neuronxcc 2.x, ``nki.kernels.attention`` (public as
aws-neuron/nki-samples, ``reference/attention.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from llamax.config.constants import flash_refusal
from llamax.kernels.attention import blocks
from llamax.kernels.attention.ways import Ranks

LSE_ROWS = 128  # partitions of a NeuronCore


def supported(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> bool:
    """Whether the kernel is available and accepts these inputs; warns once why it does not."""
    if not available():
        return False
    why = flash_refusal(q.shape[1], q.shape[3], documents is not None)
    if q.shape[1] != k.shape[1]:
        why = "there are fewer queries than keys"
    if why:
        warn(why)
    return not why


@cache
def warn(why: str) -> None:
    """Log the warning once for each reason."""
    logging.getLogger("llamax").warning(
        "attention runs without the NKI flash kernel, because %s; plain attention is slower and "
        "needs memory for every pair of tokens",
        why,
    )


@cache
def available() -> bool:
    """Whether this process runs on NeuronCores and neuronx-distributed is installed."""
    if find_spec("neuronx_distributed") is None:
        return False
    runtime = import_module("torch_xla.runtime")
    return bool(runtime.device_type() == "NEURON")


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Causal self-attention: [B, S, H, E], [B, S, K, E] twice, None -> [B, S, H, E]."""
    flash: Callable[..., Tensor] = import_module(
        "neuronx_distributed.kernels.flash_attn"
    ).nki_flash_attn_func
    group = q.shape[2] // k.shape[2]
    out_BHSE = flash(_last(q), _last(_repeat(k, group)), _last(_repeat(v, group)))
    return out_BHSE.transpose(1, 2)


def takes_blocks(q: Tensor, kv: Tensor, documents: Tensor | None, ranks: Ranks) -> bool:
    """Whether the kernel computes the blocks of ranks that share a sequence; warns why not."""
    if not available():
        return False
    length, context = q.shape[1] * ranks.size, ranks.size
    why = flash_refusal(length, q.shape[3], documents is not None, context)
    if why:
        warn(why)
    return not why


def by_blocks(q: Tensor, kv: Tensor, documents: Tensor | None, ranks: Ranks) -> Tensor:
    """Causal attention of one of n ranks that share a sequence: ``blocks.attention``."""
    return blocks.attention(q, kv, None, ranks, Block())


class Block:
    """A block by the two kernels of the compiler: a ``blocks.Kernel`` without documents.

    Backward is that of a whole row of blocks: its log-sum-exp and output are those of all keys.
    Log-sum-exps are [B, H, 128, h / 128], the query 128 t + p at [p, t].
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, numbers: blocks.Numbers | None
    ) -> tuple[Tensor, Tensor]:
        assert numbers is None
        flash = import_module("neuronxcc.nki.kernels.attention").flash_fwd
        k, v = (_copies(x, q) for x in (k, v))
        out, lse = flash[q.shape[:2]](q.mT, k.mT, v, None, **self._options(q, causal))
        return out, lse.transpose(2, 3).flatten(2).unsqueeze(-1)

    def backward(
        self, rows: blocks.Rows, k: Tensor, v: Tensor, causal: bool, numbers: blocks.Numbers | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert numbers is None
        q, heads = rows.q, k.shape[1]
        flash = import_module("neuronxcc.nki.kernels.attention").flash_attn_bwd
        lse = rows.lse.squeeze(-1).unflatten(2, (-1, LSE_ROWS)).transpose(2, 3)
        inputs = (q, _copies(k, q), _copies(v, q), rows.out, rows.dout)
        dq, dk, dv = flash[q.shape[:2]](
            *(x.mT for x in inputs), lse, None, **self._options(q, causal)
        )
        dk, dv = (x.mT.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))
        return dq.mT, dk, dv

    def _options(self, q: Tensor, causal: bool) -> dict[str, Any]:
        return {
            "use_causal_mask": causal,
            "mixed_precision": True,
            "dropout_p": 0.0,
            "softmax_scale": q.shape[-1] ** -0.5,
        }


def _copies(x: Tensor, q: Tensor) -> Tensor:
    """A key/value head for each query head: [B, K, h, E] -> [B, H, h, E]."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _repeat(x: Tensor, group: int) -> Tensor:
    """[B, S, K, E] -> [B, S, K * group, E]: each head followed by its copies."""
    batch, length, heads, width = x.shape
    return x[:, :, :, None].expand(batch, length, heads, group, width).flatten(2, 3)


def _last(x: Tensor) -> Tensor:
    """[B, S, H, E] -> [B, H, E, S]."""
    return x.permute(0, 2, 3, 1)
