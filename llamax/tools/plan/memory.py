"""Bytes that one rank holds at the fullest moment of a step, by purpose.

Between steps a rank holds its state; a microstep fills and empties the rest, as in this drawing::

    bytes         . kept + loss
                ./|\\.
             ../  |  \\.. kept + backward of one layer, gradients growing
          ../     |     \\..
    state ________|_________\\________
          forward | backward  optimizer's step

The fullest moment is one of: forward has just ended and the loss works; the last layer goes
backward while all others wait; the first layer goes backward, when all gradients are there.  Terms
follow the modules they count (optim/zero1.py, recompute.py, parallel/loss.py, ops.py) and are
exact where operations run one by one.  A graph compiler may fuse or reorder; ``reserve`` is an
allowance for what is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llamax.config.hardware import GIB, Machine
from llamax.runtime.units import show_bytes, show_number
from llamax.tools.plan import Line
from llamax.tools.plan.sizes import Group, Share

Recompute = Literal["none", "selective", "full"]
BLOCK, SCORES_BYTES = 128, 8 * 2**20  # of kernels/attention/op.py
STAGED_BYTES = 8 * 2**20  # of backends/torch.py: longer messages pass through no buffer


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose at the fullest moment; their sum must fit into ``available``."""

    lines: tuple[Line, ...]
    moment: str
    modes: tuple[Line, ...]  # what each recompute mode would keep
    cache: Line
    available: float

    @property
    def peak(self) -> float:
        return sum(line.value for line in self.lines)

    @property
    def fits(self) -> bool:
        return self.peak <= self.available


def memory(share: Share, machine: Machine) -> Memory:
    """What ``share`` of a run fills of a rank of ``machine``."""
    mode: Recompute = share.config.run.recompute
    fixed = [
        *state(share, machine),
        communication(share, machine),
        tokens(share, machine),
        Line("reserve", machine.reserve_gib * GIB, f"runtime and programs, {machine.name}"),
    ]
    all_kept, one_kept = kept(share, machine, mode), last_kept(share, machine, mode)
    working, total = backward(share, machine, mode), gradients(share)
    early = early_gradients(share, machine)
    head = _gradients(0 if share.tuned else share.head_weights, "the head's, the first to be there")
    moments = {
        "forward has ended": [early, all_kept, loss(share, machine)],
        "the last layer goes backward": [max(early, head, key=_bytes), all_kept, working],
        "the first layer goes backward": [total, one_kept, working],
    }
    chosen = {
        moment: [line for line in (*fixed, *lines) if line.value]
        for moment, lines in moments.items()
    }
    moment = max(chosen, key=lambda each: sum(line.value for line in chosen[each]))
    order = (
        "base",
        "dense layer",
        "weights",
        "gradients",
        "masters",
        "moments",
        "norm weights",
        "activations",
    )
    ranked = {name: place for place, name in enumerate(order)}
    lines = sorted(chosen[moment], key=lambda line: ranked.get(line.name, len(order)))
    modes: tuple[Recompute, ...] = ("none", "selective", "full")
    return Memory(
        lines=tuple(lines),
        moment=moment,
        modes=tuple(
            Line(each, *_value(kept(share, machine, each)))  # the name is the mode's
            for each in modes
        ),
        cache=cache(share),
        available=machine.memory_bytes(),
    )


def _bytes(line: Line) -> float:
    return line.value


def _value(line: Line) -> tuple[float, str]:
    return line.value, line.formula


# --- between steps -------------------------------------------------------------------------------


def owners(share: Share) -> int:
    """How many data ranks share the optimizer's state."""
    return share.mesh.dp * share.mesh.cp if share.config.parallel.zero1 else 1


