"""Bytes on one rank at the peak of a step, by purpose.

Between steps a rank holds its state.  A microstep fills and empties the rest::

    bytes         . activations + loss
                ./|\\.
             ../  |  \\.. activations + backward of one layer, gradients growing
          ../     |     \\..
    state ________|_________\\________
          forward | backward  optimizer step

The peak is at one of four moments: forward has just ended and the loss is computed; the last layer
goes backward while the activations of all others wait; the first layer goes backward, when all
gradients but the embedding's exist; the optimizer step, when the reduced gradients wait for their
norm.  The start is below: weights are made in the runs that a rank keeps.  The terms follow the
modules that they count (optim/zero.py, model/recompute.py, parallel/cross_entropy.py, ops.py) and
are exact where operations run one by one.  A graph compiler may fuse or reorder; ``reserve`` is an
allowance for what is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from llamax.config.constants import (
    ATTENTION_LENGTHS,
    GRADIENT_BYTES,
    STAGED_BYTES,
    flash_refusal,
    loss_chunk_tokens,
    nki_refusal,
)
from llamax.config.hardware import GIB, Machine
from llamax.runtime.units import show_bytes, show_number
from llamax.tools.plan.context import (
    attention_blocks,
    by_ring,
    exchange,
    gathered_bytes,
    kept_by_gpu,
    pairs,
    pairs_at_once,
)
from llamax.tools.plan.factors import input_bytes, put_off, put_off_bytes, saves_inputs, swiglu
from llamax.tools.plan.line import Line, total
from llamax.tools.plan.nki_loss import loss_by_nki, loss_line
from llamax.tools.plan.sizes import Share, stages_of
from llamax.tools.plan.state import (
    compiled,
    early_gradients,
    gathered_head,
    gradients,
    gradients_of,
    in_flight,
    most_gradients,
    on_host,
    state,
    summed_run,
    update,
)
from llamax.training.resolve import ResolvedRun

Recompute = Literal["none", "selective", "full"]
MODES: tuple[Recompute, ...] = ("none", "selective", "full")
MARGIN = 0.065  # share of the plan's bytes by which an audit or a run may need more
STATE = (  # lines printed first, in this order
    "base",
    "dense layer",
    "weights",
    "gathered",
    "gradients",
    "masters",
    "moments",
    "norm weights",
    "activations",
)


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose at the peak; their sum must fit into ``available``."""

    lines: tuple[Line, ...]
    moment: str  # when the peak is
    stage: int  # of the pipeline
    modes: tuple[Line, ...]  # activations in each recompute mode
    cache: Line
    available: float
    host: Line  # in the memory of the machine, outside of the peak
    host_available: float  # a rank's share of it; 0: not known

    @property
    def peak(self) -> float:
        return total(self.lines)

    @property
    def fits(self) -> bool:
        return self.peak <= self.available and self.host_fits

    @property
    def host_fits(self) -> bool:
        """Whether the host has room for what ranks keep there, with ``MARGIN`` for programs."""
        return not self.host_available or self.host.value * (1 + MARGIN) <= self.host_available

    @property
    def tight(self) -> bool:
        """Whether it fits with less than ``MARGIN`` to spare, so that an audit may refuse it."""
        return self.fits and self.peak * (1 + MARGIN) > self.available


def fullest(run: ResolvedRun, machine: Machine) -> Memory:
    """The memory of a rank of the stage that needs the most, on ``machine``."""
    return max(
        (memory(share, machine) for share, _ in stages_of(run)), key=lambda memory: memory.peak
    )


