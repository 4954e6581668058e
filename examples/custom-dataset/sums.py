"""Train on batches that a program makes: sums, written digit by digit.

    torchrun --nproc-per-node 2 sums.py --config sums.toml

A dataset is a class with one method, ``read``: the rows of the samples with these numbers.  All
else is inherited from ``Batches``: which rank takes which samples, the order of an epoch, and
continuing after any number of samples.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import numpy as np
import torch

from llamax.backends import choose
from llamax.config.load import load_config
from llamax.config.schema import Config
from llamax.data.batch_plan import BatchPlan
from llamax.data.loader import Batches, Rows
from llamax.data.shuffle import Integers
from llamax.model.llama import Llama
from llamax.ops import IGNORE_INDEX
from llamax.parallel.collectives import Axis
from llamax.parallel.mesh import ALONE, Seat
from llamax.parallel.rendezvous import Rendezvous, rendezvous
from llamax.training.resolve import resolve
from llamax.training.step import TrainState

SYMBOLS = "0123456789+= "
DIGITS = 3
NUMBERS = 10**DIGITS
PROMPT = 2 * DIGITS + 2  # "123+456="


class Sums(Batches):
    """Sample n is the sum of n // 1000 and n % 1000, its result with the last digit first."""

    def __init__(
        self, config: Config, dp: Axis | Seat, consumed: int = 0, cp: Seat = ALONE
    ) -> None:
        plan = BatchPlan.of(config.data, config.run.seed, dp.rank, dp.size, cp)
        super().__init__(NUMBERS**2, plan, consumed, shuffle=True)

    def read(self, samples: Integers) -> Rows:
        """ids and labels [rows, sequence_length]; the result alone is learnt."""
        texts = [self.text(number).ljust(self.sequence_length + 1) for number in samples.tolist()]
        tokens = np.array([[SYMBOLS.index(symbol) for symbol in text] for text in texts])
        ids, labels = tokens[:, :-1], tokens[:, 1:].copy()
        labels[:, : PROMPT - 1] = IGNORE_INDEX
        labels[labels == SYMBOLS.index(" ")] = IGNORE_INDEX
        return Rows(ids, labels, None)

    @staticmethod
    def text(number: int) -> str:
        """``123+456=9750``: the result is reversed, so that carries come before their digits."""
        left, right = divmod(number, NUMBERS)
        result = f"{left + right:0{DIGITS + 1}}"[::-1]
        return f"{left:0{DIGITS}}+{right:0{DIGITS}}={result}"


def train(config: Config, where: Rendezvous) -> tuple[list[float], float]:
    """Train on this rank; the loss of every step, and the share of right answers at the end."""
    run = resolve(config, where.world_size)
    backend = choose(config.run.backend, where, config.run.threads)
    losses: list[float] = []
    with backend.joined(run.mesh, config.run.timeout_s) as axes:
        model = Llama(config.model, axes.tp).init(config.run.seed)
        state = TrainState.build(run, model, axes, backend)
        sums = Sums(config, axes.dp, cp=axes.part)
        for step in range(1, run.steps + 1):
            result = state.step(sums.step(), step)
            losses += backend.fetch([result.loss])
            if where.rank == 0 and step % config.run.log_every == 0:
                print(f"step {step}/{run.steps}  loss {losses[-1]:.4f}", flush=True)
        right = accuracy(model, sums)
        if where.rank == 0:
            print(f"right answers to sums it has not seen: {right:.1%}")
    return losses, right


@torch.no_grad()
def accuracy(model: Llama, sums: Sums) -> float:
    """The share of the sums of the next step, which are unseen, that are answered exactly."""
    unseen = np.array(sums.sample_ids(sums.consumed))
    rows = torch.from_numpy(sums.read(unseen).ids)
    asked, end = rows.clone(), PROMPT + DIGITS + 1
    for place in range(PROMPT, end):
        asked[:, place] = model(asked[:, :place])[:, -1].argmax(-1)
    return float((asked == rows)[:, PROMPT:end].all(1).float().mean())


def main(arguments: Sequence[str]) -> None:
    where = rendezvous(os.environ)
    assert arguments[:1] == ["--config"], "sums.py --config FILE [--section.key=value]"
    train(load_config(arguments[1], arguments[2:], where.world_size), where)


if __name__ == "__main__":
    main(sys.argv[1:])
