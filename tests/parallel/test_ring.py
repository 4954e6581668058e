"""Ring attention: one training step of ranks that pass keys and values around equals the whole's.

Loss, every gradient, norm and updated weights, with tensor, data and pipeline degrees, sequence
parallelism, ZeRO and recomputation, packed documents and ignored labels; adapters; bytes that are
sent; then the same comparisons with a line of the ring changed: each must fail.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from support import adapters
from support.models import TIED
from support.models import TINY as MODEL
from support.step_reference import (
    GLOBAL_BATCH,
    SEQUENCE,
    build,
    context_sent,
    differences,
    loss,
    noted,
    share,
    summed,
    training,
)
from support.world import Worlds, axes
from torch import Tensor

from llamax.config.model import ModelConfig
from llamax.config.schema import FinetuneConfig
from llamax.config.types import ContextBy
from llamax.kernels.attention import blocks, ways
from llamax.model.llama import DTYPES, Llama
from llamax.model.recompute import Recompute
from llamax.parallel import context_parallel
from llamax.parallel.collectives import Axes, Axis
from llamax.parallel.mesh import Mesh

TOLERANCE = 1e-6


@contextmanager
def ring(line: str = "", changed: str = "") -> Iterator[None]:
    """Attention by a ring, with a line of its code changed."""
    across = context_parallel.across

    def passed(axis: Axis, documents: Tensor | None = None, by: str = "") -> Any:
        return across(axis, documents, "ring")

    with (
        mock.patch.object(context_parallel, "across", passed),
        mock.patch.object(blocks, "ATTENTION_BLOCK_QUERIES", 3),
    ):
        if not line:
            yield
            return
        source = {module: inspect.getsource(module) for module in (blocks, ways)}
        (module,) = (module for module, text in source.items() if line in text)
        assert source[module].count(line) == 1
        other = ModuleType(module.__name__)
        exec(source[module].replace(line, changed), other.__dict__)
        if module is ways:
            with mock.patch.object(blocks, "way", other.way):
                yield
        else:
            with mock.patch.object(blocks, "_Blocks", other._Blocks):
                yield


def step(
    model: ModelConfig,
    axes: Axes,
    sequence: bool,
    accumulation: int,
    recompute: Recompute = "none",
    zero: int = 1,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Loss, gradients, norm, validation loss, and weights after two steps.

    The gradients of one rank are computed in float64, so that its rounding is not counted.
    """
    llama, exact = build(model, axes, sequence).to(DTYPES[dtype]), None
    if axes.world.size == 1:
        wide = build(model, axes, sequence).to(DTYPES[dtype]).double()
        (loss(wide, share(axes, 1)[0], axes) / (GLOBAL_BATCH * SEQUENCE)).backward()
        exact = {name: p.grad for name, p in wide.named_parameters()}
    llama.model.mode = recompute
    state = training(llama, axes, zero)
    sums = noted(state.optimizer) if zero < 2 else {}
    results = [state.step(share(axes, accumulation), 1)]
    grads = summed(llama, axes, {name: grad.clone() for name, grad in sums.items()})
    results.append(state.step(share(axes, accumulation), 2))
    return {
        "loss": [float(r.loss) for r in results] + [float(state.validate([share(axes, 1)]))],
        "norm": [float(r.grad_norm) for r in results],
        "grads": exact or grads,
        "weights": {name: p.detach().clone() for name, p in llama.named_parameters()},
    }


