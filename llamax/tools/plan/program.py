"""The instructions of the largest program that a run compiles, by its matrix products alone.

neuronx-cc unrolls a program into instructions for the engines of a core, and refuses one of too
many (NCC_EXTP004, NCC_EVRF007 and NCC_EBVF030 in its list of errors).  One instruction of the
tensor engine multiplies [128, 128] by [128, 512] at most (awsdocs-neuron, NKI: tile sizes), so the
FLOPs of a program give the least number of them::

    no pipeline   a microstep: forward, what is recomputed, and backward
    pipeline      backward of a chunk of layers; of the last one with forward and the loss

Whatever else a program does comes on top.
"""

from __future__ import annotations

from llamax.config.hardware import Machine
from llamax.tools.plan.products import (
    adapter_flops,
    attention_flops,
    forward_flops,
    layer_flops,
)
from llamax.tools.plan.sizes import Share, stages_of
from llamax.training.resolve import ResolvedRun

PRODUCT_FLOPS = 2 * 128 * 128 * 512  # of one instruction, at most


def largest_program(run: ResolvedRun, machine: Machine) -> float:
    """The least number of instructions of the largest program of any rank."""
    return max(program_flops(share, machine) for share, _ in stages_of(run)) / PRODUCT_FLOPS


def program_flops(share: Share, machine: Machine) -> float:
    """FLOPs of the products in the largest program of a stage."""
    kinds = layer_flops(share), adapter_flops(share), attention_flops(share, machine)
    forward, backward = map(sum, zip(*kinds, strict=True))
    layers = backward + (forward if share.projects else 0)
    head = (2 if share.tuned else 3) * forward_flops(share)[1]  # forward and backward
    return layers / share.config.parallel.chunks + head
