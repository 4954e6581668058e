"""Attention of ranks that share sequences: pairs computed, keys and values exchanged, and bytes.

The terms follow ``parallel/context_parallel.py`` and ``kernels/attention``.  A rank of n holds
2 T k numbers of keys and values of a layer.  Gathered, it has those of all ranks until backward;
around a ring, its own and those of one other rank that are on their way.
"""

from __future__ import annotations

from llamax.config.constants import (
    ATTENTION_BLOCK_QUERIES,
    ATTENTION_SCORES_BYTES,
    GRADIENT_BYTES,
)
from llamax.config.hardware import Machine
from llamax.tools.plan.sizes import Share
from llamax.tools.plan.state import compiled


def pairs(share: Share) -> int:
    """The elements of the attention scores of one microbatch and layer on this rank.

    Context ranks skip chunks of keys that none of their queries sees.
    """
    whole, n = share.tokens * share.config.data.sequence_length * share.heads, share.mesh.cp
    return whole if n == 1 else whole * (2 * n + 1) // (4 * n)


def pairs_at_once(share: Share, machine: Machine) -> int:
    """The scores that exist at the same time: with context ranks, of a block of two chunks."""
    n = share.mesh.cp
    return pairs(share) // (2 * n + 1) if n > 1 and compiled(machine) else pairs(share)


def kept_by_gpu(share: Share, machine: Machine) -> int:
    """Bytes that a GPU's fused attention keeps of a layer beside what every other keeps.

    With a mask of documents, or in float32, it reads no grouped heads: it keeps keys and values for
    each query head, and the mask in the dtype of the model (``kernels/attention/fused.py``).
    """
    masked = share.config.data.separate_documents
    if machine.backend != "cuda" or by_ring(share) or not (masked or share.width == 4):
        return 0
    copies = 2 * share.tokens * share.query if share.key < share.query else 0
    return share.width * (copies + (pairs(share) // share.heads if masked else 0))


def by_ring(share: Share) -> bool:
    """Whether context ranks pass keys and values around a ring, instead of gathering them."""
    return share.mesh.cp > 1 and share.config.parallel.context_by == "ring"


def keys_bytes(share: Share) -> int:
    """Keys and values of whole sequences, of one layer; 0 without context ranks."""
    n = share.mesh.cp
    return 2 * share.tokens * n * share.key * share.width if n > 1 else 0


def gathered_bytes(share: Share) -> int:
    """Keys and values that a context rank gathers, of one layer."""
    return 0 if by_ring(share) else keys_bytes(share)


def keys_at_most(share: Share, machine: Machine) -> float:
    """A bound of the bytes of gathered keys and values, and so of what a ring can save."""
    every = share.config.run.recompute == "none"
    kept = share.layers * share.flying(machine.backend, "none") if every else 1
    return gathered_bytes(share) * (kept + 1 + GRADIENT_BYTES / share.width)


def turns(share: Share) -> tuple[int, float]:
    """The times that keys and values or gradients go around in a microstep, and bytes of a time."""
    passes = 2 if share.config.run.recompute == "none" else 3
    if not by_ring(share):
        return share.layers * passes, keys_bytes(share)
    sent = (passes + GRADIENT_BYTES / share.width) * keys_bytes(share)
    return share.layers * (passes + 1), sent / (passes + 1)


def exchange(share: Share, machine: Machine) -> float:
    """Bytes of keys and values on their way in backward, and of their gradients, in float32.

    Gathered: in the order of the ring, and summed.  Around a ring: one share in use and one that
    arrives; gradients of this rank's, of those in use, and of those that leave and arrive; between
    two ranks, one share less of both.  0 where ``attention_blocks`` has them.
    """
    if machine.backend == "cpu" or (by_ring(share) and not compiled(machine)):
        return 0.0
    held = keys_bytes(share) / share.mesh.cp
    if by_ring(share):
        shares, between = 2 - (share.mesh.cp == 2), 4 - (share.mesh.cp == 2)
        return held * (shares + between * GRADIENT_BYTES / share.width)
    return gathered_bytes(share) * (1 + GRADIENT_BYTES / share.width)


def attention_blocks(share: Share) -> float:
    """Bytes of attention in backward where operations run one by one.

    On a CPU blocks of scores, copies of keys and values, and gradients.  Around a ring, on every
    device: scores of a run of queries and a chunk of keys.
    """
    data, n, element = share.config.data, share.mesh.cp, GRADIENT_BYTES
    chunk = data.sequence_length if n == 1 else data.sequence_length // (2 * n)
    row = element * share.heads * min(ATTENTION_BLOCK_QUERIES, chunk)
    query, keys = share.tokens * share.query, 2 * share.tokens * share.key
    if by_ring(share):
        ways = 7 if n > 2 else 4  # gradients on their way between two ranks are not added up
        scores = 2 * row * chunk * data.micro_batch
        return scores + element * (ways * keys + 4.5 * query)
    block = row * data.sequence_length
    together = 1 if data.separate_documents else max(1, ATTENTION_SCORES_BYTES // block)
    together = min(together, data.micro_batch)
    if n > 1:
        return 2 * block * together + element * (4 * keys * n + query)
    return 3 * block * together + (query + keys) * share.width