def memory(share: Share, machine: Machine) -> Memory:
    """The memory of one rank of ``machine`` that holds ``share`` of a run."""
    mode: Recompute = share.config.run.recompute
    reserve = Line("reserve", machine.reserve_gib * GIB, f"runtime and programs, {machine.name}")
    always = [
        *state(share, machine),
        communication(share, machine),
        swapped(share),
        batch(share, machine),
        reserve,
    ]
    activations, last_layer = kept(share, machine, mode), last_kept(share, machine, mode)
    working, all_gradients = backward(share, machine, mode), gradients(share)
    early, most = early_gradients(share, machine), most_gradients(share, machine)
    first = share.head_weights if share.projects and not share.tuned else 0
    head = gradients_of(first, "the head's, which come first")
    moments = {
        "forward has ended": [early, activations, loss(share, machine), gathered_head(share)],
        "the last layer goes backward": [
            max(early, head, key=lambda line: line.value),
            activations,
            working,
            in_flight(share, machine),
        ],
        "the first layer goes backward": [
            most,
            last_layer,
            working,
            in_flight(share, machine),
        ],
        "the weights are updated": [all_gradients, update(share, machine)],
    }
    nonzero = {
        moment: [line for line in (*always, *lines) if line.value]
        for moment, lines in moments.items()
    }
    moment = max(nonzero, key=lambda name: total(nonzero[name]))
    places = {name: place for place, name in enumerate(STATE)}
    return Memory(
        lines=tuple(sorted(nonzero[moment], key=lambda line: places.get(line.name, len(STATE)))),
        moment=moment,
        stage=share.stage,
        modes=tuple(_named(name, kept(share, machine, name)) for name in MODES),
        cache=cache(share),
        available=machine.memory_bytes(),
        host=on_host(share, machine),
        host_available=machine.host_memory_gib * GIB / machine.ranks,
    )


def _named(name: str, line: Line) -> Line:
    return Line(name, line.value, line.formula)


# --- messages and batches -------------------------------------------------------------------------


def communication(share: Share, machine: Machine) -> Line:
    """The largest messages in flight on each axis, sent and received."""
    hidden = float(share.tokens * share.model.hidden_size * share.width)
    hidden = hidden if share.mesh.tp > 1 else 0.0
    ranks = share.mesh.dp * share.mesh.cp
    bucket = min(share.config.parallel.bucket_bytes, gradients(share).value) if ranks > 1 else 0.0
    both = 2  # sent and received
    if machine.backend == "cpu":  # the buffers for gloo stay; some longer messages use none
        both = 1  # runs of a bucket are sent from where they are
        if share.sequence:  # the rank's own part is neither sent nor received
            hidden *= 1 - 1 / share.mesh.tp
        hidden = hidden if hidden <= STAGED_BYTES else 0
        if share.config.parallel.zero:
            bucket = min(bucket, STAGED_BYTES) * (1 - 1 / share.owners)
        elif bucket > STAGED_BYTES:
            bucket = 0
        summed = summed_run(share)
        bucket += summed if summed <= STAGED_BYTES else 0
    ways = 2 if share.sequence else 1  # an all-reduce works in place
    return Line(
        "communication",
        ways * hidden + both * bucket,
        f"{ways} x {show_bytes(hidden)} hidden state, {both} x {show_bytes(bucket)} bucket: sent "
        "and received",
    )


def swapped(share: Share) -> Line:
    """Activations on their way between stages: one that has arrived, and a blank."""
    activation = share.tokens_between * share.model.hidden_size * share.width
    number = 2 if share.mesh.pp > 1 else 0
    return Line(
        "swaps", number * activation, f"{number} x {show_bytes(activation)}, arrived and blank"
    )


def batch(share: Share, machine: Machine) -> Line:
    """Token ids, labels and positions, and document numbers where documents are kept apart."""
    width = 28 if share.config.data.separate_documents else 24
    steps = share.accumulation if machine.backend == "cpu" else 1
    formula = f"{width} B x {share.tokens} tokens" + (f" x {steps} microsteps" if steps > 1 else "")
    return Line("batch", width * share.tokens * steps, formula)


# --- forward -------------------------------------------------------------------------------------


def plain_attention(share: Share, machine: Machine) -> str:
    """Why attention needs memory for every pair of tokens; empty where it does not."""
    if machine.backend in ("cpu", "cuda"):
        return ""
    data, width = share.config.data, share.model.head_dim
    if by_nki(share, machine):
        return nki_refusal(data.sequence_length, width)
    return flash_refusal(data.sequence_length, width, data.separate_documents, share.mesh.cp)


def by_nki(share: Share, machine: Machine) -> bool:
    """Whether attention runs by the NKI kernels of llamax, where they accept the shapes."""
    return machine.backend == "xla" and share.mesh.cp == 1


