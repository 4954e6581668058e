"""AdamW on flat vectors (Loshchilov & Hutter 2019, algorithm 2; decoupled weight decay).

::

    g  <- factor g                                     loss scale and clipping
    m  <- beta1 m + (1 - beta1) g
    v  <- beta2 v + (1 - beta2) g^2
    p  <- p - lr decay p - lr m' / (sqrt(v') + eps)    m' = m / (1 - beta1^step), v' likewise

Everything that changes from step to step (lr, step, factor, whether the update is accepted) is a
0-d tensor, so that a traced graph is the same at every step.  Where torch has a fused kernel, it
makes one pass over memory; elsewhere plain operations are left to the device's compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llamax.config.schema import OptimConfig

FUSED = ("cpu", "cuda")
LEAST_BETA = 1e-300  # in place of 0, whose logarithm is infinite
Vectors = list[Tensor]


class Step(NamedTuple):
    """What a step does to every vector; tensors have no dimension, ``step`` counts from 1.

    ``rounded``: m and v will be rounded to 8 bits, and are computed in bitsandbytes' order.
    """

    lr: Tensor
    step: Tensor
    factor: Tensor
    accepted: Tensor
    decay: float
    optim: OptimConfig
    rounded: bool = False

    @property
    def rate_and_root(self) -> tuple[Tensor, Tensor]:
        """lr / (1 - beta1^step), and the square root of 1 - beta2^step."""
        rate = self.lr / _correction(self.optim.beta1, self.step)
        return rate, _correction(self.optim.beta2, self.step).sqrt()


# A rule for each element, of weights, gradients and two moments: all that differs in optimizers.
Update = Callable[[Vectors, Vectors, Vectors, Vectors, Step], None]


def update(p: Vectors, g: Vectors, m: Vectors, v: Vectors, by: Step) -> None:
    """One step on the float32 vectors of p, m and v, in place, unless ``accepted`` is false.

    g is left in an unknown state.  ``rounded`` m and v change even if ``accepted`` is false.
    """
    change = in_order if by.rounded else fused if p[0].device.type in FUSED else plain
    change(p, g, m, v, by)


def fused(p: Vectors, g: Vectors, m: Vectors, v: Vectors, by: Step) -> None:
    """``update`` by torch's kernel, which divides by a scale and changes nothing on found_inf."""
    torch._fused_adamw_(
        p,
        g,
        m,
        v,
        [],
        [by.step] * len(p),
        lr=by.lr,
        beta1=by.optim.beta1,
        beta2=by.optim.beta2,
        weight_decay=by.decay,
        eps=by.optim.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=by.factor.reciprocal(),
        found_inf=1.0 - by.accepted.float(),
    )


def plain(p: Vectors, g: Vectors, m: Vectors, v: Vectors, by: Step) -> None:
    """``update`` in plain float32 operations."""
    (rate, root), optim = by.rate_and_root, by.optim
    for weight, gradient, mean, square in zip(p, g, m, v, strict=True):
        gradient = gradient * by.factor
        new_mean = mean * optim.beta1 + gradient * (1 - optim.beta1)
        new_square = square * optim.beta2 + gradient * gradient * (1 - optim.beta2)
        change = rate * new_mean / (new_square.sqrt() / root + optim.eps)
        new_weight = weight * (1 - by.lr * by.decay) - change
        for old, new in ((weight, new_weight), (mean, new_mean), (square, new_square)):
            old.copy_(torch.where(by.accepted, new, old))


def in_order(p: Vectors, g: Vectors, m: Vectors, v: Vectors, by: Step) -> None:
    """``update`` in the order of bitsandbytes' AdamW8bit, so that m and v have the same bits."""
    (rate, root), optim = by.rate_and_root, by.optim
    for weight, gradient, mean, square in zip(p, g, m, v, strict=True):
        gradient = gradient * by.factor
        mean.mul_(optim.beta1).add_(gradient, alpha=1.0 - optim.beta1)
        square.mul_(optim.beta2).addcmul_(gradient, gradient, value=1.0 - optim.beta2)
        change = mean / (square.sqrt() / root + optim.eps) * rate
        weight.copy_(torch.where(by.accepted, weight * (1 - by.lr * by.decay) - change, weight))


def _correction(beta: float, step: Tensor) -> Tensor:
    """1 - beta^step; the plain formula has four digits in float32 at beta 0.999, step 1."""
    return -torch.expm1(step * math.log(max(beta, LEAST_BETA)))
