"""Bytes that one rank holds at the fullest moment of a step, by purpose.

Between two steps a rank holds its state.  A microstep adds, in this order::

    forward    what backward will read, layer by layer         kept
    loss       a chunk of logits, gradients of head and input  loss
    backward   one layer's gradients, and its recomputation    backward
    step       buckets of gradients and weights on their way   communication

The fullest moment is the largest of: kept + loss (forward has ended), kept + backward (the last
layer goes first, while all others are still there), and the optimizer's.  ``memory`` gives every
term; the formulas follow the modules they count: optim/zero1.py, recompute.py, parallel/loss.py.
What a graph compiler reorders or fuses can differ; ``reserve`` is for what is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llamax.metrics import show_number
from llamax.planner import Line
from llamax.planner.machine import GIB, Machine
from llamax.planner.share import Share

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose; ``peak`` is what must fit into ``available``."""

    state: tuple[Line, ...]
    working: tuple[Line, ...]
    beside: tuple[Line, ...]  # informative: not part of the peak
    available: float

    @property
    def peak(self) -> float:
        return sum(line.value for line in (*self.state, *self.working))

    @property
    def fits(self) -> bool:
        return self.peak <= self.available


def state(share: Share) -> tuple[Line, ...]:
    """Weights, gradients and optimizer state: what a rank holds between two steps."""
    ranks = share.mesh.dp * share.mesh.cp
    owners = ranks if share.config.parallel.zero1 else 1
    groups = [(-(-n // owners) * owners, uneven) for n, uneven in share.groups()]
    n = sum(elements for elements, _ in groups)
    uneven = sum(elements for elements, differs in groups if differs)
    w, own = share.width, n // owners
    said, cut = f"{show_number(n)} elements", f" / {owners} data ranks" if owners > 1 else ""
    lines = [
        Line("weights", n * w, f"{w} B x {said}"),
        Line("gradients", 4 * n, f"4 B x {said}: summed in float32"),
        Line("masters", 4 * own if w < 4 else 0, f"4 B x {said}{cut}"),
        Line("moments", 8 * own, f"2 x 4 B x {said}{cut}"),
        Line(
            "norm weights",
            4 * uneven // owners,
            f"4 B x {show_number(uneven)} elements that several ranks hold{cut}",
        ),
    ]
    return tuple(line for line in lines if line.value)


def layer_kept(share: Share, mode: Recompute) -> tuple[float, str]:
    """Bytes that one layer's forward keeps for its backward, and the formula."""
    D, w, heads = share.model.hidden_size, share.width, share.heads
    T, between, q, k = share.tokens, share.tokens_between, share.query, share.key
    F = share.feed_forward
    block = between * D * w
    if mode == "full":
        return block, f"{w} B x {between} tokens x {D}"
    norms = 4 * block + 2 * 4 * between
    attention = T * (2 * q + 2 * k) * w
    swiglu = T * 3 * F * w
    text = f"{w} B x ({between} tokens x 4 x {D} + {T} x ({2 * q + 2 * k}"
    if mode == "selective":
        return norms + attention + swiglu, f"{text} + 3 x {F}))"
    inside = T * (q + k) * w + T * heads * 4
    return norms + attention + inside + swiglu, f"{text} + {q + k} + 3 x {F}))"


def kept(share: Share, mode: Recompute) -> Line:
    """What forward keeps of all layers, and of what is around them."""
    each, formula = layer_kept(share, mode)
    # The last norm's input, its scale and its output; rope's tables; ids, labels and positions.
    D, w, T = share.model.hidden_size, share.width, share.tokens
    last = share.tokens_between * (2 * D * w + 4)
    tables = 2 * 4 * T * share.model.head_dim
    in_flight = min(share.mesh.pp, share.accumulation)
    total = (share.layers * each) * in_flight + last + tables
    stages = f" x {in_flight} microbatches in flight" if in_flight > 1 else ""
    return Line(
        f"activations, recompute {mode}",
        total,
        f"{share.layers} layers x {formula}{stages}",
    )


def loss(share: Share) -> Line:
    """The head: a chunk of logits and its gradient, the head's gradient, the gathered input."""
    D, w, T, v = share.model.hidden_size, share.width, share.tokens, share.vocabulary
    t = min(share.chunk_tokens, T)
    logits = t * v * 4
    narrow = t * v * w if w < 4 else 0
    gathered = T * D * w * (2 if share.sequence else 1)
    head = v * D * (4 + (w if w < 4 else 0))
    return Line(
        "loss",
        logits + narrow + gathered + head,
        f"4 B x {t} x {v} logits, {4 + (w if w < 4 else 0)} B x {v} x {D} gradient of the head, "
        f"{w} B x {T} x {D} hidden and gradient",
    )


def backward(share: Share, mode: Recompute) -> Line:
    """One layer's backward: the feed-forward's is the largest; recomputation comes before it."""
    D, w, T, F = share.model.hidden_size, share.width, share.tokens, share.feed_forward
    again = 0.0
    if mode == "full":
        again = layer_kept(share, "none")[0]
    elif mode == "selective":
        again = layer_kept(share, "none")[0] - layer_kept(share, "selective")[0]
    gathered = T * D * w * (2 if share.sequence else 1)
    products = T * 2 * F * w + 2 * F * D * max(w, 4)
    return Line(
        "backward",
        again + gathered + products,
        f"one layer: recomputed {again / GIB:.2f} GiB, {w} B x {T} x (2 x {F} + {D}), "
        f"4 B x 2 x {F} x {D} gradient of a weight",
    )


def communication(share: Share) -> Line:
    """The bucket of gradients or weights that is on its way during the optimizer's step."""
    bucket = share.config.parallel.bucket_bytes
    ranks = share.mesh.dp * share.mesh.cp
    return Line(
        "communication",
        2 * bucket if ranks > 1 else 0,
        f"2 x parallel.bucket_bytes of {bucket / 2**20:.0f} MiB: what is sent and what arrives",
    )


def memory(share: Share, machine: Machine, mode: Recompute | None = None) -> Memory:
    """All terms of ``share`` on ``machine``; ``mode`` other than the configuration's if given."""
    mode = share.config.run.recompute if mode is None else mode
    held, first, then = kept(share, mode), loss(share), backward(share, mode)
    working = [held, max(first, then, key=lambda line: line.value), communication(share)]
    reserve = machine.reserve_gib * GIB
    cache = 2 * share.layers * share.key * share.width
    length = share.config.data.sequence_length
    beside = Line(
        "key/value cache",
        cache * length,
        f"2 x {share.layers} layers x {share.key} x {share.width} B x {length} tokens, "
        "for each sequence that is generated; not during training",
    )
    return Memory(
        state=state(share),
        working=(
            *(line for line in working if line.value),
            Line("reserve", reserve, f"runtime and programs on {machine.name}, an allowance"),
        ),
        beside=(beside,),
        available=machine.memory_bytes(),
    )