def attention_kept(share: Share, machine: Machine) -> float:
    """Bytes kept inside attention, beside its input and output."""
    T, q, k, width = share.tokens, share.query, share.key, share.width
    if share.mesh.cp > 1 and (compiled(machine) or by_ring(share)):
        return gathered_bytes(share) + 4 * T * share.heads
    if plain_attention(share, machine):
        if compiled(machine):  # one more copy of k, softmax
            return T * k * width + 4 * pairs(share)
        mask = pairs(share) // share.heads  # float32 q, repeated k and v, softmax, mask
        return 12 * T * q + 4 * pairs(share) + mask + gathered_bytes(share)
    if by_nki(share, machine):  # one number a row
        return 4 * T * share.heads
    if machine.backend in ("xla", "neuron"):  # copies with repeated heads; one number a row
        return 3 * T * q * width + 4 * T * share.heads - T * (q + 2 * k) * width
    data = share.config.data
    by_torch = share.config.run.dtype == "float32" and data.sequence_length not in ATTENTION_LENGTHS
    blocks = data.separate_documents or not by_torch
    if machine.backend == "cpu" and share.mesh.cp == 1 and blocks:
        return 4 * T * share.heads  # the projection's output goes when it is rotated
    copied = -2 * k if share.mesh.cp > 1 else k  # this rank's keys and values are gathered copies
    more = gathered_bytes(share) + kept_by_gpu(share, machine)
    return T * (q + copied) * width + 4 * T * share.heads + more


def layer_kept(share: Share, machine: Machine, mode: Recompute) -> tuple[float, str]:
    """Bytes that the forward of one layer keeps for its backward, and the formula."""
    D, width, T, q, k = share.model.hidden_size, share.width, share.tokens, share.query, share.key
    between = share.tokens_between
    if mode == "full":
        return between * D * width, f"{between} tokens x {width} B x {D}"
    norm = width if saves_inputs(machine) else 4 + width
    normed, gated = input_bytes(share, machine, between, D), swiglu(share, machine)
    heads = T * (2 * q + 2 * k) * width
    held = float(between * (2 * D * norm + 8) + 2 * normed + heads + gated)
    formula = (
        f"{between} tokens x {2 * norm} B x {D} + 2 x {show_bytes(normed)} normalised + "
        f"{T} tokens x {width} B x {2 * q + 2 * k} + {show_bytes(gated)} of SwiGLU"
    )
    if mode == "none":
        held += attention_kept(share, machine)
        formula += f" + {show_bytes(attention_kept(share, machine))} inside attention"
    return held, formula


def outside_layers_kept(share: Share, machine: Machine) -> float:
    """Bytes outside the layers of a chunk: the input of the last norm, rope tables, a rotation."""
    norm = share.width if saves_inputs(machine) else 4 + share.width
    last = share.tokens_between * (share.model.hidden_size * norm + 4)
    if not share.projects:  # the output, which is gone when its backward has begun
        last = share.tokens_between * share.model.hidden_size * share.width
    rotating = 0  # a projection's output beside its rotated copy, in one layer at a time
    if by_nki(share, machine) and not plain_attention(share, machine):
        rotating = share.tokens * (share.query + 2 * share.key) * share.width
    return last + 2 * 4 * share.tokens * share.model.head_dim + rotating


def kept(share: Share, machine: Machine, mode: Recompute) -> Line:
    """The activations that forward keeps, of all layers and outside them."""
    layer, formula = layer_kept(share, machine, mode)
    flying = share.flying(machine.backend, mode)
    outside = share.config.parallel.chunks * outside_layers_kept(share, machine)
    outside += share.random_states(machine.backend, mode)
    formula = (
        f"recompute {mode}: {share.layers} layers x ({formula}), {show_bytes(outside)} outside them"
    )
    if flying > 1:
        formula += f"; {flying:g} microbatches in flight"
    whole, factors = (share.layers * layer + outside) * flying, 0
    if put_off(share, machine, mode):
        factors = min(share.stage, share.accumulation - 1) * put_off_bytes(share, machine)
        formula += f", {show_bytes(factors)} of factors put off" * (factors > 0)
    return Line("activations", whole + factors, formula)


