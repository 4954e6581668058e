"""Causal attention on a NeuronCore by the NKI flash kernel of neuronx-distributed.

::

    q [B, S, H, E] ---------------------> [B, H, E, S] -+
    k [B, S, K, E] -> each head G times -> [B, H, E, S] -+-> nki_flash_attn_func -> [B, H, S, E]
    v [B, S, K, E] -> each head G times -> [B, H, E, S] -+        -> [B, S, H, E]

The kernel is causal, does not separate documents, accepts sequence lengths that are multiples of
2048 and head dims up to 128, and has a backward; autograd sums the gradients of the copies of a
key/value head (``expand``).

This project has not executed the kernel on Trainium.  The tests run this adapter against a stand-in
with the documented signature.
Source: neuronx_distributed 0.17, ``kernels/flash_attn.py`` (its docstring gives other layouts than
its code) and its Llama example.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from torch import Tensor

from llamax.config.constants import flash_refusal


def supported(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> bool:
    """Whether the kernel is available and accepts these inputs; warns once why it does not."""
    if not available():
        return False
    if why := flash_refusal(q.shape[1], q.shape[3], documents is not None):
        warn(why)
        return False
    return True


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


def _repeat(x: Tensor, group: int) -> Tensor:
    """[B, S, K, E] -> [B, S, K * group, E]: each head followed by its copies."""
    batch, length, heads, width = x.shape
    return x[:, :, :, None].expand(batch, length, heads, group, width).flatten(2, 3)


def _last(x: Tensor) -> Tensor:
    """[B, S, H, E] -> [B, H, E, S]."""
    return x.permute(0, 2, 3, 1)
