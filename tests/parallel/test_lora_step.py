"""A LoRA step on a mesh of ranks equals the step of the whole model, dropout included.

Loss, gradient and new value of every adapter for tensor x data degrees with and without sequence
parallelism, then the same with a defect planted in the ranks: it must fail for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from world import Worlds, axes

from llamax import dropout, lora, shard
from llamax.collectives import Axes, Meter, Metered
from llamax.config import Finetune, Model, Optim
from llamax.data.loader import Batch
from llamax.mesh import Mesh
from llamax.model import Llama
from llamax.optim.zero1 import Zero1
from llamax.parallel.frozen import FrozenLinear
from llamax.step import train_step

MODEL = Model(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=61,
    initializer_range=0.1,
)
FINETUNE = Finetune(method="lora", r=4, alpha=6.0, dropout=0.25)
# With the usual eps AdamW would turn the rounding of a gradient near 0 into a whole step.
OPTIM = Optim(lr=1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5)
SEQUENCE, GLOBAL_BATCH = 16, 8
TOLERANCE = 2e-6


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    shape = (GLOBAL_BATCH, SEQUENCE)
    ids = torch.randint(MODEL.vocab_size, shape, generator=generator)
    labels = torch.randint(MODEL.vocab_size, shape, generator=generator)
    labels = labels.masked_fill(torch.rand(shape, generator=generator) < 0.25, -100)
    return Batch(ids, labels, torch.arange(SEQUENCE).expand(shape), None)


def share(axes: Axes, accumulation: int) -> list[Batch]:
    """This data rank's microbatches, dealt as the loader deals them: microsteps outermost."""
    rows = GLOBAL_BATCH // axes.data.size // accumulation
    firsts = [(i * axes.data.size + axes.data.rank) * rows for i in range(accumulation)]
    whole = batch()
    return [Batch(*(p[f : f + rows] for p in whole[:3]), None) for f in firsts]


def build(axes: Axes, sequence: bool, finetune: Finetune, recompute: str) -> Llama:
    """A model with adapters whose B is not zero, so that every factor has a gradient."""
    model = Llama(MODEL, axes.tp, sequence_parallel=sequence, recompute=recompute).init(0)
    lora.adapt(model, finetune, torch.empty(0), seed=5)
    lora.init(model, 3)
    with torch.no_grad():
        for name, parameter in lora.trained(model).items():
            if "lora_B" in name:
                how, shape = model.shards[name], list(parameter.shape)
                if isinstance(how, shard.Shard):
                    shape[0] = how.blocks[0].size
                whole = torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) / 5
                parameter.copy_(shard.cut(whole, how, axes.tp.size, axes.tp.rank))
    return model


def step(
    axes: Axes, sequence: bool, finetune: Finetune, accumulation: int, recompute: str = "none"
) -> dict[str, Any]:
    """Losses and norms of two steps, and the adapters after them."""
    model = build(axes, sequence, finetune, recompute)
    optimizer = Zero1(
        lora.trained(model),
        model.shards,
        OPTIM,
        axes,
        sequence_parallel=model.sequence_parallel,
        bucket_bytes=1024,
    )
    frozen_before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    tokens = GLOBAL_BATCH * SEQUENCE
    found = [
        train_step(model, optimizer, axes, share(axes, accumulation), tokens, OPTIM.lr, n)
        for n in (1, 2)
    ]
    for name, before in frozen_before.items():
        assert torch.equal(model.get_parameter(name), before), f"{name} is frozen"
        assert model.get_parameter(name).grad is None
    return {
        "loss": [float(each.loss) for each in found],
        "norm": [float(each.grad_norm) for each in found],
        "adapters": {n: p.detach().clone() for n, p in lora.trained(model).items()},
        "shards": model.shards,
    }


def on_mesh(
    mesh: Mesh, sequence: bool, finetune: Finetune, accumulation: int, recompute: str, mutation: str
) -> list[str]:
    """In a rank: what differs from the whole model's step, a line each."""
    whole = step(Axes.solo(), False, finetune, 1)
    kv = max(1, mesh.tp // MODEL.num_key_value_heads)
    my_axes = axes(mesh, kv)
    with MUTATIONS[mutation]():
        mine = step(my_axes, sequence, finetune, accumulation, recompute)
    found = []
    for name, theirs in whole["adapters"].items():
        expected = shard.cut(theirs, mine["shards"][name], mesh.tp, my_axes.tp.rank)
        error = (mine["adapters"][name] - expected).abs().max() / theirs.abs().max()
        if not error <= 5 * TOLERANCE:
            found.append(f"{name} {error:.1e}")
    for what in ("loss", "norm"):
        for number, (a, b) in enumerate(zip(mine[what], whole[what], strict=True), 1):
            if not abs(a - b) <= 2 * TOLERANCE * abs(b):
                found.append(f"{what} of step {number}: {a!r} {b!r}")
    return found


MESHES = [Mesh(tp=tp, dp=dp) for tp in (1, 2, 4) for dp in (1, 2)]


@pytest.mark.parametrize("sequence", [True, False], ids=["sequence", "plain"])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"tp{mesh.tp}-dp{mesh.dp}")
def test_a_sharded_step_equals_the_whole_step(worlds: Worlds, mesh: Mesh, sequence: bool) -> None:
    few = Finetune(method="lora", r=2, alpha=3.0, rslora=True, targets="q_proj,v_proj,down_proj")
    for finetune, recompute in ((FINETUNE, "full"), (few, "none")):
        for found in worlds(mesh.world_size).run(
            on_mesh, mesh, sequence, finetune, 2, recompute, "none"
        ):
            assert found == []


# --- planted defects -----------------------------------------------------------------------------


@contextmanager
def replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    with mock.patch.object(owner, name, value):
        yield


def whole_factor_not_summed() -> Any:
    return replaced(lora, "Replica", lambda partial: shard.Replica())


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


MUTATIONS: dict[str, Callable[[], Any]] = {
    "none": lambda: replaced(lora, "Replica", shard.Replica),
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
    "scale of rsLoRA": lambda: replaced(lora, "scale", lambda finetune: finetune.alpha / 2),
}


@pytest.mark.parametrize("mutation", [name for name in MUTATIONS if name != "none"])
def test_a_planted_defect_is_caught(worlds: Worlds, mutation: str) -> None:
    sequence = mutation not in ("input gradient not summed", "gradient of whole factors not summed")
    assert any(worlds(4).run(on_mesh, Mesh(tp=2, dp=2), sequence, FINETUNE, 1, "none", mutation))


# --- what is sent --------------------------------------------------------------------------------


def sent(sequence: bool, adapters: bool) -> dict[tuple[str, str], int]:
    """Bytes that this rank sends in a forward and a backward pass over a frozen model."""
    meter = Meter()
    tp = Metered(axes(Mesh(tp=2)).tp, meter)
    model = Llama(MODEL, tp, sequence_parallel=sequence).init(0)
    targets = lora.LINEAR if adapters else ()
    with mock.patch.object(lora, "target_names", return_value=targets):
        lora.adapt(model, Finetune(r=4), torch.empty(0))
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
