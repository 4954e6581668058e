"""Seconds of the NKI attention kernels, from the simulator's tally.

The tally counts the documented cycles of every instruction (kernels/simulator): the time of the
busiest engine or memory port, as if no instruction waited.  ``SECONDS`` fits the times of the PSUM
port and, where the rotation of queries and keys makes it the slower one, of the SBUF port; the
longest counts.  A test compares the fit with the tally.  Where documents are kept apart it is the
slowest case, in which every block of tokens holds parts of several documents and none is skipped.
"""

from __future__ import annotations

from typing import NamedTuple

from llamax.tools.plan.sizes import Share


class PortSeconds(NamedTuple):
    """The time that a memory port takes, by what makes it longer."""

    pair: float  # of tokens of the causal half, of a query head
    query: float  # token of a query head
    key: float  # token of a key/value head


# head dim, documents apart -> forward, backward
SECONDS: dict[tuple[int, bool], tuple[tuple[PortSeconds, ...], tuple[PortSeconds, ...]]] = {
    (64, False): (
        (PortSeconds(5.58e-12, 2.41e-9, 7.1e-10), PortSeconds(0.0, 6.10e-9, 2.99e-9)),
        (PortSeconds(1.76e-11, 3.62e-9, 1.43e-9), PortSeconds(7.63e-12, 7.73e-9, 4.31e-9)),
    ),
    (64, True): (
        (PortSeconds(1.39e-11, 7.50e-9, 3.03e-9),),
        (PortSeconds(2.18e-11, 8.95e-9, 4.32e-9),),
    ),
    (128, False): (
        (PortSeconds(5.58e-12, 2.86e-9, 7.1e-10), PortSeconds(0.0, 9.15e-9, 5.67e-9)),
        (PortSeconds(1.85e-11, 4.73e-9, 1.43e-9), PortSeconds(8.51e-12, 1.33e-8, 8.32e-9)),
    ),
    (128, True): (
        (PortSeconds(1.39e-11, 1.06e-8, 5.70e-9),),
        (PortSeconds(2.27e-11, 1.45e-8, 8.33e-9),),
    ),
}


def head_seconds(
    length: int, head_dim: int, documents: bool, heads: int = 1, kv_heads: int = 1
) -> tuple[float, float]:
    """Forward and backward of the heads of one sequence."""

    def longest(ports: tuple[PortSeconds, ...]) -> float:
        pairs = length**2 / 2
        return max(
            heads * (port.pair * pairs + port.query * length) + kv_heads * port.key * length
            for port in ports
        )

    forward, backward = SECONDS[head_dim, documents]
    return longest(forward), longest(backward)


def attention_seconds(share: Share, again: int, bandwidth: float) -> float:
    """All layers of a microbatch on one rank, with the forward computed ``again`` times more.

    Before a forward the graph reads q and k once, to bound the scores.
    """
    data, width = share.config.data, share.model.head_dim
    forward, backward = head_seconds(
        data.sequence_length,
        width,
        data.separate_documents,
        share.heads,
        share.key // width,
    )
    sequences = share.tokens / data.sequence_length
    bounds = share.width * share.tokens * (share.query + share.key) / bandwidth
    return share.layers * ((1 + again) * (sequences * forward + bounds) + sequences * backward)
