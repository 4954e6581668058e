"""Causal attention on a NeuronCore by the NKI flash kernel that neuronx-distributed brings.

::

    q [B, S, H, E] ---------------------> [B, H, E, S] -+
    k [B, S, K, E] -> each head G times -> [B, H, E, S] -+-> nki_flash_attn_func -> [B, H, S, E]
    v [B, S, K, E] -> each head G times -> [B, H, E, S] -+        -> [B, S, H, E]

The kernel is causal, knows no documents, takes sequences in multiples of 2048 and heads of at most
128, and differentiates itself; the copies of a key/value head sum their gradients in ``expand``.

Never executed on Trainium by this project: what is tested is this adapter, against a stand-in with
the documented signature.
Source: neuronx_distributed 0.17, ``kernels/flash_attn.py`` (whose docstring gives other layouts
than its code) and its Llama example.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from torch import Tensor

MULTIPLE, MOST_WIDTH = 2048, 128


def supported(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> bool:
    """Whether the kernel is here and takes these shapes; where only shapes speak against it, says
    so once."""
    if not available():
        return False
    if why := refusal(q.shape[1], q.shape[3], documents is not None):
        tell(why)
        return False
    return True


def refusal(length: int, width: int, documents: bool) -> str:
    """Why the kernel does not take such sequences, or nothing."""
    if length % MULTIPLE:
        return f"the sequence of {length} is not a multiple of {MULTIPLE}"
    if width > MOST_WIDTH:
        return f"head_dim={width} is over {MOST_WIDTH}"
    if documents:
        return "documents are kept apart (data.separate_documents)"
    return ""


@cache
def tell(why: str) -> None:
    logging.getLogger("llamax").warning(
        "attention runs without the NKI flash kernel: %s; the plain one is slower and needs memory "
        "for every pair of tokens",
        why,
    )


@cache
def available() -> bool:
    """Whether this process computes on NeuronCores and has neuronx-distributed."""
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
    """[B, S, K, E] -> [B, S, K * group, E], every head followed by its copies."""
    batch, length, heads, width = x.shape
    return x[:, :, :, None].expand(batch, length, heads, group, width).flatten(2, 3)


def _last(x: Tensor) -> Tensor:
    """[B, S, H, E] -> [B, H, E, S]."""
    return x.permute(0, 2, 3, 1)
