"""Seconds of the NKI attention kernels, from the simulator's tally.

The tally counts the documented cycles of every instruction (kernels/simulator): the time of the
busiest engine or memory port, as if no instruction waited.  ``SECONDS`` fits it for one head:
``pair`` for each pair of the causal half, ``token`` for each token; a test compares both.  Where
documents are kept apart it is the slowest case, in which every block of tokens holds parts of
several documents and none is skipped.
"""

from __future__ import annotations

from llamax.tools.plan.sizes import Share

# head dim, documents apart -> forward (pair, token), backward (pair, token)
SECONDS = {
    (64, False): ((5.58e-12, 1.70e-9), (1.76e-11, 2.19e-9)),
    (64, True): ((1.39e-11, 5.15e-9), (2.18e-11, 7.47e-9)),
    (128, False): ((5.58e-12, 2.14e-9), (1.70e-11, 5.50e-9)),
    (128, True): ((1.39e-11, 5.59e-9), (2.27e-11, 1.13e-8)),
}


def head_seconds(length: int, head_dim: int, documents: bool) -> tuple[float, float]:
    """Forward and backward of one head and sequence."""
    (pair, token), (pair_back, token_back) = SECONDS[head_dim, documents]
    pairs = length**2 / 2
    return pair * pairs + token * length, pair_back * pairs + token_back * length


def layout_bytes(share: Share) -> tuple[float, float]:
    """Bytes that a layer reads and writes to arrange tensors for the kernels: forward, backward.

    Forward: q, k, v and the output change layout, and q and k are read for their bounds.  Backward:
    two layouts of q, k and dout, one of v, and of three gradients, and the output times dout.
    """
    width, T, q, k = share.width, share.tokens, share.query, share.key
    return width * T * (5.0 * q + 5 * k), width * T * (12.0 * q + 10 * k)


def attention_seconds(share: Share, again: int, bandwidth: float) -> float:
    """All layers of a microbatch on one rank, with the forward computed ``again`` times more."""
    data = share.config.data
    forward, backward = head_seconds(
        data.sequence_length, share.model.head_dim, data.separate_documents
    )
    heads = share.heads * share.tokens / data.sequence_length
    moved, moved_back = layout_bytes(share)
    seconds = (1 + again) * (heads * forward + moved / bandwidth)
    return share.layers * (seconds + heads * backward + moved_back / bandwidth)
