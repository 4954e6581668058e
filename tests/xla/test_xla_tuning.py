"""LoRA and QLoRA steps over replicas on torch-xla equal the whole model's in plain torch.

Samples are packed: documents apart, labels masked.  Dropout masks, dequantised weights and what the
data ranks gather are made inside the program: one program for the microsteps and one for the
update, the same on every rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

import torch
from support import ranks
from support.adapters import MODEL, base_folder, build, differences, steps
from torch import Tensor

from llamax.backends import choose
from llamax.config.schema import FinetuneConfig
from llamax.model.dropout import feature_keys, kept
from llamax.model.lora_linear import FrozenLinear
from llamax.model.recompute import Recompute
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import Rendezvous

TOLERANCE = 2e-6


class Case(NamedTuple):
    name: str
    finetune: FinetuneConfig
    mesh: Mesh
    sequence: bool = True
    recompute: Recompute = "none"
    packed: bool = True
    zero: int = 1


SHORT = dataclasses.replace(MODEL, num_hidden_layers=1)
LORA = FinetuneConfig(
    method="lora", r=4, alpha=6.0, dropout=0.25, targets="k_proj,up_proj,down_proj"
)
NF4 = dataclasses.replace(LORA, method="qlora")
INT8 = dataclasses.replace(NF4, quant="int8", dropout=0.0)
TP2_DP2 = Mesh(tp=2, dp=2)
CASES = [
    Case("lora, tp 2, dp 2", LORA, TP2_DP2, sequence=False),
    Case("lora, tp 2, dp 2, ZeRO-3", LORA, TP2_DP2, zero=3),
    Case("nf4, tp 2, dp 2, recompute full", NF4, TP2_DP2, recompute="full"),
    Case("nf4, tp 4", NF4, Mesh(tp=4)),
    Case("int8, tp 2, dp 2", INT8, TP2_DP2, packed=False),
]


def rank_as_a_number(original: Any) -> Any:
    def stays(self: Any, features: int, adapter: Any, tokens: Tensor | None) -> Tensor | None:
        if tokens is None or self.column:
            return original(self, features, adapter, tokens)
        first = torch.zeros_like(self.tp.rank_index) + self.tp.rank * features
        return kept(tokens, feature_keys(adapter.number, features, first), self.dropout.p)

    return stays


MUTATIONS: dict[str, Any] = {
    "none": FrozenLinear.stays,
    "rank as a number": rank_as_a_number(FrozenLinear.stays),
}


def on_replicas(rank: int, folder: Path, cases: list[Case], mutation: str) -> list[dict[str, Any]]:
    results = []
    backend = choose("xla", Rendezvous(rank=rank, world_size=cases[0].mesh.world_size))
    with mock.patch.object(FrozenLinear, "stays", MUTATIONS[mutation]):
        for case in cases:
            kv = max(1, case.mesh.tp // MODEL.num_key_value_heads)
            backend.barrier()
            before = backend.compilations()  # type: ignore[attr-defined]
            with backend.joined(replace(case.mesh, kv=kv), 60.0) as axes:
                sharded, rest = case.zero == 3, (case.sequence, case.recompute)
                model = build(folder, axes, case.finetune, *rest, sharded)
                result = steps(model, axes, 2, backend, case.packed, case.zero)
            backend.barrier()
            result["compiled"] = backend.compilations() - before  # type: ignore[attr-defined]
            results.append(result)
    return results


def test_a_tuning_step_over_replicas_equals_the_whole_step(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base", SHORT)
    by_rank = ranks.run(4, on_replicas, folder, CASES, "none")
    for case, results in zip(CASES, zip(*by_rank, strict=True), strict=True):
        model = build(folder, Axes.solo(), case.finetune)
        whole = steps(model, Axes.solo(), 1, packed=case.packed)
        for rank, mine in enumerate(results):
            tp_rank, degree = case.mesh.coordinate(rank).tp, case.mesh.tp
            found = differences(
                mine, whole, model.sharded_parameters().cuts, degree, tp_rank, TOLERANCE
            )
            assert found == [], f"{case.name}, rank {rank}"
        compiled = {result["compiled"] for result in results}
        assert compiled in ({1}, {2}), case.name  # the update may be an earlier case's program


def test_a_rank_in_the_masks_is_caught(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base", SHORT)
    case = Case("lora, tp 2", LORA, Mesh(tp=2))
    with pytest.raises(ranks.ReplicaError, match="rank 1 traced another graph than rank 0"):
        ranks.run(2, on_replicas, folder, [case], "rank as a number")
