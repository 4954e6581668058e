"""Bytes that a rank holds from step to step, and what the optimizer step adds to them."""

from __future__ import annotations

from llamax.config.constants import (
    GRADIENT_BYTES,
    MASTER_BYTES,
    MOMENTS_BYTES,
    NORM_WEIGHT_BYTES,
)
from llamax.config.hardware import Machine
from llamax.runtime.units import show_bytes, show_number
from llamax.tools.plan.line import Line
from llamax.tools.plan.sizes import Group, Share


def compiled(machine: Machine) -> bool:
    """Whether a step is a compiled program, in which element-wise operations are fused."""
    return machine.backend == "xla"


def owners(share: Share) -> int:
    """The number of data ranks that share the optimizer state."""
    return share.mesh.dp * share.mesh.cp if share.config.parallel.zero else 1


def kept(share: Share, stage: int) -> int:
    """Elements that a rank keeps of what is cut over the data ranks from ``stage`` of ZeRO on."""
    ranks = owners(share) if share.config.parallel.zero >= stage else 1
    return sum(group.elements // (1 if group.whole else ranks) for group in padded_groups(share))


def padded_groups(share: Share) -> list[Group]:
    """The groups of weights, each padded to a multiple of the owners."""
    ranks = owners(share)
    return [
        group._replace(elements=-(-group.elements // ranks) * ranks) for group in share.groups()
    ]


def state(share: Share, machine: Machine) -> list[Line]:
    """Weights and optimizer state, by the formulas in optim/zero.py and optim/lazy.py."""
    ranks, groups, width = owners(share), padded_groups(share), share.width
    elements = sum(group.elements for group in groups)
    uneven = sum(group.elements for group in groups if group.uneven)
    has_masters = width < 4 or compiled(machine)  # else the weights are their own masters
    count, per_rank = show_number(elements), f" / {ranks} data ranks" if ranks > 1 else ""
    return [
        *frozen_base(share),
        Line("weights", kept(share, 3) * width, f"{width} B x {cut_over(share, 3)}"),
        Line(
            "masters",
            MASTER_BYTES * elements // ranks if has_masters else 0,
            f"{MASTER_BYTES} B x {count} elements{per_rank}",
        ),
        Line(
            "moments",
            MOMENTS_BYTES * elements // ranks,
            f"2 x {MOMENTS_BYTES // 2} B x {count} elements{per_rank}",
        ),
        Line(
            "norm weights",
            NORM_WEIGHT_BYTES * uneven // ranks,
            f"{NORM_WEIGHT_BYTES} B x {show_number(uneven)} elements that ranks hold unequally"
            f"{per_rank}",
        ),
    ]


def cut_over(share: Share, stage: int) -> str:
    """The elements of ``kept`` in words."""
    ranks, elements = owners(share), sum(group.elements for group in padded_groups(share))
    cut = share.config.parallel.zero >= stage and ranks > 1 and not share.tuned
    return f"{show_number(elements)} elements" + (f" / {ranks} data ranks" if cut else "")


def in_flight(share: Share) -> Line:
    """Weights that are gathered while a layer goes backward, and gradients on their way.

    ZeRO-3: all weights of the layer, and the gradient of its largest projection, which is sent in
    float32.  ZeRO-2: gradients whose buckets wait for others.
    """
    largest = 2 * share.feed_forward * share.model.hidden_size
    zero = share.config.parallel.zero
    if zero < 2 or owners(share) == 1 or share.tuned:
        return Line("gathered", 0.0, "")
    if zero == 2:
        unsent = share.width * max(largest, share.head_weights)
        return Line("gathered", unsent, f"{show_bytes(unsent)} of gradients not sent yet")
    weights = share.width * share.layer_weights
    gradient = (GRADIENT_BYTES + (share.width if share.width < 4 else 0)) * largest
    temporary = 8 * share.tokens * share.feed_forward  # of SwiGLU, gone when the gradient is made
    gradient = max(gradient - temporary, 0)
    return Line(
        "gathered",
        weights + gradient,
        f"{show_bytes(weights)} weights of a layer"
        + (f", {show_bytes(gradient)} of gradient beyond SwiGLU's temporaries" if gradient else ""),
    )


def gathered_head(share: Share) -> Line:
    """The output matrix while the loss is computed, gathered."""
    value = share.width * share.head_weights if share.gathered else 0
    return Line("gathered", value, f"{share.width} B x {show_number(share.head_weights)} elements")


def frozen_base(share: Share) -> list[Line]:
    """The frozen base of a finetuning; where it is quantised, also one dense layer in use."""
    if not share.tuned:
        return []
    finetune, (plain, linear) = share.config.finetune, share.base
    kind = finetune.quant if finetune.method == "qlora" else f"{8 * share.width} bits"
    spread = ", cut over the data ranks" if share.spread else ""
    dense = share.width * share.model.hidden_size * 2 * share.feed_forward
    lines = [
        Line(
            "base",
            plain + linear,
            f"{show_number(share.layers * share.layer_weights)} frozen elements in {kind}{spread}, "
            f"{show_bytes(plain)} of embeddings and norms",
        )
    ]
    if finetune.method == "qlora":
        lines.append(Line("dense layer", dense, "the largest projection while it is used"))
    return lines


def gradients(share: Share) -> Line:
    """All gradients, summed in float32 over microsteps."""
    formula = f"{GRADIENT_BYTES} B x {cut_over(share, 2)}, summed in float32"
    return Line("gradients", GRADIENT_BYTES * kept(share, 2), formula)


def early_gradients(share: Share, machine: Machine) -> Line:
    """The gradients that exist during forward too: in flat vectors, or of an earlier microstep.

    Only float32 gradients that are never reduced appear and go within backward.
    """
    if share.config.parallel.zero > 1 and owners(share) > 1:
        return gradients(share)
    reduced = share.mesh.dp * share.mesh.cp > 1 or share.width < 4 or share.accumulation > 1
    stay = reduced or machine.backend not in ("cpu", "cuda")
    return gradients_of(
        sum(group.elements for group in padded_groups(share) if stay or group.summed),
        "summed in float32" if stay else "summed over tensor ranks",
    )


def gradients_of(elements: int, why: str) -> Line:
    formula = f"{GRADIENT_BYTES} B x {show_number(elements)} elements, {why}"
    return Line("gradients", GRADIENT_BYTES * elements, formula)


def update(share: Share, machine: Machine) -> Line:
    """What the optimizer step needs beside the state, the gradients and a bucket in flight.

    A compiled step joins the gradients of a bucket in a new vector, and the reduced run of every
    bucket waits for the norm.  The old weights are released before: the step reads the masters.
    Elsewhere the runs lie in the gradients, and a bucket is updated in place.
    """
    if not compiled(machine):
        return Line("update", 0.0, "in place")
    ranks, elements = owners(share), sum(group.elements for group in padded_groups(share))
    if share.config.parallel.zero > 1 and ranks > 1:
        return Line("update", 0.0, "the gradients are runs already")
    runs, weights = GRADIENT_BYTES * elements // ranks, share.width * elements
    alone = share.mesh.dp * share.mesh.cp == 1  # else communication has these buckets
    bucket = min(share.config.parallel.bucket_bytes, gradients(share).value) if alone else 0
    return Line(
        "update",
        max(runs + 2 * bucket - weights, 0),
        f"{show_bytes(runs)} of gradients wait for their norm, with the old weights released",
    )
