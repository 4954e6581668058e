"""Skipped outliers on devices that trace programs: no further program, and no trace of a skip."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

import torch
from support import ranks
from support.runs import on_mesh
from support.spikes import SPIKES, train
from support.tiny_run import config, make_dataset

from llamax.backends import choose
from llamax.config.hardware import load_machine
from llamax.config.schema import OptimConfig, ParallelConfig
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.tools.audit.auditor import audit_run

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


@pytest.mark.parametrize("mesh", [Mesh(tp=2, dp=2), Mesh(tp=2, pp=2)])
def test_the_audit_finds_the_same_programs(tmp_path: Any, mesh: Mesh) -> None:
    folder = make_dataset(tmp_path)
    plain = config(folder, folder / "run", backend="xla")
    plain = replace(plain, parallel=ParallelConfig(tensor=2, bucket_bytes=8192))
    skipping = replace(plain, optim=OptimConfig(skip_spikes="both", spike_window=16))
    off, on = (
        audit_run(on_mesh(each, mesh), load_machine("trn1.32xlarge")) for each in (plain, skipping)
    )
    assert on.problems == off.problems == []
    assert [kind.name for kind in on.kinds] == [kind.name for kind in off.kinds]
    for kind, plainly in zip(on.kinds, off.kinds, strict=True):
        assert len(kind.traced) == len(plainly.traced)
        assert sum(each.count for each in kind.collectives) == sum(
            each.count for each in plainly.collectives
        )
        if kind.formula is not None:
            assert set(kind.formula) == set(kind.collectives)
