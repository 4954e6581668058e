"""Skipped outliers on devices that trace programs: no further program, and no trace of a skip."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

import torch
from support import ranks
from support.spikes import SPIKES, train
from support.spiky_llama import SpikyLlama, make_spiky
from support.tiny_run import config, log_of

from llamax.backends import choose
from llamax.config.schema import Config, ParallelConfig
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.train import train as train_program
from llamax.training.parts import Parts

MESHES = [(Mesh(tp=2, dp=2), 1), (Mesh(dp=4), 0), (Mesh(dp=4), 2), (Mesh(dp=2, tp=2), 3)]


def on_replicas(rank: int, meshes: list[tuple[Mesh, int]]) -> list[tuple[Any, ...]]:
    """Of each mesh: skipped and unchanged steps, whether nothing else changed, and programs."""
    results = []
    for mesh, zero in meshes:
        backend = choose("xla", Rendezvous(rank=rank, world_size=mesh.world_size))
        backend.barrier()
        before = backend.compilations()
        with backend.joined(mesh, 60.0) as own:
            skipped, unchanged, state = train(own, zero, mesh.world_size - 1, None, backend)
            backend.barrier()
            compiled = backend.compilations() - before
            clean = train(own, zero, None, None, backend)
        backend.barrier()
        compiled_clean = backend.compilations() - before - compiled
        equal = all(map(torch.equal, state, clean[2]))
        results.append((skipped, unchanged, clean[0], equal, compiled, compiled_clean))
    return results


def test_a_skipped_step_leaves_no_trace_and_compiles_nothing() -> None:
    expected = (SPIKES, SPIKES, [], True, 2, 0)
    assert ranks.run(4, on_replicas, MESHES) == 4 * [[expected] * len(MESHES)]


def gone_back(rank: int, cfg: Config) -> tuple[Any, ...]:
    """Programs compiled by a run of two replicas, and what rank 0 warned of."""
    import torch_xla.debug.metrics as metrics

    warned: list[str] = []
    if rank == 0:
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("llamax").addHandler(handler)
    threading.current_thread().name = f"rank {rank}"
    where = Rendezvous(rank=rank, world_size=2, local_rank=rank, local_world_size=2)
    train_program(cfg, where, Parts(SpikyLlama))
    fallbacks = metrics.executed_fallback_ops()
    return metrics.counter_value("UncachedCompile"), fallbacks, warned


def test_replicas_go_back_together(tmp_path: Path) -> None:
    """Two skips in a row: back to the checkpoint and on, as one rank of a CPU does."""
    plain = config(tmp_path / "data", tmp_path / "plain")
    plain = replace(
        plain,
        parallel=ParallelConfig(bucket_bytes=8192),
        optim=replace(plain.optim, skip_spikes="both", spike_window=16, rewind=2),
        run=replace(plain.run, steps=14, validate_every=0),
        checkpoint=replace(plain.checkpoint, every=5),
    )
    make_spiky(tmp_path / "data", plain, (12, 13), 4 * 20)
    train_program(plain, Rendezvous(), Parts(SpikyLlama))
    run = replace(plain.run, folder=str(tmp_path / "traced"), backend="xla")
    found = ranks.run(2, gone_back, replace(plain, run=run))
    assert [each[:2] for each in found] == 2 * [(2, [])]
    saved = tmp_path / "traced/checkpoints/step-00000010"
    told = f"2 steps in a row were skipped: back to {saved}, and on with the samples after step 13"
    assert told in found[0][2]
    one, other = (log_of(tmp_path / name) for name in ("plain", "traced"))
    assert [r["step"] for r in other] == [r["step"] for r in one] == [*range(1, 15)]
    assert one[-1]["rewinds"] == other[-1]["rewinds"] == 1
    for a, b in zip(one, other, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-6)
        assert b["consumed_tokens"] == a["consumed_tokens"]
