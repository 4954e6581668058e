"""Train with a learning rate of your own: it rises, then falls with the square root of the step.

    torchrun --nproc-per-node 2 inverse_root.py --config inverse-root.toml

The learning rate is a function of the step, counted from 1.  It needs no length of the run, so that
a run can be continued for any number of steps.

Source: Vaswani et al. 2017, "Attention Is All You Need", section 5.3.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import llamax
from llamax.config.load import load_config
from llamax.config.schema import Config
from llamax.parallel.rendezvous import rendezvous
from llamax.training.library import TrainedRun


def inverse_root(highest: float, warmup_steps: int) -> Callable[[int], float]:
    """The rate of a step: linear up to ``highest``, then highest * sqrt(warmup_steps / step)."""

    def rate(step: int) -> float:
        if step < warmup_steps:
            return highest * step / warmup_steps
        return highest * float(warmup_steps / step) ** 0.5

    return rate


def train(config: Config) -> TrainedRun:
    """Train with the highest rate and the warm-up of ``optim``."""
    optim = config.optim
    return llamax.train(config, learning_rate=inverse_root(optim.lr, optim.warmup_steps))


def main(arguments: Sequence[str]) -> None:
    where = rendezvous(os.environ)
    assert arguments[:1] == ["--config"], "inverse_root.py --config FILE [--section.key=value]"
    run = train(load_config(arguments[1], arguments[2:], where.world_size))
    if where.rank == 0:
        rates = ", ".join(f"{record['lr']:.2e}" for record in run.metrics)
        print(f"learning rates {rates}; loss {run.loss:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