@cache
def whole_step(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """What one rank makes of the whole batch."""
    return step(model, Axes.solo(), False, 1, dtype=dtype)


def on_mesh(
    model: ModelConfig,
    mesh: Mesh,
    sequence: bool,
    accumulation: int,
    recompute: Recompute = "none",
    zero: int = 1,
    dtype: str = "float32",
    tolerance: float = TOLERANCE,
    change: tuple[str, str] = ("", ""),
) -> list[str]:
    """On a rank: the differences from the step of the whole model, one line each."""
    whole = whole_step(model, dtype)
    there = axes(mesh, model.kv_replicas(mesh.tp))
    with ring(*change):
        mine = step(model, there, sequence, accumulation, recompute, zero, dtype)
    if zero > 1:  # norm and validation loss after a step depend on all of them
        mine["grads"], mine["weights"] = {}, {}
    held = {what: {n: whole[what][n] for n in mine[what]} for what in ("grads", "weights")}
    cuts = Llama(model, there.tp).sharded_parameters().cuts
    return differences(mine, {**whole, **held}, cuts, there.tp, tolerance)


MESHES = [
    Mesh(cp=2),
    Mesh(cp=4),
    Mesh(cp=8),
    Mesh(cp=2, dp=2),
    Mesh(tp=2, cp=2),
    Mesh(tp=4, cp=2),  # ranks share a key/value head
    Mesh(pp=2, cp=2),
    Mesh(pp=2, tp=2, cp=2),
]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"pp{m.pp}-tp{m.tp}-cp{m.cp}-dp{m.dp}")
def test_ranks_of_a_ring_step_as_one(worlds: Worlds, mesh: Mesh) -> None:
    sequence = mesh.tp > 1
    for model, accumulation in ((MODEL, 4), (TIED, 1)):
        if model is TIED and mesh.pp > 1:
            continue  # the sum over first and last stage is test_pipeline's
        for found in worlds(mesh.world_size).run(on_mesh, model, mesh, sequence, accumulation):
            assert found == []


@pytest.mark.parametrize(
    ("mesh", "recompute", "zero"),
    [
        (Mesh(tp=2, cp=2), "selective", 1),
        (Mesh(tp=2, cp=2), "full", 0),
        (Mesh(cp=2, dp=2), "none", 2),
        (Mesh(cp=4), "full", 3),
    ],
)
def test_with_recomputation_and_zero(
    worlds: Worlds, mesh: Mesh, recompute: Recompute, zero: int
) -> None:
    for found in worlds(4).run(on_mesh, MODEL, mesh, False, 2, recompute, zero):
        assert found == []


def errors(by: ContextBy) -> float:
    """On a rank: the largest error of a gradient in bf16, of its largest."""
    there = axes(Mesh(cp=4))
    with ring() if by == "ring" else nullcontext():
        mine = step(MODEL, there, False, 1, dtype="bfloat16")["grads"]
    whole = whole_step(MODEL, "bfloat16")["grads"]
    return max(float((mine[n] - whole[n]).abs().max() / whole[n].abs().max()) for n in whole)


def test_bf16_is_as_near_as_with_gathered_keys(worlds: Worlds) -> None:
    gathered, passed = (max(worlds(4).run(errors, by)) for by in get_args(ContextBy))
    assert passed <= 1.2 * gathered, (passed, gathered)


