"""Bytes that a rank holds from step to step, and what the optimizer step adds to them."""

from __future__ import annotations

from dataclasses import replace

from llamax.config.constants import (
    GRADIENT_BYTES,
    MASTER_BYTES,
    NORM_WEIGHT_BYTES,
    STATE_BLOCK,
    STATE_LEAST_ELEMENTS,
    moments_bytes,
)
from llamax.config.hardware import Machine
from llamax.runtime.units import show_bytes, show_number
from llamax.tools.plan.line import Line, total
from llamax.tools.plan.sizes import Share

WORKING_BYTES = 16  # an element, while an update is computed by plain operations and rounded


def compiled(machine: Machine) -> bool:
    """Whether a step is a compiled program, in which element-wise operations are fused."""
    return machine.backend == "xla"


def kept(share: Share, stage: int) -> int:
    """Elements that a rank keeps of what is cut over the data ranks from ``stage`` of ZeRO on."""
    ranks = share.owners if share.config.parallel.zero >= stage else 1
    return sum(group.elements // (1 if group.whole else ranks) for group in share.padded_groups)


def state(share: Share, machine: Machine) -> list[Line]:
    """Weights and optimizer state, by the formulas in optim/zero.py."""
    ranks, groups, width = share.owners, share.padded_groups, share.width
    uneven = sum(group.elements for group in groups if group.uneven)
    return [
        *frozen_base(share),
        Line("weights", kept(share, 3) * width, f"{width} B x {cut_over(share, 3)}"),
        *([] if _away(share, machine) else [masters(share, machine), moments(share)]),
        Line(
            "norm weights",
            NORM_WEIGHT_BYTES * uneven // ranks,
            f"{NORM_WEIGHT_BYTES} B x {show_number(uneven)} elements that ranks hold unequally"
            f"{_per_rank(share)}",
        ),
    ]


def _per_rank(share: Share) -> str:
    """Over how many data ranks state is cut, in words; empty where it is not."""
    return f" / {share.owners} data ranks" if share.owners > 1 else ""


def masters(share: Share, machine: Machine) -> Line:
    """Float32 copies of narrower weights; float32 weights are their own, but in a program."""
    ranks, elements = share.owners, share.padded_elements
    present = share.width < 4 or compiled(machine)
    return Line(
        "masters",
        MASTER_BYTES * elements // ranks if present else 0,
        f"{MASTER_BYTES} B x {show_number(elements)} elements{_per_rank(share)}",
    )


def moments(share: Share) -> Line:
    """AdamW's two moments of every element."""
    ranks, elements = share.owners, share.padded_elements
    wide, narrow = moments_bytes(32), moments_bytes(8)
    rounded = in_8_bits(share) if share.config.optim.state_bits == 8 else 0
    value = (narrow * rounded + wide * (elements - rounded)) / ranks
    formula = f"2 x {wide / 2:g} B x {show_number(elements - rounded)} elements{_per_rank(share)}"
    if rounded:
        rest = f", {formula}" if rounded < elements else ""
        formula = (
            f"2 x {narrow / 2:.3g} B x {show_number(rounded)} elements{_per_rank(share)}{rest}"
        )
    return Line("moments", int(value), formula)


def in_8_bits(share: Share) -> int:
    """Elements of tensors that are made of whole blocks, whose moments can be in 8 bits."""
    model, width = share.model, share.model.hidden_size
    heads, kv = (n * model.head_dim for n in (model.num_attention_heads, model.num_key_value_heads))
    if share.tuned:
        widths, r = (width, heads, kv, model.intermediate_size), share.config.finetune.r
        return share.adapters if all(_in_blocks(r * each) for each in widths) else 0
    layer = {  # elements of a Hub tensor: those of a rank
        heads * width: 2 * share.query * width,
        kv * width: 2 * share.key * width,
        model.intermediate_size * width: 3 * share.feed_forward * width,
    }
    if heads == kv:
        layer[kv * width] += 2 * share.query * width
    found = share.layers * sum(held for whole, held in layer.items() if _in_blocks(whole))
    if _in_blocks(model.vocab_size * width):
        found += share.vocabularies * share.head_weights
    return found + (share.norms if _in_blocks(width) else 0)


def _in_blocks(elements: int) -> bool:
    return elements >= STATE_LEAST_ELEMENTS and elements % STATE_BLOCK == 0


def _away(share: Share, machine: Machine) -> bool:
    """Whether optimizer state is kept in another memory than the weights."""
    return share.config.optim.offload and machine.backend != "cpu"


def on_host(share: Share, machine: Machine) -> Line:
    """Optimizer state that a rank keeps in the memory of its host."""
    lines = [masters(share, machine), moments(share)] if _away(share, machine) else []
    formulas = (f"{line.name} {line.formula}" for line in lines if line.value)
    return Line("optimizer state", total(lines), ", ".join(formulas))


def cut_over(share: Share, stage: int) -> str:
    """The elements of ``kept`` in words."""
    cut = share.config.parallel.zero >= stage and not share.tuned
    return f"{show_number(share.padded_elements)} elements{_per_rank(share) * cut}"


def in_flight(share: Share, machine: Machine) -> Line:
    """Weights that are gathered while a layer goes backward, and gradients on their way.

    ZeRO-3: all weights of the layer, and the gradient of its largest projection, which is sent in
    float32; on GPUs the one before, half as large, is still on its way.  ZeRO-2: gradients whose
    buckets wait for others.
    """
    largest = 2 * share.feed_forward * share.model.hidden_size
    zero = share.config.parallel.zero
    if zero < 2 or share.owners == 1 or share.tuned:
        return Line("gathered", 0.0, "")
    if zero == 2:
        unsent = share.width * max(largest, share.head_weights)
        return Line("gathered", unsent, f"{show_bytes(unsent)} of gradients not sent yet")
    weights = share.width * share.layer_weights
    gradient = (GRADIENT_BYTES + (share.width if share.width < 4 else 0)) * largest
    if machine.backend == "cuda":
        gradient += GRADIENT_BYTES * largest // 2
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
    cut = ", cut over the data ranks" if share.shards_base else ""
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
    formula = f"{GRADIENT_BYTES} B x {cut_over(share, 2)}, summed in float32"
    return Line("gradients", GRADIENT_BYTES * kept(share, 2), formula)


def early_gradients(share: Share, machine: Machine) -> Line:
    """The gradients that exist during forward too: in flat vectors, or of an earlier microstep.

    Only float32 gradients that are never reduced appear and go within backward.
    """
    if share.config.parallel.zero > 1 and share.owners > 1:
        return gradients(share)
    reduced = share.mesh.dp * share.mesh.cp > 1 or share.width < 4 or share.accumulation > 1
    stay = reduced or machine.backend not in ("cpu", "cuda")
    return gradients_of(
        sum(group.elements for group in share.padded_groups if stay or group.summed),
        "summed in float32" if stay else "summed over tensor ranks",
    )


def most_gradients(share: Share, machine: Machine) -> Line:
    """The gradients that exist when the first layer has gone backward: the embedding's comes last.

    Where gradients lie in flat vectors, all of them.
    """
    every, alone = gradients(share), share.embeds and not share.model.tie_word_embeddings
    if share.tuned or not alone or early_gradients(share, machine).value == every.value:
        return every
    embedding = GRADIENT_BYTES * share.head_weights
    return replace(
        every,
        value=every.value - embedding,
        formula=f"{every.formula}, without {show_bytes(embedding)} of the embedding, the last",
    )


def gradients_of(elements: int, why: str) -> Line:
    formula = f"{GRADIENT_BYTES} B x {show_number(elements)} elements, {why}"
    return Line("gradients", GRADIENT_BYTES * elements, formula)


def update(share: Share, machine: Machine) -> Line:
    """What the optimizer step needs beside the state, the gradients and a bucket in flight.

    A compiled step joins the gradients of a bucket in a new vector, and the reduced run of every
    bucket waits for the norm.  The old weights are released before: the step reads the masters.
    Elsewhere the runs lie in the gradients, and a bucket is updated in place (``streamed``).
    """
    if not compiled(machine):
        return streamed(share)
    ranks, elements = share.owners, share.padded_elements
    if share.config.parallel.zero > 1 and ranks > 1 and share.mesh.copies == 1:
        return Line("update", 0.0, "the gradients are runs already")
    runs, weights = GRADIENT_BYTES * elements // ranks, share.width * kept(share, 3)
    alone = share.mesh.dp * share.mesh.cp == 1  # else communication has these buckets
    bucket = min(share.config.parallel.bucket_bytes, gradients(share).value) if alone else 0
    return Line(
        "update",
        max(runs + 2 * bucket - weights, 0),
        f"{show_bytes(runs)} of gradients wait for their norm, with the old weights released",
    )


def streamed(share: Share) -> Line:
    """What a bucket takes whose state comes from host memory, or is made wide from 8 bits."""
    optim, ranks = share.config.optim, share.owners
    run = min(share.config.parallel.bucket_bytes // GRADIENT_BYTES, largest_group(share)) // ranks
    element = (MASTER_BYTES if optim.offload and share.width < 4 else 0) + (
        moments_bytes(32) if optim.offload or optim.state_bits == 8 else 0
    )
    element += WORKING_BYTES if optim.state_bits == 8 else 0
    # In other stages of ZeRO it is no more than a bucket.
    summed = summed_run(share) if share.config.parallel.zero == 3 else 0
    if summed > element * run:
        return Line("update", summed, "the largest run, summed over the groups that own it")
    return Line(
        "update",
        element * run,
        f"{element:g} B x {show_number(run)} elements of a bucket" if element else "in place",
    )


def summed_run(share: Share) -> int:
    """Bytes of the largest run of a gradient that groups with the same state sum."""
    if share.mesh.copies == 1:
        return 0
    largest = min(share.config.parallel.bucket_bytes // GRADIENT_BYTES, largest_group(share))
    if share.config.parallel.zero == 3 and not share.tuned:  # a weight is a bucket of its own
        largest = max(2 * share.feed_forward * share.model.hidden_size, share.head_weights)
    return GRADIENT_BYTES * largest // share.owners


def largest_group(share: Share) -> int:
    """Elements of the largest flat vector."""
    return max(group.elements for group in share.padded_groups)
