"""One training step of pipeline stages, compiled and executed, equals the whole model's.

Loss, norm, validation loss and weights after two steps, beside tensor, sequence, context and data
parallelism, packed documents and ignored labels; and the number of programs that are compiled.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

from support import ranks
from support.meeting import meeting
from support.models import tiny
from support.step_reference import GLOBAL_BATCH, OPTIM, SEQUENCE, build, share

from llamax.backends import choose
from llamax.backends.base import EAGER_DEVICE, Backend
from llamax.config.model import ModelConfig
from llamax.config.rules.pipeline import evenly
from llamax.optim.zero import Zero
from llamax.parallel import sharding
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.training import pipeline
from llamax.training.compile_guard import all_programs
from llamax.training.step import TrainState

MODEL = tiny(num_hidden_layers=4)
TOLERANCE = 2e-6
STEPS = 2


class Case(NamedTuple):
    mesh: Mesh
    sequence: bool
    accumulation: int
    layers: tuple[int, ...] | None = None
    tied: bool = False

    @property
    def model(self) -> ModelConfig:
        layers = sum(self.layers or (4,))
        return replace(MODEL, num_hidden_layers=layers, tie_word_embeddings=self.tied)


def steps(case: Case, axes: Axes, backend: Backend | None) -> dict[str, Any]:
    """Losses, norms and weights; on ``backend``'s device, or eagerly on this CPU."""
    axes = axes if backend is None else pipeline.apart(axes, backend.step_boundary)
    model = build(case.model, axes, case.sequence, case.layers)
    model.model.mode = "none" if backend is None else "full"
    optimizer = Zero(
        model.sharded_parameters(),
        OPTIM,
        axes,
        sequence_parallel=model.sequence_parallel,
        bucket_bytes=4096,
    )
    if backend is not None:
        optimizer.to(backend.device)
    state = TrainState(
        model,
        optimizer,
        axes,
        backend or EAGER_DEVICE,
        step_tokens=GLOBAL_BATCH * SEQUENCE,
        learning_rate=lambda step: OPTIM.lr,
    )
    label(state)
    batches = share(axes, case.accumulation)
    found = [state.step(batches, number) for number in range(1, STEPS + 1)]
    ranks.LABEL.validates = True
    validation = state.validate([batches, batches])
    return {
        "loss": [float(step.loss.cpu()) for step in found] + [float(validation.cpu())],
        "norm": [float(step.grad_norm.cpu()) for step in found],
        "weights": {name: p.detach().cpu() for name, p in model.named_parameters()},
    }


def label(state: TrainState) -> None:
    """Let the programs of a stage's passes and swaps have names."""
    stage = state._stage
    forward, backward, swap = stage._forward, stage._backward, stage._swap
    number = stage.number
    ranks.LABEL.now, ranks.LABEL.validates = "update", False

    def boundary() -> None:
        state.backend.step_boundary()
        ranks.LABEL.now = "update"

    def passing(kind: str, function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            prefix = "validation " if ranks.LABEL.validates else ""
            chunk = f".{arguments[0].chunk}" if kind != "swap" else ""
            ranks.LABEL.now = f"{prefix}{kind} {number}{chunk}"
            return function(*arguments)

        return run

    stage.boundary = boundary
    stage._forward = passing("forward", forward)  # type: ignore[method-assign]
    stage._backward = passing("backward", backward)  # type: ignore[method-assign]
    stage._swap = passing("swap", swap)  # type: ignore[method-assign]


def on_replicas(rank: int, case: Case) -> dict[str, Any]:
    backend = choose("xla", Rendezvous(rank=rank, world_size=case.mesh.world_size))
    kv = MODEL.kv_replicas(case.mesh.tp)
    with backend.joined(replace(case.mesh, kv=kv), 60.0) as axes:
        result = steps(case, meeting(axes, case.mesh), backend)
    backend.barrier()
    result["programs"] = [name for _, name in ranks.PROGRAMS]
    return result


def differences(case: Case, results: list[dict[str, Any]]) -> list[str]:
    """What differs between the replicas' steps and the whole model's, a line each."""
    layers = (case.model.num_hidden_layers,)
    whole = steps(case._replace(mesh=Mesh(), accumulation=1, layers=layers), Axes.solo(), None)
    cuts = build(case.model, Axes.solo(), False).sharded_parameters().cuts
    found, held = [], set[str]()
    for rank, mine in enumerate(results):
        tp_rank = case.mesh.coordinate(rank).tp
        for name, ours in mine["weights"].items():
            theirs = whole["weights"][name]
            expected = sharding.cut(theirs, cuts[name], case.mesh.tp, tp_rank)
            error = (ours - expected).abs().max() / theirs.abs().max()
            if not error <= TOLERANCE:
                found.append(f"rank {rank} {name} {error:.1e}")
            held.add(name)
        for what in ("loss", "norm"):
            for n, (a, b) in enumerate(zip(mine[what], whole[what], strict=True), 1):
                if not abs(a - b) <= 2 * TOLERANCE * abs(b):
                    found.append(f"rank {rank} {what} of step {n}: {a!r} {b!r}")
    return found + sorted(whole["weights"].keys() - held)


@pytest.mark.parametrize(
    "case",
    [
        Case(Mesh(pp=2, tp=2), True, 4),
        Case(Mesh(pp=4), False, 4),
        Case(Mesh(pp=3, tp=2), True, 2, (2, 1, 1)),
        Case(Mesh(pp=2, cp=2), False, 2),
        Case(Mesh(pp=2, dp=2), False, 2),
        Case(Mesh(pp=2, tp=2, ends=True), True, 4, (1, 1, 1, 1)),
        Case(Mesh(pp=3, tp=2, ends=True), True, 4, (1, 1, 1, 1, 1, 1)),
        Case(Mesh(pp=3, tp=2, ends=True), True, 4, (2, 1, 1), tied=True),
    ],
    ids=lambda case: (
        f"pp{case.mesh.pp}-tp{case.mesh.tp}-cp{case.mesh.cp}-dp{case.mesh.dp}"
        + ("-tied" if case.tied else "-chunks" * case.mesh.ends)
    ),
)
def test_traced_stages_step_as_one(case: Case) -> None:
    results = ranks.run(case.mesh.world_size, on_replicas, case, stages=case.mesh.pp)
    assert differences(case, results) == []
    stages, counted = case.mesh.pp, Counter(results[0]["programs"])
    passes = [name for name in counted if name.startswith(("forward", "backward"))]
    assert all(counted[name] == 1 for name in passes), "each is compiled once"
    layers = case.layers or evenly(MODEL.num_hidden_layers, stages)
    assert len(passes) == (3 if len(layers) == 2 else 5), "first, middle, last"
    swaps = [name for name in counted if "swap" in name]
    edges = min(stages - 1, 2) + (len(layers) > stages)
    assert sum(counted[name] for name in swaps) == edges, "over even edges, odd ones, and the ends"
    assert counted.total() == all_programs(stages, layers, True, case.tied)
