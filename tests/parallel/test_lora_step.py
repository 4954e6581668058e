"""A LoRA or QLoRA step on a mesh of ranks equals the step of the whole model, dropout included.

Losses, norms and every adapter after two steps, for tensor x data degrees with and without sequence
parallelism, then the same with a defect planted in the ranks: it must fail for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.adapters import (
    GLOBAL_BATCH,
    MODEL,
    SEQUENCE,
    base_folder,
    batch,
    build,
    differences,
    steps,
)
from support.metering import Meter, Metered
from support.planted import replaced
from support.world import Worlds, axes
from torch import Tensor

from llamax.config.schema import FinetuneConfig
from llamax.model import dropout, lora
from llamax.model import qlora as base
from llamax.model.llama import Llama
from llamax.model.lora_linear import FrozenLinear
from llamax.model.qlora import Nf4, Share, expected, held, share_of
from llamax.parallel import sharding
from llamax.parallel.collectives import Axes
from llamax.parallel.fsdp import FsdpTensor
from llamax.parallel.mesh import Mesh

LORA = FinetuneConfig(method="lora", r=4, alpha=6.0, dropout=0.25)
SOME = FinetuneConfig(method="lora", r=2, alpha=3.0, rslora=True, targets="q_proj,v_proj,down_proj")
NF4 = FinetuneConfig(method="qlora", r=4, alpha=6.0, dropout=0.25)
SINGLE = FinetuneConfig(method="qlora", r=2, double_quant=False, targets="k_proj,up_proj")
INT8 = FinetuneConfig(method="qlora", r=4, quant="int8", shard_base=False)
TOLERANCE = 3e-6


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base") / "hub")


def on_mesh(
    folder: Path, mesh: Mesh, sequence: bool, cases: list[tuple[FinetuneConfig, str]], mutation: str
) -> list[str]:
    """On a rank: the differences from the steps of the whole model, one line each.

    With sequence parallelism samples are packed, without they are one document each.
    """
    found, my_axes = [], axes(mesh, max(1, mesh.tp // MODEL.num_key_value_heads))
    for finetune, recompute in cases:
        whole = steps(build(folder, Axes.solo(), finetune), Axes.solo(), 1, packed=sequence)
        with MUTATIONS[mutation]():
            model = build(folder, my_axes, finetune, sequence, recompute)
            mine = steps(model, my_axes, 2, packed=sequence)
        found += differences(
            mine, whole, model.sharded_parameters().cuts, mesh.tp, my_axes.tp.rank, TOLERANCE
        )
    return found


MESHES = [(Mesh(dp=2), True), (Mesh(tp=4, dp=2), True)]
MESHES += [(Mesh(tp=tp, dp=dp), on) for tp, dp in ((2, 1), (2, 2), (4, 1)) for on in (True, False)]


@pytest.mark.parametrize("cases", [[LORA, SOME], [NF4, SINGLE, INT8]], ids=["lora", "qlora"])
@pytest.mark.parametrize(
    ("mesh", "sequence"), MESHES, ids=lambda x: str(x) if isinstance(x, bool) else f"{x.tp}x{x.dp}"
)
def test_sharded_steps_equal_the_whole_steps(
    worlds: Worlds, folder: Path, mesh: Mesh, sequence: bool, cases: list[FinetuneConfig]
) -> None:
    modes = ("full", "selective", "none") if mesh.world_size == 4 else ("none",) * 3
    pairs = list(zip(cases, modes, strict=False))
    world = worlds(mesh.world_size)
    for found in world.run(on_mesh, folder, mesh, sequence, pairs, "none"):
        assert found == []


# --- planted defects -----------------------------------------------------------------------------


def whole_factor_not_summed() -> Any:
    return replaced(lora, "Replica", lambda partial: sharding.Replica())


def rank_forgotten_in_masks(self: Any, features: int, adapter: Any, tokens: Any) -> Tensor | None:
    if tokens is None:
        return None
    keys = dropout.feature_keys(adapter.number, features, torch.tensor(0))
    return dropout.kept(tokens, keys, self.dropout.p)


def without_sum(original: Callable[..., Any]) -> Callable[..., Any]:
    def scattered(self: Any, dx: Tensor) -> Tensor:
        if self.column and not self.sequence_parallel:
            return dx
        return original(self, dx)

    return scattered


def sample_forgotten(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, step, first, count: original(self, step, 0, count)


def first_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, number: original(self, number) * 0


def own_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    """Columns counted from the share's own first, so that blocks begin there."""

    def share_of(part: Any, shape: Any, degree: int, rank: int) -> Share:
        found = original(part, shape, degree, rank)
        return found._replace(column=found.column // 64 * 64)

    return share_of


MUTATIONS: dict[str, Callable[[], Any]] = {
    "none": lambda: replaced(lora, "Replica", sharding.Replica),
    "gradient of whole factors not summed": whole_factor_not_summed,
    "masks of a row's columns alike on all ranks": lambda: replaced(
        FrozenLinear, "stays", rank_forgotten_in_masks
    ),
    "input gradient not summed": lambda: replaced(
        FrozenLinear, "scattered", without_sum(FrozenLinear.scattered)
    ),
    "masks alike on all data ranks": lambda: replaced(
        dropout.Dropout, "keys", sample_forgotten(dropout.Dropout.keys)
    ),
    "another scale": lambda: replaced(lora, "scale", lambda finetune: finetune.alpha / 2),
    "scales of the first rank's blocks": lambda: replaced(Nf4, "_places", first_rows(Nf4._places)),
    "blocks begin at a share": lambda: replaced(base, "share_of", own_blocks(share_of)),
    "a data rank's run alone": lambda: replaced(
        FsdpTensor, "gather", lambda self: self.local.repeat(self.shard.size)[: self.length]
    ),
}
IN_BASE = (
    "scales of the first rank's blocks",
    "blocks begin at a share",
    "a data rank's run alone",
)
PLAIN = ("input gradient not summed", "gradient of whole factors not summed")


@pytest.mark.parametrize("mutation", [name for name in MUTATIONS if name != "none"])
def test_a_planted_defect_is_caught(worlds: Worlds, folder: Path, mutation: str) -> None:
    mesh = Mesh(tp=4) if mutation == "blocks begin at a share" else Mesh(tp=2, dp=2)
    cases = [(NF4 if mutation in IN_BASE else LORA, "none")]
    sequence = mutation not in PLAIN
    assert any(worlds(4).run(on_mesh, folder, mesh, sequence, cases, mutation))


# --- what is sent --------------------------------------------------------------------------------


def sent(sequence: bool, adapters: bool) -> dict[tuple[str, str], int]:
    """Bytes that this rank sends in a forward and a backward pass over a frozen model."""
    meter = Meter()
    tp = Metered(axes(Mesh(tp=2)).tp, meter)
    model = Llama(MODEL, tp, sequence_parallel=sequence).init(0)
    targets = lora.LINEAR if adapters else ()
    with mock.patch.object(lora, "target_names", return_value=targets):
        lora.adapt(model, FinetuneConfig(r=4), torch.empty(0))
    lora.init(model, 0)
    whole = batch()
    x = model.model.embed_tokens.weight.requires_grad_()  # so that backward runs to the end
    model.loss(whole.ids, whole.labels)[0].backward()
    assert x.grad is not None
    return dict(meter.sent_bytes)


@pytest.mark.parametrize("sequence", [True, False], ids=["sequence", "plain"])
def test_adapters_send_nothing_but_the_second_gather(worlds: Worlds, sequence: bool) -> None:
    """A's gradient wants the gathered input again; a frozen layer alone does not."""
    again = 2 * MODEL.num_hidden_layers * GLOBAL_BATCH * SEQUENCE * MODEL.hidden_size * 4 // 2
    bare, adapted = worlds(2).run(sent, sequence, False)[0], worlds(2).run(sent, sequence, True)[0]
    if sequence:
        adapted["tp", "all_gather"] -= again
    assert adapted == bare


# --- where the base lies -------------------------------------------------------------------------


def dense(folder: Path, mesh: Mesh, finetune: FinetuneConfig) -> list[str]:
    """On a rank: layers with a wrong share of the whole, and unexpected byte counts."""
    my_axes = axes(mesh, max(1, mesh.tp // MODEL.num_key_value_heads))
    mine, whole = build(folder, my_axes, finetune), build(folder, Axes.solo(), finetune)
    found = []
    for name, layer in mine.named_modules():
        if isinstance(layer, FrozenLinear):
            other = whole.get_submodule(name).dense()
            if not torch.equal(
                layer.dense(), sharding.cut(other, layer.shard, mesh.tp, my_axes.tp.rank)
            ):
                found.append(name)
    formula = expected(MODEL, finetune, mesh.tp, mesh.dp, 4)
    if held(mine) != formula[:2]:
        found.append(f"{held(mine)} bytes, {formula} expected")
    largest = max(m.dense().nbytes for m in mine.modules() if isinstance(m, FrozenLinear))
    if largest != formula.dense:
        found.append(f"a layer is {largest} bytes, {formula.dense} expected")
    return found


@pytest.mark.parametrize("finetune", [NF4, SINGLE, INT8], ids=["nf4", "single", "int8"])
@pytest.mark.parametrize("mesh", [Mesh(tp=4), Mesh(tp=2, dp=2), Mesh(dp=4)], ids=str)
def test_a_base_is_the_same_on_every_mesh_and_takes_the_expected_bytes(
    worlds: Worlds, folder: Path, mesh: Mesh, finetune: FinetuneConfig
) -> None:
    for found in worlds(4).run(dense, folder, mesh, finetune):
        assert found == []


def test_a_sharded_base_is_smaller_than_a_whole_one() -> None:
    wide = FinetuneConfig(method="qlora")
    one, four = (expected(MODEL, wide, 1, data, 2).quantised for data in (1, 4))
    assert 3.5 < one / four < 4.0
    bits = 8 * one / (MODEL.num_parameters() - 2 * 61 * 128)
    assert 4.1 < bits < 4.3
