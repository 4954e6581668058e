"""Attention by the NKI kernels of this folder, with gradients.

What the kernels take beside q, k and v is computed by plain operations of the graph:

* layouts: heads before tokens, and transposes for the matrix products;
* ``centres``: the exponent of a block of queries, between bounds of all its scores.  A score is at
  most ``|q| max|k|``, and the largest of a query is at least the one with its own key.  Where the
  bounds of a block are within ``SPREAD``, the largest exp(score - middle) of every row is a number
  that float32 holds, and sums neither overflow nor vanish.  Elsewhere the kernel computes the block
  again with running maxima, which takes longer;
* ``block_kinds``: which blocks of queries and keys share documents, from the smallest and largest
  number in each.

Nothing depends on the rank, and no shape on data: one program for all.  The simulator executed the
kernels; neuronx-cc has not compiled them, and they have not run on Trainium.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llamax.config.constants import NKI_MULTIPLE as TILE
from llamax.config.constants import nki_refusal
from llamax.config.neuron_sdk import begins, trn1_sdk

BLOCK = 512  # tokens: the columns of a PSUM bank
SPREAD = 130.0  # of the bounds: float32 exponentials hold from -87 to 88 around their middle


def launch(module: str, name: str, *tensors: Tensor) -> Any:
    """Call the kernel ``name`` of ``llamax.kernels.module`` through ``nki.jit``, for torch-xla."""
    function = getattr(import_module(f"llamax.kernels.{module}"), name)
    return import_module("nki").jit(function, mode="torchxla")(*tensors)


class Attention(torch.autograd.Function):
    """Causal self-attention; saves q, k, v, the output and one number for each query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        q_BHSE, k_BKSE, v_BKSE = (x.transpose(1, 2) for x in (q, k, v))
        inputs = [_turned(q_BHSE), _turned(k_BKSE), v_BKSE.contiguous(), *centres(q_BHSE, k_BKSE)]
        name = "attention_forward"
        if documents is not None:
            name += "_documents"
            inputs += document_inputs(documents, forward=True)
        out, lse = launch("attention.nki_forward", name, *inputs)
        ctx.save_for_backward(q, k, v, documents, out, lse)
        mixed: Tensor = out.transpose(1, 2)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, documents, out, lse = ctx.saved_tensors
        rows = [x.transpose(1, 2).contiguous() for x in (q, dout.to(q.dtype), k)]
        turned = [_turned(x) for x in (*rows, v.transpose(1, 2))]
        along = (out.float() * rows[1].float()).sum(-1).unflatten(2, (-1, TILE)).mT
        inputs = [*rows, *turned[:2], *turned[2:], -lse, -along.contiguous()]
        name = "attention_backward"
        if documents is not None:
            name += "_documents"
            inputs += document_inputs(documents, forward=False)
        dq, dk, dv = launch("attention.nki_backward", name, *inputs)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None


