"""The training program on replicas: as on gloo, with two programs, saved and resumed either way.

It learns what the demo learns: the standard library's sources, as ``make demo`` prepares them.
"""

from __future__ import annotations

import dataclasses
import sysconfig
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

from support import ranks
from support.tiny_run import config, log_of, torchrun, write

from llamax.__main__ import dispatch
from llamax.config.schema import CheckpointConfig, Config, ParallelConfig
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import ConfigError

STEPS, SAVED = 20, 16
TOLERANCE = 2e-6
VOCABULARY = 512


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two packages of the demo's corpus."""
    folder = tmp_path_factory.mktemp("dataset") / "data"
    sources = [str(Path(sysconfig.get_paths()["stdlib"], name)) for name in ("email", "json")]
    made = ["--out", str(folder), "--train-tokenizer", str(VOCABULARY), "--validation", "0.05"]
    assert not dispatch(["prepare", *sources, "--glob", "*.py", *made, "--bos"])
    return folder


def meshed(dataset: Path, folder: Path, tensor: int, **run: Any) -> Config:
    """Twenty steps on two ranks, two or four microsteps each, with validation."""
    cfg = config(dataset, folder, **run)
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, vocab_size=VOCABULARY, bos_token_id=1),
        parallel=ParallelConfig(tensor=tensor, sequence=True, zero=1, bucket_bytes=8192),
        checkpoint=CheckpointConfig(every=SAVED, keep=0),
        run=dataclasses.replace(cfg.run, steps=STEPS, validate_batches=2),
    )


def trained(rank: int, cfg: Config, world_size: int) -> dict[str, Any]:
    """What torch-xla counted in a run of the program."""
    import torch_xla.debug.metrics as metrics

    from llamax.train import train

    threading.current_thread().name = f"rank {rank}"
    local = dict(local_rank=rank, local_world_size=world_size)
    train(cfg, Rendezvous(rank=rank, world_size=world_size, **local))
    return {
        "compiled": metrics.counter_value("UncachedCompile"),
        "fallbacks": metrics.executed_fallback_ops(),
    }


def on_xla(cfg: Config) -> None:
    """Run ``cfg`` on replicas: two programs to train and one to validate, and nothing beside."""
    for counted in ranks.run(2, trained, cfg, 2):
        assert counted == {"compiled": 3, "fallbacks": []}


def on_gloo(cfg: Config) -> None:
    process = torchrun(2, write(cfg, Path(f"{cfg.run.folder}.toml")))
    _, told = process.communicate(timeout=1500)
    assert process.returncode == 0, told


def assert_alike(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in one] == [record["step"] for record in other]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=TOLERANCE), (mine["step"], key)


def test_twenty_steps_as_on_gloo_and_on_from_each_others_checkpoints(
    dataset: Path, tmp_path: Path
) -> None:
    """Trained with tensor 2, resumed with data 2 and ZeRO-1."""
    xla, gloo = tmp_path / "xla", tmp_path / "gloo"
    on_gloo(meshed(dataset, gloo, 2))
    on_xla(meshed(dataset, xla, 2, backend="xla"))
    whole = log_of(gloo)
    assert len(whole) == STEPS
    assert whole[-1]["loss"] < whole[0]["loss"]
    assert_alike(log_of(xla), whole)
    for saved, run, backend in ((gloo, on_xla, "xla"), (xla, on_gloo, "cpu")):
        folder = tmp_path / f"on {backend}"
        start = CheckpointConfig(resume=str(saved / f"checkpoints/step-{SAVED:08d}"))
        cfg = meshed(dataset, folder, 1, backend=backend)
        run(dataclasses.replace(cfg, checkpoint=start))
        assert_alike(log_of(folder), whole[SAVED:])


def refused(rank: int, cfg: Config) -> str:
    """Why a rank on a node of its own does not train."""
    from llamax.train import train

    with pytest.raises(ConfigError) as error:
        train(cfg, Rendezvous(rank=rank, world_size=2))
    return str(error.value)


def test_tensor_ranks_on_several_nodes_are_refused(dataset: Path, tmp_path: Path) -> None:
    for said in ranks.run(2, refused, meshed(dataset, tmp_path / "run", 2, backend="xla")):
        assert "parallel.tensor=2 does not divide a node of 1 rank" in said
