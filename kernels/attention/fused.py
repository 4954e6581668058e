"""torch's fused attention, as far as it takes grouped heads.

Of the kernels of a GPU that make no scores of all pairs, only flash attention reads grouped
key/value heads in every torch from 2.9 on, and it takes neither a mask nor float32.  With these
torch would fall back, without a word, to plain products: B H S T scores, several times.  So there
keys and values get a copy for each query head; and the query heads of a single token, of which
each would copy the whole cache, become queries of one head.

Source: ``can_use_mem_efficient_attention`` in sdp_utils.cpp of torch; its pull request 191085.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[B, S, H, E], 2 x [B, T, K, E] -> [B, S, H, E]; causal where ``mask`` is None, then S = T.

    ``mask``: bool [B, S, T], true where a query attends to a key; or a causal bias of torch.
    """
    return (on_gpu if q.device.type == "cuda" else grouped)(q, k, v, mask)


def on_gpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """``attention`` on a GPU."""
    groups, masked = q.shape[2] // k.shape[2], mask is not None and mask.dtype == torch.bool
    if groups == 1 or not (masked or q.dtype == torch.float32):
        return grouped(q, k, v, mask)
    if q.shape[1] == 1 and masked:
        q_BgkE = q[:, 0].unflatten(1, (-1, groups)).transpose(1, 2)
        return grouped(q_BgkE, k, v, mask).transpose(1, 2).flatten(1, 2)[:, None]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    return grouped(q, k, v, mask)


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """``attention`` with the heads as they are."""
    if mask is not None and mask.dtype == torch.bool:
        mask = mask[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)