class RotatedAttention(torch.autograd.Function):
    """Attention of a projection's output with rotary positions, in one kernel each way.

    Saves the projection's output with rotated queries and keys, the result and one number for each
    query; nothing changes its layout in HBM.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, documents: Tensor | None
    ) -> Tensor:
        B, _, features = qkv.shape
        width = cos.shape[-1]
        keys = (features // width - heads) // 2
        rows = qkv.unflatten(-1, (-1, width)).transpose(1, 2)  # norms are those before rotation
        halves = [x[..., : width // 2].expand(B, -1, -1).contiguous() for x in (cos, sin)]
        limits = centres(rows[:, :heads], rows[:, heads : heads + keys])
        inputs = [qkv.contiguous(), *halves, *limits]
        name = "rotated_attention_forward"
        if documents is not None:
            name += "_documents"
            inputs += document_inputs(documents, forward=True)
        out, lse, rotated = launch("attention.nki_forward", name, *inputs)
        ctx.save_for_backward(rotated, *halves, documents, out, lse)
        mixed: Tensor = out.flatten(-2)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None, None]:
        rotated, cos, sin, documents, out, lse = ctx.saved_tensors
        inputs = [rotated, dout.to(out.dtype).reshape(out.shape).contiguous(), out, -lse, cos, sin]
        name = "rotated_attention_backward"
        if documents is not None:
            name += "_documents"
            inputs += document_inputs(documents, forward=False)
        return launch("attention.nki_backward", name, *inputs), None, None, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> Tensor:
    """Causal self-attention: [B, S, H, E], [B, S, K, E] twice, [B, S] or None -> [B, S, H, E]."""
    out: Tensor = Attention.apply(q, k, v, documents)  # type: ignore[no-untyped-call]
    return out


def rotated_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, documents: Tensor | None = None
) -> Tensor:
    """``ops.rotated_attention``: [B, S, (H + 2 K) E], 2 x [B or 1, S, E] -> [B, S, H E]."""
    inputs = (qkv, cos, sin, heads, documents)
    out: Tensor = RotatedAttention.apply(*inputs)  # type: ignore[no-untyped-call]
    return out


def supported(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> bool:
    """Whether the kernels are available and accept these inputs; logs once what is chosen."""
    if not available():
        return False
    why = nki_refusal(q.shape[1], q.shape[3])
    if q.shape[1] != k.shape[1]:
        why = "there are fewer queries than keys"
    elif q.dtype != torch.bfloat16:
        why = f"the tensors are {q.dtype}, not torch.bfloat16"
    log_choice(why)
    return not why


def rotates(qkv: Tensor, cos: Tensor, documents: Tensor | None) -> bool:
    """``supported``, for ``rotated_attention``; the reasons against are those of ``supported``."""
    if not available() or qkv.dtype != torch.bfloat16:
        return False
    if nki_refusal(qkv.shape[1], cos.shape[-1]):
        return False
    log_choice("")
    return True


@cache
def log_choice(why: str) -> None:
    """Log once that the kernels run, or each reason why they do not."""
    logger = logging.getLogger("llamax")
    if why:
        logger.warning("attention runs without llamax's NKI kernels, because %s", why)
    else:
        logger.info("attention runs by llamax's NKI kernels, which were tested in a simulator only")


@cache
def available() -> bool:
    """Whether this process runs on NeuronCores of trn1 with an nki that compiles for them."""
    if find_spec("nki") is None:
        return False
    if import_module("torch_xla.runtime").device_type() != "NEURON":
        return False
    try:
        installed = version("nki")
    except PackageNotFoundError:  # a module of that name that is no installed package
        return False
    sdk = trn1_sdk()
    if not begins(installed, sdk.nki):
        logging.getLogger("llamax").warning(
            "llamax's NKI kernels do not run: nki %s does not compile for trn1; install nki %s of "
            "Neuron SDK %s",
            installed,
            sdk.nki,
            sdk.name,
        )
        return False
    return True


def centres(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Minus the centre of each block of queries, and whether its bounds are too far apart.

    [B, H, S, E], [B, K, S, E] -> float32 [B, H, 128, blocks], int32 [B, H, blocks].
    """
    wide_q, wide_k = q.detach().float(), k.detach().float()
    scale = q.shape[-1] ** -0.5
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    largest_key = wide_k.square().sum(-1).amax(-1).sqrt()[..., None, None]  # [B, K, 1, 1]
    own = (wide_q.unflatten(1, groups) * wide_k.unsqueeze(2)).sum(-1) * scale  # [B, K, G, S]
    norms = wide_q.square().sum(-1).sqrt().unflatten(1, groups)
    upper = _blocks(norms * largest_key * scale, 0.0).amax(-1)
    lower = -_blocks(-own, -1e30).amax(-1)
    centre = ((upper + lower) * 0.5).flatten(1, 2)
    near = (upper - lower <= torch.full((), SPREAD, device=q.device)).flatten(1, 2)
    bias = (-centre).unsqueeze(2).expand(-1, -1, TILE, -1).contiguous()
    return bias, 1 - near.to(torch.int32)


def document_inputs(documents: Tensor, forward: bool) -> list[Tensor]:
    """``along``, ``across``, ``plain`` and ``mixed`` of ``nki_forward`` or ``nki_backward``."""
    numbers = documents.to(torch.float32)
    along = numbers.unsqueeze(1).expand(-1, TILE, -1).contiguous()
    across = numbers.unflatten(1, (-1, TILE)).mT.contiguous()
    return [along, across, *block_kinds(documents, forward)]


def block_kinds(documents: Tensor, forward: bool) -> tuple[Tensor, Tensor]:
    """Whether a block of queries and one of keys lie in one document, or share some: int32, 0 or 1.

    [B, S] -> 2 x [B, S / 512, S / 128] for blocks of queries and tiles of keys (``forward``), else
    2 x [B, S / 128, S / 512].
    """
    numbers = documents.to(torch.int32)
    most = torch.iinfo(torch.int32).max
    high = [_blocks(numbers, -most, size).amax(-1) for size in (TILE, BLOCK)]
    low = [-_blocks(-numbers, -most, size).amax(-1) for size in (TILE, BLOCK)]
    q, k = (1, 0) if forward else (0, 1)
    q_low, q_high = low[q].unsqueeze(2), high[q].unsqueeze(2)
    k_low, k_high = low[k].unsqueeze(1), high[k].unsqueeze(1)
    shared = (q_low <= k_high) & (k_low <= q_high)
    same = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    return same.to(torch.int32), (shared & ~same).to(torch.int32)


def _blocks(x: Tensor, filling: float, size: int = BLOCK) -> Tensor:
    """The last dim in blocks of ``size``; the last one is filled up."""
    missing = -x.shape[-1] % size
    filled = torch.nn.functional.pad(x, (0, missing), value=filling)
    parts: Tensor = filled.unflatten(-1, (-1, size))
    return parts


def _turned(x: Tensor) -> Tensor:
    """[B, H, S, E] -> [B, H, E, S]."""
    return x.mT.contiguous()
