"""One training step on a mesh of ranks equals the step of the whole model.

Loss, every gradient and every updated weight, for tensor x data degrees with and without sequence
parallelism, with grouped-query heads (more ranks than key/value heads at tp 4), a vocabulary that
nothing divides, tied and untied embeddings, ignored labels and packed documents.  Then the same
comparison with a defect planted in the ranks: it must fail for each of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from support.models import TIED
from support.models import TINY as MODEL
from support.planted import replaced
from support.step_reference import (
    GLOBAL_BATCH,
    SEQUENCE,
    batch,
    build,
    differences,
    gradients,
    rows,
    share,
    training,
)
from support.world import Worlds, axes
from torch import Tensor

from llamax import ops
from llamax.config.model import ModelConfig
from llamax.model.llama import Llama, Norm
from llamax.optim.zero import Zero
from llamax.parallel import cross_entropy, regions, sharding, tensor_parallel
from llamax.parallel.collectives import Axes, Axis
from llamax.parallel.mesh import Mesh

TOLERANCE = 1e-6


def step(
    model: ModelConfig, axes: Axes, sequence: bool, zero: int, accumulation: int
) -> dict[str, Any]:
    """Loss, gradients, norm, and weights after two steps."""
    llama = build(model, axes, sequence)
    tokens = GLOBAL_BATCH * SEQUENCE
    for micro in share(axes, accumulation):
        total, _ = llama.loss(
            micro.ids, micro.labels, micro.positions, documents_BS=micro.documents
        )
        (total / tokens).backward()
    grads = gradients(llama, axes)

    llama = build(model, axes, sequence)
    state = training(llama, axes, zero)
    results = [state.step(share(axes, accumulation), number) for number in (1, 2)]
    return {
        "loss": [float(r.loss) for r in results],
        "norm": [float(r.grad_norm) for r in results],
        "grads": grads,
        "weights": {name: p.detach().clone() for name, p in llama.named_parameters()},
    }


def on_mesh(
    model: ModelConfig, mesh: Mesh, sequence: bool, zero: int, accumulation: int, mutation: str
) -> list[str]:
    """On a rank: the differences from the step of the whole model, one line each."""
    whole = step(model, Axes.solo(), False, True, 1)
    kv = max(1, mesh.tp // model.num_key_value_heads)
    my_axes = axes(mesh, kv)
    with MUTATIONS[mutation]():
        mine = step(model, my_axes, sequence, zero, accumulation)
    shards = Llama(model, my_axes.tp).sharded_parameters().cuts
    return differences(mine, whole, shards, my_axes.tp, TOLERANCE)


MESHES = [Mesh(tp=tp, dp=dp) for tp in (1, 2, 4) for dp in (1, 2, 4)]


@pytest.mark.parametrize("sequence", [True, False], ids=["sequence", "plain"])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"tp{mesh.tp}-dp{mesh.dp}")
def test_a_sharded_step_equals_the_whole_step(worlds: Worlds, mesh: Mesh, sequence: bool) -> None:
    accumulation = 2 if mesh.dp < 4 else 1
    for model in (MODEL, TIED):
        for found in worlds(mesh.world_size).run(
            on_mesh, model, mesh, sequence, True, accumulation, "none"
        ):
            assert found == []


def test_without_zero_every_data_rank_holds_all_state(worlds: Worlds) -> None:
    for found in worlds(4).run(on_mesh, MODEL, Mesh(tp=2, dp=2), True, False, 1, "none"):
        assert found == []


def of_logits(model: ModelConfig, mesh: Mesh, sequence: bool, mutation: str) -> list[str]:
    """In a rank: gradients of a loss that is made of logits and not the whole model's."""

    def found(axes: Axes) -> dict[str, Tensor]:
        llama, some = build(model, axes, sequence), rows(batch(), 0, 3)
        logits = llama(some.ids, some.positions, documents_BS=some.documents)
        same = regions.join(regions.split(logits, axes.tp, 1), axes.tp, 1)
        (same.log_softmax(-1) * logits).mean().backward()
        return gradients(llama, axes)

    my_axes = axes(mesh, model.kv_replicas(mesh.tp))
    whole, shards = found(Axes.solo()), Llama(model, my_axes.tp).sharded_parameters().cuts
    with MUTATIONS[mutation]():
        mine = found(my_axes)
    return [
        name
        for name, theirs in whole.items()
        for expected in [sharding.cut(theirs, shards[name], mesh.tp, my_axes.tp.rank)]
        if not (mine[name] - expected).abs().max() <= 2 * TOLERANCE * theirs.abs().max()
    ]


