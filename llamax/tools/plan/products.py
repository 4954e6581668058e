"""FLOPs of the matrix products of a microbatch on one rank, and what its matrix unit makes of them.

A unit that multiplies tiles of weights takes as long for a part of a tile as for a whole one, so a
share of 448 features costs what 512 do where a tile has 128 (`product_tile` of a machine).
"""

from __future__ import annotations

from llamax.config.hardware import Machine
from llamax.config.rules.finetune import target_names
from llamax.tools.plan.context import pairs
from llamax.tools.plan.memory import plain_attention
from llamax.tools.plan.sizes import Share, rounded_up


def forward_flops(share: Share) -> tuple[float, float, float]:
    """Forward FLOPs of one microbatch on one rank: layer matmuls, head matmul, attention."""
    T = share.tokens
    layers = 2.0 * T * share.layers * share.layer_weights
    head = 2.0 * T * share.head_weights if share.projects else 0.0
    length = share.config.data.sequence_length
    attention = 2.0 * T * length * share.query * share.layers
    return layers, head, attention


def layer_flops(share: Share) -> tuple[float, float]:
    """FLOPs of the products with weights of layers in a microbatch, forward and backward.

    A frozen weight needs no gradient; a recomputed layer leaves out its down projection.
    """
    forward = forward_flops(share)[0]
    backward = (1 if share.tuned else 2) * forward
    if share.config.run.recompute == "full":
        down = 2.0 * share.tokens * share.layers * share.model.hidden_size * share.feed_forward
        backward += forward - down
    return forward, backward


def adapter_flops(share: Share) -> tuple[float, float]:
    """FLOPs of the products of adapters in a microbatch, forward and backward.

    Both factors are trained.  A recomputed layer leaves out what adds to its last sum, B of the
    down projection.  Without adapters, zeros.
    """
    if not share.tuned:
        return 0.0, 0.0
    forward = 2.0 * share.tokens * share.adapters
    backward, finetune = 2 * forward, share.config.finetune
    if share.config.run.recompute == "full":
        last = "down_proj" in target_names(finetune.targets)
        b = 2.0 * share.tokens * share.layers * finetune.r * share.model.hidden_size
        backward += forward - (b if last else 0.0)
    return forward, backward


def attention_flops(share: Share, machine: Machine) -> tuple[float, float]:
    """FLOPs of the products of attention in a microbatch, forward and backward.

    A flash kernel computes the causal half, and scores again in backward; without one all pairs of
    tokens are computed.  Selective recomputation runs the kernel again, or makes scores again.
    """
    attention, mode = forward_flops(share)[2], share.config.run.recompute
    if not plain_attention(share, machine):
        return attention, (2.5 + (mode != "none")) * attention
    length = share.config.data.sequence_length
    attention *= 2 * pairs(share) / (share.tokens * length * share.heads)
    return attention, (2 + {"none": 0, "selective": 0.5, "full": 1}[mode]) * attention


def weight_flops(share: Share, machine: Machine, loss_apart: bool) -> tuple[float, float]:
    """FLOPs of all products with weights in a microbatch, and of the whole tiles that they take.

    Without those of the head where the loss has kernels of its own (``loss_apart``).
    """
    tile, tuned = machine.product_tile, share.tuned
    layers = sum(layer_flops(share))
    head = 0.0 if loss_apart else (2 if tuned else 3) * forward_flops(share)[1]
    adapters = sum(adapter_flops(share))
    rank = share.config.finetune.r
    whole = layers * filled(share, machine)
    whole += head * rounded_up(share.vocabulary, tile) / share.vocabulary
    whole += adapters * rounded_up(rank, tile) / rank
    return layers + head + adapters, whole


def filled(share: Share, machine: Machine) -> float:
    """Weights of the whole tiles that a layer takes, by its own weights; at least 1."""
    return share.layer_elements(machine.product_tile) / share.layer_weights
