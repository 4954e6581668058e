"""Bytes of what gradients of weights are made from: inputs of products, gradients of outputs."""

from __future__ import annotations

from llamax.config.constants import MADE_AGAIN_BYTES
from llamax.config.hardware import Machine
from llamax.tools.plan.sizes import Share


def saves_inputs(machine: Machine) -> bool:
    """Whether norm and SwiGLU save only their inputs, as the kernels of ops.TABLE for them do."""
    return machine.backend == "cpu"


def input_bytes(share: Share, machine: Machine, tokens: int, features: int) -> int:
    """Bytes kept of a norm's or SwiGLU's result, the input of a product, with so many elements.

    None where backward makes it again (``llamax.parallel.tensor_parallel``).
    """
    value = tokens * features * share.width
    return 0 if saves_inputs(machine) and value >= MADE_AGAIN_BYTES else value


def swiglu(share: Share, machine: Machine) -> int:
    """Bytes that SwiGLU keeps of its input and inside, and its result."""
    T, F = share.tokens, share.feed_forward
    inside = 2 * share.width if saves_inputs(machine) else 12
    return T * F * inside + input_bytes(share, machine, T, F)


def put_off(share: Share, machine: Machine, recompute: str) -> bool:
    """Whether the factors of a microbatch stay after its backward, in a stage of a pipeline."""
    return share.stage > 0 and share.splits(machine.backend, recompute)


def put_off_bytes(share: Share, machine: Machine) -> int:
    """What the factors of a microbatch that are put off take beside what its forward kept.

    They are inputs that backward has made again, and gradients of whole sequences where layers keep
    parts: those of attention's and feed-forward's outputs.
    """
    D, F, between = share.model.hidden_size, share.feed_forward, share.tokens_between
    made = share.width * (2 * between * D + share.tokens * F)
    made -= 2 * input_bytes(share, machine, between, D)
    made -= input_bytes(share, machine, share.tokens, F)
    gathered = 2 * (share.tokens - between) * D * share.width
    return share.layers * (made + gathered)