def last_kept(share: Share, machine: Machine, mode: Recompute) -> Line:
    """The activations that are left when the first layer goes backward."""
    every = kept(share, machine, mode)
    if put_off(share, machine, mode):
        return replace(every, value=every.value + put_off_bytes(share, machine))
    layer, formula = layer_kept(share, machine, mode)
    flying = share.flying(machine.backend, mode)
    others = (flying - 1) * every.value / flying
    waiting = f", and {show_bytes(others)} of other microbatches" if others else ""
    return Line(
        "activations", layer + others, f"recompute {mode}, one layer is left: {formula}{waiting}"
    )


# --- loss and backward ---------------------------------------------------------------------------


def loss(share: Share, machine: Machine) -> Line:
    """The loss: one chunk of logits, and the gradients of head and hidden state."""
    if not share.projects:
        return Line("loss", 0.0, "on the last stage")
    if loss_by_nki(share, machine):
        return loss_line(share)
    D, width, T, v = share.model.hidden_size, share.width, share.tokens, share.vocabulary
    t = min(loss_chunk_tokens(v, on_cpu=machine.backend == "cpu"), T)
    widened = not machine.bfloat16_products and width < 4
    gathered = share.sequence and machine.backend == "xla"  # elsewhere the gradient's place
    hidden = (share.tokens_between + T + T * gathered) * D * width
    logits = 4 * t * v
    if widened:  # products in float32: copies of the weight and of the chunk
        products = 4 * v * D + 2 * 4 * t * D
    else:
        products = t * D * width + (t * v * width + v * D * width if width < 4 else 0)
        if width < 4 and machine.backend == "cpu":  # torch widens a product before it adds it
            products += 4 * v * D
    head = 0 if share.tuned else GRADIENT_BYTES * v * D
    return Line(
        "loss",
        hidden + logits + products + head,
        f"{t} tokens x 4 B x {v} logits, {show_bytes(head)} gradient of the head, "
        f"{show_bytes(products)} products, {show_bytes(hidden)} hidden state and its gradient",
    )


def backward(share: Share, machine: Machine, mode: Recompute) -> Line:
    """The backward of one layer: its recomputed activations, and the largest temporary."""
    D, width, T, F = share.model.hidden_size, share.width, share.tokens, share.feed_forward
    whole = layer_kept(share, machine, "none")[0]
    again = 0.0 if mode == "none" else whole - layer_kept(share, machine, mode)[0]
    if machine.backend in ("cpu", "cuda"):  # SwiGLU in float32, operation by operation
        element = 8 if width == 4 else 24
        element += 0 if input_bytes(share, machine, T, F) else width
        largest = float(T * F * element + share.tokens_between * D * width)
        formula = f"{T} tokens x {element} B x {F}"
        gone = 0 if put_off(share, machine, mode) else swiglu(share, machine)
        attention = attention_blocks(share) - gone
        if (machine.backend == "cpu" or by_ring(share)) and attention > largest:
            largest, formula = attention, "scores of a block of queries"
            formula += " less the feed-forward's" if gone else ""
    else:
        largest = 2 * T * F * width + T * D * width + 8 * F * D
        formula = f"{T} x {width} B x {2 * F + D} + 4 B x {2 * F} x {D}"
    if plain_attention(share, machine):
        element = 6 if compiled(machine) else 12
        at_once = pairs_at_once(share, machine)
        scores = element * at_once - swiglu(share, machine)
        if scores > largest:
            largest = scores
            formula = (
                f"{element} B x {show_number(at_once)} pairs of tokens less the feed-forward's"
            )
    context = exchange(share, machine)
    if context:
        formula += f", {show_bytes(context)} of keys and values of context ranks and gradients"
    return Line(
        "backward", again + largest + context, f"{show_bytes(again)} computed again, {formula}"
    )


def cache(share: Share) -> Line:
    """The key/value cache of one sequence while text is generated."""
    length = share.config.data.sequence_length
    token = 2 * share.layers * share.key * share.width
    return Line(
        "key/value cache",
        token * length,
        f"2 x {share.layers} layers x {share.key} x {share.width} B x {length} tokens",
    )
