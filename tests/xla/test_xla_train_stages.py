"""The training program with pipeline stages, and on an odd number of replicas, as on one rank.

The records of a run equal those of one rank on gloo, and a checkpoint of stages goes on there.
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

from support import ranks
from support.meeting import joined_in_lanes
from support.tiny_run import STEPS, config, log_of, make_dataset

from llamax.config.rules.pipeline import chunk_layers
from llamax.config.schema import CheckpointConfig, Config, ParallelConfig
from llamax.parallel.rendezvous import Rendezvous
from llamax.train import train
from llamax.training.compile_guard import all_programs

SAVED = 4
TOLERANCE = 2e-6
LAYERS = 4
joining = threading.Lock()
joined = False


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


def meshed(dataset: Path, folder: Path, parallel: ParallelConfig, **run: Any) -> Config:
    cfg = config(dataset, folder, **run)
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, num_hidden_layers=LAYERS),
        parallel=parallel,
        data=dataclasses.replace(cfg.data, global_batch=12),
        checkpoint=CheckpointConfig(every=SAVED, keep=0),
        run=dataclasses.replace(cfg.run, validate_batches=2),
    )


def alone(cfg: Config) -> list[dict[str, Any]]:
    """The records of a run on this process alone."""
    train(cfg, Rendezvous(rank=0, world_size=1))
    return log_of(Path(cfg.run.folder))


def trained(rank: int, cfg: Config, world_size: int) -> int | float | None:
    """The number of programs that all replicas compiled in a run of the program."""
    import torch_xla.debug.metrics as metrics

    global joined
    with joining:
        if not joined and cfg.parallel.pipeline > 1:
            joined_in_lanes()
        joined = True
    threading.current_thread().name = f"rank {rank}"
    local = dict(local_rank=rank, local_world_size=world_size)
    train(cfg, Rendezvous(rank=rank, world_size=world_size, **local))
    compiled: int | float | None = metrics.counter_value("UncachedCompile")
    return compiled


def assert_alike(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in one] == [record["step"] for record in other]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=TOLERANCE), (mine["step"], key)


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    records = alone(meshed(dataset, tmp_path_factory.mktemp("whole") / "run", ParallelConfig()))
    assert len(records) == STEPS
    assert records[-1]["loss"] < records[0]["loss"]
    return records


@pytest.mark.parametrize(
    ("parallel", "world_size"),
    [
        (ParallelConfig(pipeline=3, layers_per_stage="2,1,1"), 6),
        (ParallelConfig(zero=1), 3),
    ],
    ids=["pipeline3-data2", "data3"],
)
def test_a_run_of_stages_is_that_of_one_rank(
    dataset: Path,
    tmp_path: Path,
    whole: list[dict[str, Any]],
    parallel: ParallelConfig,
    world_size: int,
) -> None:
    stages = parallel.pipeline
    # Replicas of all stages are in one process, so that a guard would count those of others.
    options = dict(backend="xla", recompute="full", compile_guard="off" if stages > 1 else "stop")
    cfg = meshed(dataset, tmp_path / "run", parallel, **options)
    compiled = ranks.run(world_size, trained, cfg, world_size, stages=stages)
    assert_alike(log_of(tmp_path / "run"), whole)
    assert max(compiled) == all_programs(stages, chunk_layers(parallel, LAYERS), True)
    start = CheckpointConfig(resume=str(tmp_path / f"run/checkpoints/step-{SAVED:08d}"))
    cfg = meshed(dataset, tmp_path / "alone", ParallelConfig())
    assert_alike(alone(dataclasses.replace(cfg, checkpoint=start)), whole[SAVED:])


def test_weights_that_are_cut_start_and_go_on(
    dataset: Path, tmp_path: Path, whole: list[dict[str, Any]]
) -> None:
    """With ZeRO-3 on replicas: new, then from its checkpoint."""
    options = dict(backend="xla", recompute="full", compile_guard="stop")
    cfg = meshed(dataset, tmp_path / "run", ParallelConfig(zero=3), **options)
    ranks.run(3, trained, cfg, 3)
    assert_alike(log_of(tmp_path / "run"), whole)
    start = CheckpointConfig(resume=str(tmp_path / f"run/checkpoints/step-{SAVED:08d}"))
    cfg = meshed(dataset, tmp_path / "on", ParallelConfig(zero=3), **options)
    ranks.run(3, trained, dataclasses.replace(cfg, checkpoint=start), 3)
    assert_alike(log_of(tmp_path / "on"), whole[SAVED:])
