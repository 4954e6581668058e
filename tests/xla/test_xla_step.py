"""One training step over replicas, compiled and executed, equals the whole model's in plain torch.

Loss, norm and weights after two steps, for tensor, context and data degrees, with and without
sequence parallelism and ZeRO-1, with clipping, two microsteps, packed documents, ignored labels,
more tensor ranks than key/value heads, tied weights and full recompute; two programs are compiled
for each.
Then defects that only a traced device shows: each must be caught.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

import torch
from support import ranks
from support.models import TIED
from support.models import TINY as MODEL
from support.step_reference import GLOBAL_BATCH, OPTIM, SEQUENCE, build, share
from torch import Tensor

from llamax.backends import choose
from llamax.backends.base import EAGER_DEVICE, Backend
from llamax.backends.xla import XlaAxis
from llamax.config.model import ModelConfig
from llamax.config.types import ContextBy
from llamax.model.llama import Llama
from llamax.model.recompute import Recompute
from llamax.optim.loss_scale import LossScale, LossScaleState
from llamax.optim.zero import Zero
from llamax.parallel import context_parallel, regions, sharding, tensor_parallel
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.errors import BackendError
from llamax.training.step import TrainState

TOLERANCE = 1e-6
STEPS = 2


class Case(NamedTuple):
    name: str
    model: ModelConfig
    mesh: Mesh
    sequence: bool
    zero: int = 1
    accumulation: int = 2
    recompute: Recompute = "none"
    dtype: torch.dtype = torch.float32
    by: ContextBy = "gather"


TP2, TP4, TP2_DP2 = Mesh(tp=2), Mesh(tp=4), Mesh(tp=2, dp=2)
TP2_CP2 = Mesh(tp=2, cp=2)
CASES = [
    Case("tp 2", MODEL, TP2, False),
    Case("tp 2, sequence, recompute full", MODEL, TP2, True, recompute="full"),
    Case("tp 2, sequence, selective", MODEL, TP2, True, recompute="selective"),
    Case("dp 2", MODEL, Mesh(dp=2), False),
    Case("tp 4", MODEL, TP4, False),
    Case("tp 4, sequence, tied", TIED, TP4, True),
    Case("tp 2, dp 2", MODEL, TP2_DP2, False),
    Case("tp 2, dp 2, sequence, recompute full", MODEL, TP2_DP2, True, recompute="full"),
    Case("tp 2, dp 2, sequence, without ZeRO-1", MODEL, TP2_DP2, True, False, 1),
    Case("dp 2, ZeRO-2", MODEL, Mesh(dp=2), False, 2),
    Case("dp 2, ZeRO-3", MODEL, Mesh(dp=2), False, 3, recompute="full"),
    Case("dp 4, ZeRO-3, tied", TIED, Mesh(dp=4), False, 3, recompute="full"),
    Case("tp 2, dp 2, sequence, ZeRO-2", MODEL, TP2_DP2, True, 2),
    Case("tp 2, dp 2, sequence, ZeRO-3", MODEL, TP2_DP2, True, 3, recompute="full"),
    Case("tp 2, dp 2, ZeRO-2, a shared key/value head", TIED, TP2_DP2, True, 2),
    Case("tp 2, dp 2, ZeRO-3, the same", TIED, TP2_DP2, True, 3, recompute="full"),
    Case("cp 2, dp 2, ZeRO-3", MODEL, Mesh(cp=2, dp=2), False, 3, recompute="full"),
    Case("dp 4 in groups of 2", TIED, Mesh(dp=4, shard=2), False, 1),
    Case("dp 4 in groups of 2, ZeRO-3", MODEL, Mesh(dp=4, shard=2), False, 3, recompute="full"),
    Case("cp 2, dp 2 in groups of 2, ZeRO-2", MODEL, Mesh(cp=2, dp=2, shard=2), False, 2),
    Case("cp 2", MODEL, Mesh(cp=2), False),
    Case("cp 4", MODEL, Mesh(cp=4), False, accumulation=4),
    Case("cp 2, dp 2, selective", TIED, Mesh(cp=2, dp=2), False, recompute="selective"),
    Case("tp 2, cp 2, sequence, recompute full", MODEL, TP2_CP2, True, recompute="full"),
    Case("cp 2, ring", MODEL, Mesh(cp=2), False, by="ring"),
    Case("cp 4, ring", MODEL, Mesh(cp=4), False, accumulation=4, by="ring"),
    Case("tp 2, cp 2, ring", MODEL, TP2_CP2, True, recompute="full", by="ring"),
    Case("cp 2, dp 2, ring", TIED, Mesh(cp=2, dp=2), False, recompute="selective", by="ring"),
]


def steps(case: Case, axes: Axes, backend: Backend | None) -> dict[str, Any]:
    """Losses, norms and weights; on ``backend``'s device, or eagerly on this CPU."""
    model = build(case.model, axes, case.sequence).to(case.dtype)
    model.model.mode = case.recompute
    optimizer = Zero(
        model.sharded_parameters(),
        OPTIM,
        axes,
        sequence_parallel=model.sequence_parallel,
        zero=case.zero,
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
        context_by=case.by,
    )
    batches = share(axes, case.accumulation)
    found = [state.step(batches, number) for number in range(1, STEPS + 1)]
    return {
        "loss": [float(step.loss.cpu()) for step in found],
        "norm": [float(step.grad_norm.cpu()) for step in found],
        "weights": weights(model),
    }


