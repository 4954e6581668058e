"""A run on a given world and data set: lengths in steps, and the planner's equals training's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_run import config, make_dataset

from llamax.cli.plan import main as plan
from llamax.config.load import dump_config, load_config, recipes
from llamax.config.rules.parallel import node_limit
from llamax.config.schema import Config
from llamax.parallel.mesh import Mesh
from llamax.runtime.errors import ConfigError
from llamax.training.inputs import open_inputs
from llamax.training.resolve import resolve, visible_samples


@pytest.fixture
def tiny(tmp_path: Path) -> Config:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        make_dataset(folder)
    return config(folders[0], tmp_path / "run")


def epochs(tiny: Config, number: int, **data: Any) -> Config:
    data = {"sequence_length": 16, **data}
    return replace(tiny, run=replace(tiny.run, epochs=number), data=replace(tiny.data, **data))


def test_numbers_of_a_recipe() -> None:
    run = resolve(load_config("llama3-8b", ["--parallel.tensor=16"]), 256)
    assert run.mesh == Mesh(tp=16, dp=16, kv=2)
    assert run.kv_replicas == 2
    data = run.config.data
    assert run.accumulation * data.micro_batch * run.mesh.dp == data.global_batch
    assert run.total_tokens == run.steps * data.global_batch * data.sequence_length
    assert (run.epochs, run.training_samples, run.epoch_ends, run.assumption) == (0, None, None, "")


def test_epochs_and_ratio_become_steps(tiny: Config) -> None:
    written = epochs(replace(tiny, optim=replace(tiny.optim, warmup_steps=0, warmup_ratio=0.1)), 3)
    batch = written.data.global_batch
    run = resolve(written, 1, 5 * batch + 1)
    assert run.steps == 16, "15 whole steps and the 3 samples that are left"
    assert run.warmup_steps == 2
    assert run.epoch_ends == (6, 11, 16)
    assert (run.epochs, run.config.run.epochs, run.config.optim.warmup_ratio) == (3, 0, 0.0)
    assert resolve(run.config, 1, 5 * batch + 1).config == run.config, "resolved once for all"


@pytest.mark.parametrize("packing", ["concat", "best-fit", "padded"])
@pytest.mark.parametrize("blend", [False, True])
def test_the_planner_counts_steps_as_training_does(
    tiny: Config, packing: str, blend: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.data.path
    path = f"0.7 {path} 0.3 {Path(path).with_name('b')}" if blend else path
    written = epochs(tiny, 3, packing=packing, path=path)
    trained = resolve(written, 2, len(open_inputs(written).training))
    seen = resolve(written, 2, *visible_samples(written))
    assert seen == trained
    assert seen.assumption == ""
    toml = Path(tiny.run.folder).with_suffix(".toml")
    toml.write_text(dump_config(written))
    assert plan(["--config", str(toml), "--ranks", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["steps"], told["tokens"]) == (trained.steps, trained.total_tokens)
    assert plan(["--config", str(toml), "--ranks", "2"]) == 0
    line = f"in {trained.steps:,} steps (3 x {trained.training_samples:,} samples): "
    assert line in capsys.readouterr().out


def test_a_data_set_out_of_sight_is_an_assumption_that_is_stated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for options in ([], ["--search"]):
        assert plan(["--config", "dolly-llama2-7b", "--data.path=nowhere", *options]) == 0
        said = capsys.readouterr().out
        assert "note: 3 epochs are taken as run.steps=1,000" in said
        assert "nowhere: is not a dataset" in said
        assert "--run.steps" in said
    assert plan(["--config", "dolly-llama2-7b", "--data.path=nowhere", "--json"]) == 0
    assert "run.steps=1,000" in json.loads(capsys.readouterr().out)["assumption"]
    assert plan(["--config", "llama2-7b", "--nodes", "4", "--data.path=nowhere"]) == 0
    assert "taken as" not in capsys.readouterr().out, "its length is given in steps"


def test_what_does_not_hold_is_refused(tiny: Config) -> None:
    with pytest.raises(ConfigError, match="does not divide the world of 3 ranks"):
        resolve(replace(tiny, parallel=replace(tiny.parallel, tensor=2)), 3)


def test_warmup_and_decay_are_cut_to_a_short_run(tiny: Config) -> None:
    long = epochs(replace(tiny, optim=replace(tiny.optim, warmup_steps=2000)), 1)
    run = resolve(long, 1, 10 * long.data.global_batch)
    assert (run.steps, run.warmup_steps) == (10, 10)
    assert run.shortened == "the run has only 10 steps: cut optim.warmup_steps from 2,000 to 10"
    assert resolve(long, 1).warmup_steps == 2000, "nothing is cut for an assumption"
    fits = replace(long, optim=replace(long.optim, warmup_steps=10))
    assert resolve(fits, 1, 10 * long.data.global_batch).shortened == ""


@pytest.mark.parametrize(
    ("steps", "warmup", "decay", "cut"),
    [
        (1000, 800, 200, (800, 200)),
        (100, 800, 200, (80, 20)),
        (10, 2000, 1, (9, 1)),
        (1, 2000, 500, (0, 1)),
    ],
)
def test_wsd_keeps_its_proportions_in_a_short_run(
    tiny: Config, steps: int, warmup: int, decay: int, cut: tuple[int, int]
) -> None:
    optim = replace(tiny.optim, schedule="wsd", warmup_steps=warmup, decay_steps=decay)
    run = resolve(replace(tiny, optim=optim, run=replace(tiny.run, steps=steps)), 1)
    assert (run.config.optim.warmup_steps, run.config.optim.decay_steps) == cut
    assert bool(run.shortened) == (cut != (warmup, decay))


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_can_run_for_ten_steps(name: str) -> None:
    written = load_config(name, ["--run.steps=10"])
    parallel = written.parallel
    world_size = parallel.tensor * parallel.context * parallel.pipeline * (parallel.zero_ranks or 1)
    run = resolve(written, world_size, written.data.global_batch * 100)
    assert (run.steps, run.epochs) == (10, 0)
    assert run.warmup_steps <= 10
    assert bool(run.shortened) == (written.optim.warmup_steps > 10)


def test_the_doctor_knows_the_checkpoints_of_epochs_it_sees(tiny: Config) -> None:
    saved = replace(tiny.checkpoint, every=4, each_epoch=True, keep=0)
    written = replace(epochs(tiny, 3), checkpoint=saved)
    batch = written.data.global_batch
    # 15 steps: saved at 4, 8, 12, at the ends 5, 10, 15
    assert resolve(written, 1, 5 * batch).most_checkpoints == 6


def test_tensor_and_context_ranks_share_a_node_on_trainium(tiny: Config) -> None:
    two = replace(tiny, parallel=replace(tiny.parallel, tensor=2))
    for backend in ("xla", "neuron"):
        with pytest.raises(ConfigError, match="does not divide a node of 1 rank, and tensor ranks"):
            resolve(two, 2, node_ranks=node_limit(backend, 1))
        assert resolve(two, 2, node_ranks=node_limit(backend, 2)).mesh.tp == 2
    for backend in ("cpu", "cuda"):  # gloo and NCCL: slowly, but right
        assert resolve(two, 2, node_ranks=node_limit(backend, 1)).mesh.tp == 2
