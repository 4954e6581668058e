"""The learning rate over a run: a pure function of the step.

Steps count from 1, as AdamW's bias correction counts them.  All schedules rise linearly from 0 to
``lr`` in ``warmup_steps`` and end, at the last step, on ``min_lr``; ``constant`` stays at ``lr``::

    lr       ____                ____                ___________            ___________
            /    `.             /    `-.            /           `.         /
    min_lr /       `--         /        `-         /              `.      /
          cosine              linear              wsd: decay_steps       constant

cosine: Loshchilov & Hutter 2017, section 3, one period.  wsd (warmup, stable, decay): Hu et al.
2024 (MiniCPM), section 4, with the linear decay of Hägele et al. 2024.
"""

from __future__ import annotations

import math

from llamax.config.schema import OptimConfig


def lr_at(step: int, optim: OptimConfig, total_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (1 to ``total_steps``)."""
    if step < optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    begin = optim.warmup_steps
    if optim.schedule == "wsd":
        begin = max(begin, total_steps - optim.decay_steps)
    done = min(max(step - begin, 0) / max(total_steps - begin, 1), 1.0)
    left = (1 + math.cos(math.pi * done)) / 2 if optim.schedule == "cosine" else 1 - done
    return optim.min_lr + (optim.lr - optim.min_lr) * left
