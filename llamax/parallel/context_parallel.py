"""Context parallelism: ranks of an axis share every sequence, and attend to each other's keys.

A sequence is cut into 2n chunks, and rank r of n holds chunks r and 2n - 1 - r, so that under a
causal mask all ranks have equally many pairs of tokens (a cut into n runs would give the last rank
2n - 1 times the pairs of the first)::

    n = 2       chunk 0 | chunk 1 | chunk 2 | chunk 3       queries ->  keys
    rank 0         0                             3          0 -> 0           3 -> 0 1 2 3
    rank 1                   1         2                    1 -> 0 1         2 -> 0 1 2

Tokens meet only in attention.  There a rank gathers the keys and values of all ranks, and backward
adds their gradients up and gives each rank its own (``regions.collect``); or they are passed around
a ring, for less memory (``kernels/attention/ways.py``).  Everything else works on the tokens that a
rank holds: the loader cuts ids, labels, positions and documents, after labels were shifted, and the
axis of gradients and of the loss (``Axes.data``) includes these ranks.
Sequence parallelism cuts a rank's run further, over the tensor ranks.

A rank computes 2n + 1 of the 4n pairs of chunks that its queries make with the whole sequence.
Devices that run operations one by one give each chunk of queries the keys up to its end; a device
that traces programs computes the same pairs by blocks, chosen by tensors, so that the rank's number
is in no program (``kernels/attention/blocks.py``).

Sources: Liu et al. 2023, "Ring Attention" (blocks); Grattafiori et al. 2024, "The Llama 3 Herd of
Models", section 3.3.2 (gathered keys and values, the cut into 2n chunks).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llamax import ops
from llamax.config.types import ContextBy
from llamax.parallel import regions
from llamax.parallel.collectives import Axis

# (q_BShE, k_BSkE, v_BSkE, layer) -> o_BShE: the attention of a model, which ``across`` and
# decoding replace
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The two chunks of a sequence, of ``2 * size``, that a rank holds."""
    return rank, 2 * size - 1 - rank


def cut(x: Tensor, rank: int, size: int) -> Tensor:
    """A rank's share of sequences: [B, S, ..] -> [B, S / size, ..]."""
    chunks: Tensor = x.unflatten(1, (2 * size, -1))
    return chunks[:, list(chunks_of(rank, size))].flatten(1, 2)


def in_rank_order(x: Tensor, size: int) -> Tensor:
    """Whole sequences as a gather of the shares of all ranks makes them: [B, S, ..], twice."""
    return torch.cat([cut(x, rank, size) for rank in range(size)], 1)


def places(axis: Axis, length: int) -> Tensor:
    """The places in their sequences of this rank's ``length`` tokens: int32 [length].

    The rank enters as a tensor, so that every rank traces the same program.
    """
    chunk = length // 2
    within = torch.arange(chunk, dtype=torch.int32, device=axis.rank_index.device)
    low, high = axis.rank_index, 2 * axis.size - 1 - axis.rank_index
    return torch.cat((low * chunk + within, high * chunk + within))


def across(axis: Axis, documents_BS: Tensor | None = None, by: ContextBy = "gather") -> Attend:
    """Causal attention to the tokens of all ranks of ``axis``, for the ``attend`` of a model.

    ``documents_BS`` keeps documents apart: the numbers of the whole sequences, in rank order.
    ``by``: whether keys and values of all ranks are gathered, or those of one at a time arrive.
    """

    def attend(q_BShE: Tensor, k_BSkE: Tensor, v_BSkE: Tensor, layer: int) -> Tensor:
        kv = torch.cat((k_BSkE, v_BSkE), 2)
        kv = regions.collect(kv, axis, 1) if by == "gather" else kv
        if by == "ring" or q_BShE.device.type == "xla":
            return ops.attention_by_blocks(q_BShE, kv, documents_BS, axis)
        k, v = kv.chunk(2, 2)
        return _by_chunks(q_BShE, k, v, documents_BS, axis)

    return attend


def _by_chunks(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, axis: Axis) -> Tensor:
    """Attention of each of this rank's chunks to the keys up to its end."""
    last = max(chunks_of(axis.rank, axis.size)) + 1
    k, v = (_in_sequence(x, axis.size, last) for x in (k, v))
    if documents is not None:
        documents = _in_sequence(documents, axis.size, last)
    chunk, found = q.shape[1] // 2, []
    for number, queries in zip(chunks_of(axis.rank, axis.size), q.chunk(2, 1), strict=True):
        end = (number + 1) * chunk
        seen = None if documents is None else documents[:, :end]
        found.append(ops.attention(queries, k[:, :end], v[:, :end], seen))
    return torch.cat(found, 1)


def _in_sequence(x: Tensor, size: int, count: int) -> Tensor:
    """The first ``count`` chunks of sequences that are in rank order, in their own order."""
    chunks = x.chunk(2 * size, 1)
    return torch.cat((*chunks[::2], *chunks[:0:-2])[:count], 1)
