"""A resumed run draws on: torch's random state, which modules of a program's own may use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import support.checkpoints as worlds
import torch
from support import tiny_run
from torch import Tensor

from llamax.backends import choose
from llamax.checkpoint import Saver
from llamax.config.schema import CheckpointConfig, Config, ParallelConfig
from llamax.model.llama import Llama
from llamax.parallel.collectives import Axes, Solo
from llamax.parallel.rendezvous import Rendezvous
from llamax.train import train
from llamax.training.inputs import open_inputs
from llamax.training.parts import Parts
from llamax.training.resolve import resolve
from llamax.training.setup import prepare


@pytest.fixture
def run(tmp_path: Path) -> Config:
    (tmp_path / "data").mkdir()
    return tiny_run.config(tiny_run.make_dataset(tmp_path / "data"), tmp_path / "run")


class Noisy(Llama):
    """A Llama with dropout by torch's own generator."""

    def loss(self, ids_BS: Tensor, *args: object, **options: object) -> tuple[Tensor, Tensor]:
        total, count = super().loss(ids_BS, *args, **options)  # type: ignore[arg-type]
        return total * torch.rand(()), count


def test_a_run_that_draws_goes_on_to_the_bit(run: Config, tmp_path: Path) -> None:
    train(run, Rendezvous(), Parts(model_class=Noisy))
    whole, last = tiny_run.log_of(tmp_path / "run"), tiny_run.hashes(tmp_path / "run", 6)
    tiny_run.forget(tmp_path / "run", 3)
    train(run, Rendezvous(), Parts(model_class=Noisy))
    assert tiny_run.log_of(tmp_path / "run") == whole
    assert tiny_run.hashes(tmp_path / "run", 6) == last


def test_each_rank_goes_on_with_its_own_random_state(run: Config, tmp_path: Path) -> None:
    """Of 2 tensor ranks x 3 data ranks."""
    config = replace(
        run,
        parallel=ParallelConfig(tensor=2, zero=0, sequence=False),
        data=replace(run.data, global_batch=6),
        checkpoint=CheckpointConfig(resume=str(tmp_path / "saved/step-00000001")),
    )
    ranks = worlds.world(run.model, 2, 3, 0, worlds.wholes(run.model))
    states = [torch.Generator().manual_seed(100 + n).get_state() for n in range(6)]
    savers = [
        Saver(tmp_path / "saved", rank.axes, rank.sharded, zero=0, timeout_s=300) for rank in ranks
    ]
    for saver, rank, state in reversed([*zip(savers, ranks, states, strict=True)]):
        hub = run.model.to_hub("float32")
        saver.save(1, rank.owned, {"consumed_sequences": 6}, hub, "", state)
    for saver in savers:
        saver.wait()
    inputs, backend = open_inputs(config), choose("cpu", Rendezvous())
    for number, state in enumerate(states):
        data, tensor = divmod(number, 2)
        axes = Axes(
            tp=worlds.Place("tp", 2, tensor),
            data=worlds.Place("data", 3, data),
            kv=Solo("kv"),
            world=Solo("world"),
        )
        prepare(resolve(config, 6), backend, axes, inputs).saver.close()
        assert torch.equal(torch.get_rng_state(), state), (tensor, data)