@pytest.mark.parametrize("sequence", [True, False], ids=["sequence", "plain"])
@pytest.mark.parametrize("tp", [2, 4])
def test_a_loss_of_ones_own_has_the_gradients_of_the_whole(
    worlds: Worlds, tp: int, sequence: bool
) -> None:
    for model in (MODEL, TIED):
        for found in worlds(tp).run(of_logits, model, Mesh(tp=tp), sequence, "none"):
            assert found == []


# --- planted defects -----------------------------------------------------------------------------


def method(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """Replace a method (or static method) by ``make(original)``."""
    original = getattr(owner, name)
    made = make(original)
    if isinstance(owner.__dict__[name], staticmethod):
        made = staticmethod(made)
    return lambda: replaced(owner, name, made)


def without_dx_sum(original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, dy: Tensor) -> Any:
        _, weight = ctx.saved_tensors
        _, dw, *rest = original(ctx, dy)
        alone = tensor_parallel.ops.matmul_grad_input(dy, weight)
        if ctx.sequence_parallel:
            alone = regions.share(alone, ctx.axis, 1)
        return alone, dw, *rest

    return backward


def without_second_gather(original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, _ = ctx.saved_tensors
        dx, _, *rest = original(ctx, dy)
        if ctx.sequence_parallel:
            x = torch.cat([x] * ctx.axis.size, 1)
        return dx, tensor_parallel.ops.matmul_grad_weight(dy, x), *rest

    return backward


def unmasked(original: Callable[..., Any]) -> Callable[..., Any]:
    def local_ids(ids: Tensor, rows: int, axis: Any) -> Any:
        local, elsewhere = original(ids, rows, axis)
        return local, elsewhere & False

    return local_ids


class Deaf:
    """An axis that hears nothing of the other ranks in some reductions."""

    def __init__(self, axis: Axis, *ops: str) -> None:
        self.axis, self.ops, self.name = axis, ops, axis.name
        self.size, self.rank, self.rank_index = axis.size, axis.rank, axis.rank_index

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        return x if op in self.ops else self.axis.all_reduce(x, op)


def no_max(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: original(*arguments[:-1], Deaf(arguments[-1], "max"))


def with_axes(**changed: Callable[[Axes], Axis]) -> Callable[..., Any]:
    """An optimizer that is given other axes than the step's."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def __init__(self: Zero, parameters: Any, optim: Any, axes: Axes, **more: Any):
            others = {name: change(axes) for name, change in changed.items()}
            original(self, parameters, optim, dataclasses.replace(axes, **others), **more)

        return __init__

    return make


def mean_of_ranks(original: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Zero, lr: Tensor, number: Tensor, scale: Tensor) -> Tensor:
        return original(self, lr, number, scale / 2)

    return step


def flat_sequence(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Zero, *rest: Any, sequence_parallel: bool, **more: Any) -> None:
        original(self, *rest, sequence_parallel=False, **more)

    return __init__


MUTATIONS: dict[str, Callable[[], Any]] = {
    "none": lambda: replaced(tensor_parallel, "ColumnLinear", tensor_parallel.ColumnLinear),
    "column input gradient not summed": method(
        tensor_parallel._ColumnMatmul, "backward", without_dx_sum
    ),
    "column input not gathered again": method(
        tensor_parallel._ColumnMatmul, "backward", without_second_gather
    ),
    "row output not summed": lambda: replaced(
        regions, "leave", lambda x, axis, sequence: regions.split(x, axis, 1) if sequence else x
    ),
    "reduce-scatter has no transpose": method(
        regions._Scatter,
        "backward",
        lambda _: lambda ctx, dy: (torch.cat([dy] * ctx.axis.size, ctx.dim), None, None),
    ),
    "gradient of what was joined summed": method(
        regions._Join,
        "backward",
        lambda _: lambda ctx, dy: (ctx.axis.reduce_scatter(dy, ctx.dim), None, None),
    ),
    "gradient of what was split not joined": method(
        regions._Split,
        "backward",
        lambda _: lambda ctx, dy: (torch.cat([dy] * ctx.axis.size, ctx.dim), None, None),
    ),
    "ids of other ranks not masked": lambda: replaced(
        tensor_parallel, "local_ids", unmasked(tensor_parallel.local_ids)
    ),
    "labels of other ranks not masked": lambda: replaced(
        cross_entropy, "local_ids", unmasked(cross_entropy.local_ids)
    ),
    "maximum of logits not shared": lambda: replaced(
        cross_entropy, "_losses", no_max(cross_entropy._losses)
    ),
    "padding of the vocabulary not masked": lambda: replaced(
        cross_entropy, "_padding", lambda rows, vocab_size, axis: None
    ),
    "ignored labels counted": lambda: replaced(cross_entropy, "IGNORE_INDEX", -99),
    "norm weights not summed under sequence parallelism": method(Zero, "__init__", flat_sequence),
    "key/value replicas not summed": method(
        Zero, "__init__", with_axes(kv=lambda axes: Deaf(axes.kv, "sum"))
    ),
    "data ranks not summed": method(
        Zero, "__init__", with_axes(data=lambda axes: Axes.solo().data)
    ),
    "gradients averaged over ranks": method(Zero, "step", mean_of_ranks),
    "norm epsilon dropped": method(
        Norm,
        "forward",
        lambda _: lambda self, x: tensor_parallel.ops.rms_norm(x, self.weight, 1e-2),
    ),
}


PLANTED = tuple(MUTATIONS)


@contextmanager
def on_chip(defect: Callable[[], Any]) -> Iterator[None]:
    """The loss as with kernels that keep logits on the chip, here by their plain reference."""
    with replaced(ops, "has_kernel", lambda *_: True), defect():
        yield


def deaf_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, axis: Any, *rest: Any) -> Any:
        return original(ctx, x, weight, labels, Deaf(axis, "max"), *rest)

    return forward


ON_CHIP = {
    name: MUTATIONS[name]
    for name in (
        "none",
        "labels of other ranks not masked",
        "padding of the vocabulary not masked",
        "ignored labels counted",
    )
} | {"maximum not shared": method(cross_entropy._LossOnChip, "forward", deaf_loss)}
MUTATIONS |= {f"on chip: {name}": partial(on_chip, defect) for name, defect in ON_CHIP.items()}


@pytest.mark.parametrize("sequence", [True, False], ids=["sequence", "plain"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_loss_on_the_chip_is_that_of_the_whole_step(
    worlds: Worlds, tp: int, sequence: bool
) -> None:
    for found in worlds(4).run(
        on_mesh, TIED, Mesh(tp, 4 // tp), sequence, True, 1, "on chip: none"
    ):
        assert found == []


@pytest.mark.parametrize("defect", [name for name in ON_CHIP if name != "none"])
def test_a_defect_of_the_loss_on_the_chip_is_caught(worlds: Worlds, defect: str) -> None:
    assert any(worlds(4).run(on_mesh, TIED, Mesh(tp=4), False, True, 1, f"on chip: {defect}"))


@pytest.mark.parametrize("mutation", [name for name in PLANTED if name != "none"])
def test_a_planted_defect_is_caught(worlds: Worlds, mutation: str) -> None:
    if mutation.startswith("gradient of what was"):  # which training's own loss does without
        assert any(worlds(2).run(of_logits, MODEL, Mesh(tp=2), True, mutation))
        return
    tp4 = mutation in ("key/value replicas not summed", "maximum of logits not shared")
    mesh = Mesh(tp=4, dp=1) if tp4 else Mesh(tp=2, dp=2)
    assert any(worlds(4).run(on_mesh, MODEL, mesh, True, True, 1, mutation))