def padded(share: Share) -> list[Group]:
    """The groups, each a multiple of the owners long."""
    ranks = owners(share)
    return [each._replace(elements=-(-each.elements // ranks) * ranks) for each in share.groups()]


def state(share: Share, machine: Machine) -> list[Line]:
    """Weights and optimizer state, by the formulas in optim/zero1.py and optim/lazy.py."""
    ranks, groups = owners(share), padded(share)
    n, w = sum(group.elements for group in groups), share.width
    uneven = sum(group.elements for group in groups if group.uneven)
    apart = w < 4 or compiled(machine)  # else weights are their own masters
    said, cut = show_number(n), f" / {ranks} data ranks" if ranks > 1 else ""
    return [
        *base(share),
        Line("weights", n * w, f"{w} B x {said} elements"),
        Line("masters", 4 * n // ranks if apart else 0, f"4 B x {said} elements{cut}"),
        Line("moments", 8 * n // ranks, f"2 x 4 B x {said} elements{cut}"),
        Line(
            "norm weights",
            4 * uneven // ranks,
            f"4 B x {show_number(uneven)} elements that ranks hold unequally{cut}",
        ),
    ]


def base(share: Share) -> list[Line]:
    """A frozen base: whole, or quantised and then one layer of it dense while it is used."""
    if not share.tuned:
        return []
    finetune, (plain, linear) = share.config.finetune, share.base
    kind = finetune.quant if finetune.method == "qlora" else f"{8 * share.width} bits"
    cut = ", cut over the data ranks" if share.spread else ""
    dense = share.width * share.model.hidden_size * 2 * share.feed_forward
    lines = [
        Line(
            "base",
            plain + linear,
            f"{show_number(share.layers * share.layer_weights)} frozen elements in {kind}{cut}, "
            f"{show_bytes(plain)} of embeddings and norms",
        )
    ]
    if finetune.method == "qlora":
        lines.append(Line("dense layer", dense, "the largest projection while it is used"))
    return lines


def gradients(share: Share) -> Line:
    """All gradients, summed in float32 over microsteps."""
    return _gradients(sum(group.elements for group in padded(share)), "summed in float32")


def early_gradients(share: Share, machine: Machine) -> Line:
    """Those there during forward too: in flat vectors, or of an earlier microstep.

    Only float32 gradients that no other rank has a part of come and go with backward.
    """
    sent = share.mesh.dp * share.mesh.cp > 1 or share.width < 4 or share.accumulation > 1
    stay = sent or machine.backend not in ("cpu", "cuda")
    return _gradients(
        sum(group.elements for group in padded(share) if stay or group.summed),
        "summed in float32" if stay else "that ranks have parts of",
    )


def _gradients(elements: int, why: str) -> Line:
    return Line("gradients", 4 * elements, f"4 B x {show_number(elements)} elements, {why}")


def communication(share: Share, machine: Machine) -> Line:
    """Messages on their way: what is sent and what arrives, of each axis."""
    hidden = float(share.tokens * share.model.hidden_size * share.width)
    hidden = hidden if share.mesh.tp > 1 else 0.0
    ranks = share.mesh.dp * share.mesh.cp
    whole = gradients(share).value
    bucket = min(share.config.parallel.bucket_bytes, whole) if ranks > 1 else 0.0
    if machine.backend == "cpu":  # gloo's buffers stay
        hidden, bucket = (size if size <= STAGED_BYTES else 0 for size in (hidden, bucket))
    ways = 2 if share.sequence else 1  # an all-reduce works in place
    return Line(
        "communication",
        ways * hidden + 2 * bucket,
        f"{ways} x {show_bytes(hidden)} hidden state, 2 x {show_bytes(bucket)} bucket: sent and "
        "arriving",
    )


def tokens(share: Share, machine: Machine) -> Line:
    """Ids, labels and positions, and documents where they are kept apart."""
    each = 28 if share.config.data.separate_documents else 24
    steps = share.accumulation if machine.backend == "cpu" else 1
    text = f"{each} B x {share.tokens} tokens" + (f" x {steps} microsteps" if steps > 1 else "")
    return Line("batch", each * share.tokens * steps, text)


# --- forward -------------------------------------------------------------------------------------


def lean(machine: Machine) -> bool:
    """Whether norm and SwiGLU save their inputs alone (the CPU's kernels in ops.TABLE)."""
    return machine.backend == "cpu"


def compiled(machine: Machine) -> bool:
    """Whether a step is a program, in which what is computed element by element is fused."""
    return machine.backend == "xla"


def flash(share: Share, machine: Machine) -> str:
    """Why attention needs memory for every pair of tokens; empty where it does not."""
    data = share.config.data
    if machine.backend in ("cpu", "cuda"):
        return ""
    if data.sequence_length % 2048:
        return f"data.sequence_length={data.sequence_length} is no multiple of 2048"
    if share.model.head_dim > 128:
        return f"model.head_dim={share.model.head_dim} is above 128"
    if data.separate_documents:
        return "data.separate_documents=true"
    return ""


def pairs(share: Share) -> int:
    """Scores of a microbatch and layer on this rank, where all of them exist."""
    return share.tokens * share.config.data.sequence_length * share.heads


def inside(share: Share, machine: Machine) -> float:
    """Bytes that the inside of attention keeps, beside its input and output."""
    T, q, k, w = share.tokens, share.query, share.key, share.width
    if flash(share, machine):  # wide q, repeated k and v, softmax, mask
        mask = 0 if compiled(machine) else pairs(share) // share.heads
        return 12 * T * q + 4 * pairs(share) + mask
    if machine.backend in ("xla", "neuron"):  # copies with repeated heads; one number a row
        return 3 * T * q * w + 4 * T * share.heads - T * (q + 2 * k) * w
    return T * (q + k) * w + 4 * T * share.heads


def swiglu(share: Share, machine: Machine) -> int:
    """Bytes that SwiGLU keeps for each of its outputs."""
    return 3 * share.width if lean(machine) else 12 + share.width


def layer_kept(share: Share, machine: Machine, mode: Recompute) -> tuple[float, str]:
    """Bytes that one layer's forward keeps for its backward, and the formula."""
    D, w, T, q, k = share.model.hidden_size, share.width, share.tokens, share.query, share.key
    F, between = share.feed_forward, share.tokens_between
    if mode == "full":
        return between * D * w, f"{between} tokens x {w} B x {D}"
    norm = 2 * w if lean(machine) else 4 + 2 * w
    each = swiglu(share, machine)
    heads = T * (2 * q + 2 * k) * w
    total = float(between * (2 * D * norm + 8) + heads + T * F * each)
    text = (
        f"{between} tokens x {2 * norm} B x {D} + "
        f"{T} tokens x ({w} B x {2 * q + 2 * k} + {each} B x {F})"
    )
    if mode == "none":
        total += inside(share, machine)
        text += f" + {show_bytes(inside(share, machine))} inside attention"
    return total, text


def around(share: Share, machine: Machine) -> float:
    """What is kept beside the layers: the last norm's input, and rope's tables."""
    norm = share.width if lean(machine) else 4 + share.width
    last = share.tokens_between * (share.model.hidden_size * norm + 4)
    return last + 2 * 4 * share.tokens * share.model.head_dim


def kept(share: Share, machine: Machine, mode: Recompute) -> Line:
    """What forward keeps of all layers, and of what is around them."""
    each, formula = layer_kept(share, machine, mode)
    flying = min(share.mesh.pp, share.accumulation)
    stages = f" x {flying} microbatches in flight" if flying > 1 else ""
    rest = around(share, machine)
    text = f"{share.layers} layers x ({formula}){stages}, {show_bytes(rest)} around them"
    value = share.layers * each * flying + rest
    return Line("activations", value, f"recompute {mode}: {text}")


def last_kept(share: Share, machine: Machine, mode: Recompute) -> Line:
    """What is left of it when the first layer goes backward."""
    each, formula = layer_kept(share, machine, mode)
    return Line("activations", each, f"recompute {mode}, one layer is left: {formula}")


# --- loss and backward ---------------------------------------------------------------------------


def loss(share: Share, machine: Machine) -> Line:
    """The head at work: one chunk of logits, and the gradients of head and hidden state."""
    D, w, T, v = share.model.hidden_size, share.width, share.tokens, share.vocabulary
    t, wide = min(share.chunk_tokens, T), not machine.bfloat16_products and w < 4
    hidden = (share.tokens_between + T) * D * w + (T * D * w if share.sequence else 0)
    logits = 4 * t * v
    if wide:  # products in float32: copies of the weight and of the chunk
        work = 4 * v * D + 2 * 4 * t * D
    else:
        work = t * D * w + (t * v * w + v * D * w if w < 4 else 0)
    head = 0 if share.tuned else 4 * v * D
    return Line(
        "loss",
        hidden + logits + work + head,
        f"{t} tokens x 4 B x {v} logits, {show_bytes(head)} gradient of the head, "
        f"{show_bytes(work)} products, {show_bytes(hidden)} hidden state and its gradient",
    )


def backward(share: Share, machine: Machine, mode: Recompute) -> Line:
    """One layer at work: what it computes again, and the feed-forward's gradients."""
    D, w, T, F = share.model.hidden_size, share.width, share.tokens, share.feed_forward
    whole = layer_kept(share, machine, "none")[0]
    again = 0.0 if mode == "none" else whole - layer_kept(share, machine, mode)[0]
    if machine.backend in ("cpu", "cuda"):  # SwiGLU in float32, operation by operation
        width = 8 if w == 4 else 24
        products = float(T * F * width + share.tokens_between * D * w)
        text = f"{T} tokens x {width} B x {F}"
        attention = blocks(share) - T * F * 3 * w
        if machine.backend == "cpu" and attention > products:
            products, text = attention, "scores of a block of queries less the feed-forward's"
    else:
        products = 2 * T * F * w + T * D * w + 8 * F * D
        text = f"{T} x {w} B x {2 * F + D} + 4 B x {2 * F} x {D}"
    if flash(share, machine):
        each = 6 if compiled(machine) else 12
        scores = each * pairs(share) - T * F * swiglu(share, machine)
        if scores > products:
            products = scores
            text = f"{each} B x {show_number(pairs(share))} pairs of tokens less the feed-forward's"
    return Line("backward", again + products, f"{show_bytes(again)} computed again, {text}")


def blocks(share: Share) -> float:
    """What the CPU's attention needs backward: three blocks of scores, gradients of q, k and v."""
    data = share.config.data
    row = 4 * share.heads * BLOCK * data.sequence_length
    together = 1 if data.separate_documents else max(1, SCORES_BYTES // row)
    gradient = share.tokens * (share.query + 2 * share.key) * share.width
    return 3 * row * min(together, data.micro_batch) + gradient


def cache(share: Share) -> Line:
    """What one sequence of generated text would keep."""
    length = share.config.data.sequence_length
    each = 2 * share.layers * share.key * share.width
    return Line(
        "key/value cache",
        each * length,
        f"2 x {share.layers} layers x {share.key} x {share.width} B x {length} tokens",
    )