def weights(model: Llama) -> dict[str, Tensor]:
    """The weights on this rank, of ZeRO-3 its runs."""
    stores = {
        f"{name}.weight": store
        for name, module in model.named_modules()
        if (store := getattr(module, "store", None))
    }
    return {
        name: (stores[name].local if name in stores else p).detach().cpu()
        for name, p in model.named_parameters()
    }


def on_replicas(rank: int, cases: list[Case], mutation: str) -> list[dict[str, Any]]:
    results = []
    mesh = cases[0].mesh
    backend = choose("xla", Rendezvous(rank=rank, world_size=mesh.world_size))
    with MUTATIONS[mutation]():
        for case in cases:
            kv = max(1, case.mesh.tp // case.model.num_key_value_heads)
            backend.barrier()
            before = backend.compilations()  # type: ignore[attr-defined]
            with backend.joined(replace(case.mesh, kv=kv), 60.0) as axes:
                result = steps(case, axes, backend)
            backend.barrier()
            result["compiled"] = backend.compilations() - before  # type: ignore[attr-defined]
            results.append(result)
    return results


def run_of(share: Tensor, length: int, mesh: Mesh, rank: int) -> Tensor:
    """The elements of a tensor rank's share that a data rank keeps in ZeRO-3."""
    ranks, place = mesh.owners, mesh.coordinate(rank)
    padding = (0, ranks * length - share.numel())
    runs = torch.nn.functional.pad(share.flatten(), padding).chunk(ranks)
    return runs[(place.dp * mesh.cp + place.cp) % ranks]


def differences(case: Case, results: list[dict[str, Any]], tolerance: float) -> list[str]:
    """What differs between the replicas' steps and the whole model's, a line each."""
    whole = steps(case._replace(mesh=Mesh(), accumulation=1, recompute="none"), Axes.solo(), None)
    shards = build(case.model, Axes.solo(), False).sharded_parameters().cuts
    found = []
    for rank, mine in enumerate(results):
        tp_rank = case.mesh.coordinate(rank).tp
        for name, theirs in whole["weights"].items():
            expected = sharding.cut(theirs, shards[name], case.mesh.tp, tp_rank)
            ours = mine["weights"][name]
            if ours.dim() < expected.dim():
                expected = run_of(expected, len(ours), case.mesh, rank)
            error = (ours - expected).abs().max() / theirs.abs().max()
            if not error <= tolerance:
                found.append(f"rank {rank} {name} {error:.1e}")
        for what in ("loss", "norm"):
            for n, (a, b) in enumerate(zip(mine[what], whole[what], strict=True), 1):
                if not abs(a - b) <= 2 * tolerance * abs(b):
                    found.append(f"rank {rank} {what} of step {n}: {a!r} {b!r}")
    return found


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_sharded_step_equals_the_whole_step(world_size: int, context: bool) -> None:
    cases = [case for case in CASES if case.mesh.world_size == world_size]
    cases = [case for case in cases if (case.mesh.cp > 1) == context]
    by_rank = ranks.run(world_size, on_replicas, cases, "none")
    updates = set()
    for case, results in zip(cases, zip(*by_rank, strict=True), strict=True):
        assert differences(case, list(results), TOLERANCE) == [], case.name
        mesh = case.mesh  # gradients are summed over dp and cp alike
        groups = mesh.owners, mesh.copies
        update = (case.model, mesh.tp, groups, case.sequence, case.zero)
        programs = 1 if update in updates else 2  # recompute does not change the update's
        assert {result["compiled"] for result in results} == {programs}, case.name
        updates.add(update)


def test_bfloat16_with_masters() -> None:
    case = Case("bf16", MODEL, TP2_DP2, True, dtype=torch.bfloat16)
    results = ranks.run(4, on_replicas, [case], "none")
    assert differences(case, [result[0] for result in results], 2e-2) == []


def scaled(_: int) -> tuple[list[list[float]], int]:
    """An overflow, then two updates, the second of which doubles the scale; and the programs."""
    backend = choose("xla", Rendezvous())
    with backend.joined(Mesh(), 60.0) as axes:
        model = build(MODEL, axes, False).to(torch.float16)
        optimizer = Zero(model.sharded_parameters(), OPTIM, axes, sequence_parallel=False)
        optimizer.to(backend.device)
        state = TrainState(
            model,
            optimizer,
            axes,
            backend,
            step_tokens=GLOBAL_BATCH * SEQUENCE,
            learning_rate=lambda step: OPTIM.lr,
            loss_scale=LossScale(LossScaleState(2.0**30), backend.device, 2),
        )
        before, seen = backend.compilations(), []
        for number in (1, 2, 3):
            step = state.step(share(axes, 2), number)
            seen.append([float(x.cpu()) for x in step.loss_scale])
            if number == 1 and state.loss_scale is not None:
                state.loss_scale.load(LossScaleState(1024.0))
        return seen, backend.compilations() - before


def test_a_loss_scale_is_part_of_the_two_programs() -> None:
    [(seen, programs)] = ranks.run(1, scaled)
    assert seen == [[2.0**29, 0.0, 1.0], [1024.0, 1.0, 0.0], [2048.0, 0.0, 0.0]]
    assert programs == 2


def two_processes(_: int) -> str:
    with pytest.raises(BackendError) as caught:
        choose("xla", Rendezvous(rank=0, world_size=2))
    return str(caught.value)


def test_processes_that_nothing_joins_are_refused() -> None:
    assert ranks.run(1, two_processes) == [
        "run.backend=xla: torch-xla has a world of 1, the launcher one of 2; without NeuronCores "
        "every process is a world of one: start one rank, or use run.backend=cpu"
    ]


# --- planted defects -----------------------------------------------------------------------------


def rank_number(ids: Tensor, rows: int, axis: Any) -> Any:
    local = ids - axis.rank * rows
    first = torch.zeros_like(local)
    elsewhere = (local < first) | (local >= first + rows)
    return torch.where(elsewhere, first, local), elsewhere


def step_number(original: Callable[..., Any]) -> Callable[..., Any]:
    calls = itertools.count(1)

    def step(self: Zero, lr: Tensor, number: Tensor, *more: Any) -> Tensor:
        return original(self, lr, torch.full_like(number, next(calls) // 2), *more)

    return step


def reads_the_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Zero, *arguments: Tensor) -> Tensor:
        norm = original(self, *arguments)
        return norm if norm.item() >= 0 else norm * 0

    return step


def falls_back(original: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Zero, *arguments: Tensor) -> Tensor:
        norm = original(self, *arguments)
        return norm + torch.linalg.eigvals(torch.eye(2, device=norm.device)).real.sum() * 0

    return step


def twice(original: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(self: Zero, group: Any, bucket: Any) -> list[Tensor]:
        return [part * 2 for part in original(self, group, bucket)]

    return reduce


def cut_by_number(
    axis: Any, documents: Tensor | None = None, by: ContextBy = "gather"
) -> context_parallel.Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        k, v = (regions.collect(x, axis, 1) for x in (k, v))
        return context_parallel._by_chunks(q, k, v, documents, axis)

    return attend


def left_out(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, x, dim: original(self, x, dim) * 0 + x.chunk(self.size, dim)[0]


MUTATIONS: dict[str, Callable[[], Any]] = {
    "none": lambda: mock.patch.object(tensor_parallel, "local_ids", tensor_parallel.local_ids),
    "rank as a number": lambda: mock.patch.object(tensor_parallel, "local_ids", rank_number),
    "context rank as a number": lambda: mock.patch.object(
        context_parallel, "across", cut_by_number
    ),
    "step as a number": lambda: mock.patch.object(Zero, "step", step_number(Zero.step)),
    "value read in a step": lambda: mock.patch.object(Zero, "step", reads_the_norm(Zero.step)),
    "operation on the host": lambda: mock.patch.object(Zero, "step", falls_back(Zero.step)),
    "gradient counted twice": lambda: mock.patch.object(Zero, "_reduce", twice(Zero._reduce)),
    "reduce-scatter without a sum": lambda: mock.patch.object(
        XlaAxis, "reduce_scatter", left_out(XlaAxis.reduce_scatter)
    ),
}
SMALL = Case("small", TIED, Mesh(tp=2), True, accumulation=1)
CUT = Case("cut", TIED, Mesh(cp=2), False, accumulation=1)
ALONE = Case("alone", TIED, Mesh(), False, accumulation=1)


@pytest.mark.parametrize("mutation", ["gradient counted twice", "reduce-scatter without a sum"])
def test_wrong_numbers_are_caught(mutation: str) -> None:
    results = ranks.run(2, on_replicas, [SMALL], mutation)
    assert differences(SMALL, [result[0] for result in results], TOLERANCE)


def test_a_rank_in_the_program_is_caught() -> None:
    with pytest.raises(ranks.ReplicaError, match="rank 1 traced another graph than rank 0"):
        ranks.run(2, on_replicas, [SMALL], "rank as a number")


def test_a_context_rank_in_the_program_is_caught() -> None:
    with pytest.raises(ranks.ReplicaError, match="rank 1 traced another graph than rank 0"):
        ranks.run(2, on_replicas, [CUT], "context rank as a number")


def test_a_step_in_the_program_is_caught() -> None:
    results = ranks.run(1, on_replicas, [ALONE], "step as a number")
    assert results[0][0]["compiled"] == 3


@pytest.mark.parametrize(
    ("mutation", "operation"),
    [
        ("value read in a step", "aten::_local_scalar_dense"),
        ("operation on the host", "aten::linalg_eig"),
    ],
)
def test_what_runs_on_the_host_ends_the_run(mutation: str, operation: str) -> None:
    with pytest.raises(ranks.ReplicaError, match=f"{operation}.* ran on the host in a step"):
        ranks.run(1, on_replicas, [ALONE], mutation)


def test_a_value_read_by_replicas_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(ranks.ReplicaError, match=r"norm\.item"):
        ranks.run(2, on_replicas, [SMALL], "value read in a step")
