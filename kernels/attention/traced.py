"""Attention of a traced program: products in the stored dtype, no copies of key/value heads.

Tensors take the place of Python numbers in ``torch.where``, because torch-xla makes those 64 bits.
The softmax is the function ``torch.nn.functional.softmax`` of four dims, as in AWS's Llama: in its
place, and not in that of the method, torch-neuronx puts its own with NEURON_FUSE_SOFTMAX=1.
Source: ``xla_impl/ops.py`` of torch-neuronx 1.13; examples/training/llama of neuronx-distributed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llamax.config.hidden import HIDDEN


def attention_cached(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """``ops.attention_cached``: [B, S, H, E], 2 x [B, T, K, E], bool [B, S, T] -> [B, S, H, E]."""
    groups = (k.shape[2], q.shape[2] // k.shape[2])
    q_BKgsE = (q / math.sqrt(q.shape[-1])).transpose(1, 2).unflatten(1, groups).flatten(2, 3)
    k_BKTE, v_BKTE = k.transpose(1, 2), v.transpose(1, 2)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores_BKgST = (q_BKgsE @ k_BKTE.mT).to(wide).unflatten(2, (groups[1], -1))
    hidden, seen = (torch.full((), x, device=q.device) for x in (HIDDEN, 0.0))
    bias_B11ST = torch.where(mask[:, None, None], seen, hidden)
    weights_BHST = F.softmax((scores_BKgST + bias_B11ST).flatten(1, 2), -1).to(q.dtype)
    o_BKgsE = weights_BHST.unflatten(1, groups).flatten(2, 3) @ v_BKTE
    o_BHSE: Tensor = o_BKgsE.unflatten(2, (groups[1], -1)).flatten(1, 2)
    return o_BHSE.transpose(1, 2)