def passed_around(size: int) -> list[str]:
    """On a rank: shares that did not come from the rank of their place, or gradients not home."""
    axis, found = axes(Mesh(cp=size)).cp, []
    numbers = torch.arange(1000, dtype=torch.float32)

    def of_rank(rank: int) -> Tensor:
        return (numbers + 1000 * (rank % size)).view(1, 10, 4, 25)

    def check(place: int, keys: Tensor) -> Tensor:
        if not torch.equal(keys, of_rank(axis.rank + place)):
            found.append(f"rank {axis.rank} of {size}, place {place}: {keys.flatten()[0]}")
        return keys * (axis.rank + 1)

    way = ways.Ring(axis)
    places = [place for place, keys in way.forward(of_rank(axis.rank)) if len(check(place, keys))]
    gradient = way.backward(of_rank(axis.rank), check)
    if places != [*range(size)]:
        found.append(f"rank {axis.rank} of {size} meets places {places}")
    if not torch.equal(gradient, of_rank(axis.rank) * (size * (size + 1) // 2)):
        found.append(f"rank {axis.rank} of {size}: gradient {gradient.flatten()[:3]}")
    return found


@pytest.mark.parametrize("size", range(2, 9))
def test_shares_go_around_a_ring_of_any_size_and_their_gradients_home(
    worlds: Worlds, size: int
) -> None:
    assert worlds(size).run(passed_around, size) == [[]] * size


# --- adapters ------------------------------------------------------------------------------------


def tuned(folder: Path, mesh: Mesh, cases: list[tuple[FinetuneConfig, bool]]) -> list[str]:
    """On a rank: how adapters, dropout included, differ from one rank's; packed or not."""
    found, there = [], axes(mesh, adapters.MODEL.kv_replicas(mesh.tp))
    for finetune, packed in cases:
        solo = Axes.solo()
        whole = adapters.steps(adapters.build(folder, solo, finetune), solo, 1, packed=packed)
        with ring():
            model = adapters.build(folder, there, finetune, mesh.tp > 1, "full")
            mine = adapters.steps(model, there, 2, packed=packed)
        cuts, rank = model.sharded_parameters().cuts, there.tp.rank
        found += adapters.differences(mine, whole, cuts, mesh.tp, rank, 3 * TOLERANCE)
    return found


def test_adapters_step_as_one_with_the_same_dropout(worlds: Worlds, tmp_path: Path) -> None:
    folder = adapters.base_folder(tmp_path / "hub")
    lora = FinetuneConfig(method="lora", r=4, alpha=6.0, dropout=0.25)
    cases = [(lora, True), (lora, False), (replace(lora, method="qlora"), True)]
    for found in worlds(4).run(tuned, folder, Mesh(tp=2, cp=2), cases):
        assert found == []


# --- what is sent --------------------------------------------------------------------------------


def sent(size: int, recompute: Recompute) -> dict[tuple[str, str], tuple[int, int]]:
    """On a rank: calls and bytes on the context axis."""
    with ring():
        return context_sent(MODEL, size, recompute, torch.bfloat16)


@pytest.mark.parametrize(("recompute", "passes"), [("none", 2), ("selective", 3), ("full", 3)])
def test_a_layer_sends_what_it_holds_to_its_neighbour(
    worlds: Worlds, recompute: Recompute, passes: int
) -> None:
    """Keys and values of the others in every pass, and their gradients once, in float32."""
    size, layers = 4, MODEL.num_hidden_layers
    held = 2 * GLOBAL_BATCH * SEQUENCE // size * MODEL.num_key_value_heads * MODEL.head_dim
    for found in worlds(size).run(sent, size, recompute):
        calls = (size - 1) * layers
        nbytes = calls * held * (2 * passes + 4)
        assert found == {("cp", "shift"): ((passes + 1) * calls, nbytes)}


# --- planted defects -----------------------------------------------------------------------------

DEFECTS = {
    "keys go the other way than they are counted": (
        "yield -by * step % size, kv",
        "yield by * step % size, kv",
    ),
    "keys do not arrive": ("            kv = arrived()", "            arrived()"),
    "last block left out": ("        yield by % size, kv", "        return"),
    "gradients sent one step too few": (
        "return own + self.ranks.start_shift(passing, 1)()",
        "return own + passing",
    ),
    "gradients sent the other way": (
        "arrived = self.ranks.start_shift(passing, 1)",
        "arrived = self.ranks.start_shift(passing, -1)",
    ),
    "gradients of the ranks between lost": (
        "passing = arrived() + found",
        "passing = (arrived(), found)[1]",
    ),
    "own gradient left out": (
        "return own + self.ranks.start_shift(passing, 1)()",
        "return self.ranks.start_shift(passing, 1)()",
    ),
    "merged without rescaling": (
        "return a[0] * (a[1] - lse).exp() + b[0] * (b[1] - lse).exp(), lse",
        "return a[0] + b[0], lse",
    ),
    "last maximum instead of the sum": (
        "lse = largest + ((a[1] - largest).exp() + (b[1] - largest).exp()).log()",
        "lse = largest",
    ),
    "documents of the place before": (
        "self.documents[:, pair.place].unbind(1)",
        "self.documents[:, pair.place - 1].unbind(1)",
    ),
    "documents ignored": ("if self.documents is not None:", "if False:"),
    "order of the place before": (
        "return torch.where(self.before[pair.place], low, high)",
        "return torch.where(self.before[pair.place - 1], low, high)",
    ),
    "later ranks are seen": ("self.before = turn < ranks", "self.before = turn > ranks"),
    "keys and values swapped": (
        "return k, v, pair.causal, numbers",
        "return v, k, pair.causal, numbers",
    ),
    "gradient of the queries of the last block alone": (
        "dq[half] = dq[half] + part if half in dq else part",
        "dq[half] = part",
    ),
    "weights of a block by its own sum": (
        "[tuple(lses)]",
        "[tuple(lse * 0 + lse.mean() for lse in lses)]",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_caught(worlds: Worlds, defect: str) -> None:
    options = "none", 1, "float32", TOLERANCE, DEFECTS[defect]
    found = worlds(4).run(on_mesh, MODEL, Mesh(cp=4), False, 1, *options)
    assert any(found)
