"""ZeRO-1 on real ranks equals AdamW on the whole model: norms, weights, state, bytes.

The model is made of whole tensors and drawn gradients, so that every way a gradient can come in
parts is exact and known: over data ranks, over the tensor ranks of a replica under sequence
parallelism, over the ranks that hold one key/value head.  Padding rows get rubbish for a gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from support.memory import held_bytes
from support.metering import Meter, Metered
from support.world import Worlds, axes
from torch import Tensor
from torch.nn import Parameter

from llamax.config.schema import OptimConfig
from llamax.optim import Zero, adamw, gradients, groups, zero
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh
from llamax.parallel.sharding import (
    Block,
    Cut,
    Replica,
    Shard,
    ShardedParameter,
    ShardedParameters,
    cut,
    join,
    replicas,
    span,
)

OPTIM = OptimConfig(lr=1e-2, beta2=0.95, weight_decay=0.1, max_grad_norm=1.0)
STEPS, MICROSTEPS, BUCKET_BYTES = 3, 2, 200

QKV = (Block(8 * 2, 2, "q_proj"), Block(2 * 2, 2, "k_proj"), Block(2 * 2, 2, "v_proj"))
MODEL: dict[str, tuple[tuple[int, ...], Cut]] = {
    "embed": ((9, 6), Shard(0, (Block(9, pad=True),))),
    "norm": ((6,), Replica()),
    "qkv": ((24, 6), Shard(0, QKV)),
    "o": ((6, 16), Shard(1, (Block(16, 2),))),
    "gate_up": ((16, 6), Shard(0, (Block(8), Block(8)))),
    "router": ((3, 6), Replica()),
    "last": ((6,), Replica()),
}


def draw(*seed: int) -> dict[str, Tensor]:
    """A whole tensor per parameter."""
    generator = torch.Generator().manual_seed(hash(seed))
    return {name: torch.randn(shape, generator=generator) for name, (shape, _) in MODEL.items()}


def parts(whole: Tensor, count: int) -> list[Tensor]:
    """``count`` different tensors that add up to ``whole``."""
    weights = torch.arange(1.0, count + 1) / sum(range(1, count + 1))
    return [whole * weight for weight in weights]


def gradient(name: str, whole: Tensor, at: Axes, sequence: bool) -> Tensor:
    """The gradient that backward leaves on this tensor rank, from that of its data rank."""
    how, tp = MODEL[name][1], at.tp
    if isinstance(how, Replica):
        return parts(whole, tp.size)[tp.rank] if sequence else whole
    share, offset = cut(whole, how, tp.size, tp.rank), 0
    for block in how.blocks:
        _, length, pad = span(block, tp.size, tp.rank)
        mine = share.narrow(how.dim, offset, length)
        held_by = replicas(block, tp.size)
        mine.copy_(parts(mine, held_by)[tp.rank % held_by])
        share.narrow(how.dim, offset + length, pad).fill_(7.0)
        offset += length + pad
    return share


def train(
    tp: int,
    dp: int,
    sequence: bool,
    sharded: bool,
    dtype: torch.dtype,
    scale: float = 1.0,
    lazy: bool = False,
) -> tuple[dict[str, Tensor], list[float], dict[str, Any]]:
    """Some steps on this rank's shares: (shares, norms, other checked values)."""
    at = axes(Mesh(tp=tp, dp=dp), kv=max(tp // 2, 1))
    meter = Meter()
    at = Axes(*(Metered(axis, meter) for axis in (at.tp, at.data, at.kv, at.world)))
    parameters = {
        name: Parameter(cut(whole, MODEL[name][1], tp, at.tp.rank).to(dtype))
        for name, whole in draw(0).items()
    }
    parameters["head"] = parameters["embed"]
    cuts = {name: how for name, (_, how) in MODEL.items()} | {"head": MODEL["embed"][1]}
    mine = {name: ShardedParameter(p, cuts[name]) for name, p in parameters.items()}
    optimizer = Zero(
        ShardedParameters(mine, tp, at.tp.rank),
        OPTIM,
        at,
        sequence_parallel=sequence,
        zero=int(sharded),
        bucket_bytes=BUCKET_BYTES,
    )
    held = held_bytes(optimizer)
    if lazy:
        optimizer.to("cpu")
    norms = []
    for step in range(1, STEPS + 1):
        for microstep in range(MICROSTEPS):
            loss = torch.zeros(())
            for name, whole in draw(step, microstep).items():
                mine = gradient(name, parts(whole, dp)[at.data.rank], at, sequence)
                loss = loss + (parameters[name].float() * mine / scale).sum()
            loss.backward()
        meter.clear()
        values = (OPTIM.lr / step, step, scale)
        norms.append(float(optimizer.step(*(torch.tensor(float(value)) for value in values))))
    runs = [
        (owned.name, owned.kind, owned.start, owned.tensor.float().clone())
        for owned in optimizer.owned()
    ]
    rest = {"runs": runs, "meter": meter, "bytes": optimizer.state_bytes(), "held": held}
    shares = {name: parameters[name].detach().float().clone() for name in MODEL}
    return shares, norms, rest


def reference(dtype: torch.dtype) -> tuple[dict[str, dict[str, Tensor]], list[float]]:
    """The whole model under torch's AdamW with float32 masters: (kind -> name -> whole, norms)."""
    masters = {name: Parameter(whole.to(dtype).float()) for name, whole in draw(0).items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in masters.values() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in masters.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
    )
    norms = []
    for step in range(1, STEPS + 1):
        micro = [draw(step, microstep) for microstep in range(MICROSTEPS)]
        for name, master in masters.items():
            master.grad = torch.stack([whole[name] for whole in micro]).sum(0)
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), OPTIM.max_grad_norm)))
        for group in optimizer.param_groups:
            group["lr"] = OPTIM.lr / step
        optimizer.step()
    state = {
        kind: {name: optimizer.state[master][kind] for name, master in masters.items()}
        for kind in ("exp_avg", "exp_avg_sq")
    }
    return {"weight": {name: p.detach() for name, p in masters.items()}} | state, norms


def assemble(results: list[Any], kind: str, name: str, rank: int, tp: int) -> Tensor:
    """The share of tensor rank ``rank``, from the runs that its data ranks own."""
    runs = {
        start: run
        for _, _, rest in results[rank::tp]
        for owner, what, start, run in rest["runs"]
        if (owner, what) == (name, kind)
    }
    return torch.cat([runs[start] for start in sorted(runs)]).view_as(results[rank][0][name])


def error(results: list[Any], tp: int, dtype: torch.dtype) -> float:
    """The worst of norms, weights and moments against the reference, relative to the largest.

    Infinite where ranks disagree about what they share.
    """
    whole, norms = reference(dtype)
    worst = max(
        abs(a / b - 1) for _, found, _ in results for a, b in zip(found, norms, strict=True)
    )
    for name, (_, how) in MODEL.items():
        shares = [result[0][name] for result in results]
        for rank, share in enumerate(shares):
            twin = 0 if isinstance(how, Replica) else rank % tp
            if not torch.equal(share, shares[twin]):
                return math.inf
        for kind, wholes in whole.items():
            got = join([assemble(results, kind, name, rank, tp) for rank in range(tp)], how)
            largest = wholes[name].abs().max()
            worst = max(worst, float((got - wholes[name]).abs().max() / largest))
        weights = join(shares[:tp], how)
        largest = whole["weight"][name].abs().max()
        worst = max(worst, float((weights - whole["weight"][name]).abs().max() / largest))
    return worst


MESHES = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize(("tp", "dp"), MESHES)
def test_a_mesh_equals_the_whole(
    worlds: Worlds, tp: int, dp: int, sequence: bool, sharded: bool
) -> None:
    results = worlds(tp * dp).run(train, tp, dp, sequence, sharded, torch.float32, 4.0)
    assert error(results, tp, torch.float32) < 1e-6
    for _, _, rest in results:
        assert rest["bytes"] == rest["held"], "before the first step, and by the formula"


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(("tp", "dp"), MESHES)
def test_the_layout_of_lazy_devices_equals_the_whole(
    worlds: Worlds, tp: int, dp: int, sharded: bool
) -> None:
    for sequence in (True, False):
        args = (tp, dp, sequence, sharded, torch.float32, 4.0)
        lazy, flat = worlds(tp * dp).run(train, *args, True), worlds(tp * dp).run(train, *args)
        assert error(lazy, tp, torch.float32) < 1e-6
        for (_, _, rest), (_, _, other) in zip(lazy, flat, strict=True):
            assert rest["meter"] == other["meter"], "the same collectives"


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_bfloat16_equals_the_whole(worlds: Worlds, tp: int, dp: int, lazy: bool) -> None:
    """Up to bfloat16's rounding of each gradient and weight."""
    results = worlds(tp * dp).run(train, tp, dp, True, True, torch.bfloat16, 1.0, lazy)
    assert error(results, tp, torch.bfloat16) < 1e-2
    for _, _, rest in results:
        assert lazy or rest["bytes"] == rest["held"]


def test_same_inputs_give_the_same_bits(worlds: Worlds) -> None:
    first, second = (worlds(4).run(train, 2, 2, True, True, torch.bfloat16) for _ in range(2))
    for (shares, norms, _), (again, norms_again, _) in zip(first, second, strict=True):
        assert norms == norms_again
        assert all(torch.equal(shares[name], again[name]) for name in MODEL)


@pytest.mark.parametrize(
    ("dtype", "width", "master"), [(torch.float32, 4, 0), (torch.bfloat16, 2, 4)]
)
def test_bytes_held_and_sent_follow_the_formulas(
    worlds: Worlds, dtype: torch.dtype, width: int, master: int
) -> None:
    """tp 1: n elements; gradients travel as float32, weights in their own width."""
    for dp in (2, 4):
        (_, _, rest), *_ = worlds(dp).run(train, 1, dp, False, True, dtype)
        matrices = sum(math.prod(shape) for shape, _ in MODEL.values() if len(shape) > 1)
        vectors = sum(math.prod(shape) for shape, _ in MODEL.values() if len(shape) == 1)
        n = sum(-(-length // dp) * dp for length in (matrices, vectors))
        assert rest["bytes"] == n * (width + 4) + n // dp * (8 + master)
        sent = rest["meter"].sent_bytes
        assert sent["data", "reduce_scatter"] == 4 * n * (dp - 1) // dp
        assert sent["data", "all_gather"] == width * n * (dp - 1) // dp
        assert sent["world", "all_reduce"] == round(2 * 4 * (dp - 1) / dp)
        assert set(sent) == {
            ("data", "reduce_scatter"),
            ("data", "all_gather"),
            ("world", "all_reduce"),
        }


def test_tensor_sums_are_few(worlds: Worlds) -> None:
    """tp 4, bucketed: the replicas' one sum per bucket, and only key/value rows over kv."""
    (_, _, rest), *_ = worlds(4).run(train, 4, 1, True, True, torch.float32)
    sent = rest["meter"].sent_bytes
    replicated = 6 + 6 + 3 * 6
    assert sent["tp", "all_reduce"] == 2 * 4 * replicated * 3 // 4
    assert sent["kv", "all_reduce"] == 2 * 4 * (2 + 2) * 6 // 2
    (_, _, rest), *_ = worlds(4).run(train, 4, 1, False, True, torch.float32)
    assert ("tp", "all_reduce") not in rest["meter"].sent_bytes


def test_a_bad_number_on_one_rank_stops_all(worlds: Worlds) -> None:
    assert worlds(4).run(poisoned) == [True] * 4


def poisoned() -> bool:
    at = axes(Mesh(tp=2, dp=2))
    parameter = Parameter(torch.ones(8))
    sharded = {"p": ShardedParameter(parameter, Shard(0, (Block(16),)))}
    parameters = ShardedParameters(sharded, at.tp.size, at.tp.rank)
    optimizer = Zero(parameters, OPTIM, at, sequence_parallel=True)
    bad = math.nan if at.world.rank == 2 else 1.0
    (parameter * bad).sum().backward()
    norm = optimizer.step(torch.tensor(0.1), torch.tensor(1.0), torch.tensor(1.0))
    untouched = all(
        torch.all(owned.tensor == (owned.kind == "weight")) for owned in optimizer.owned()
    )
    return untouched and bool(norm.isnan()) and torch.equal(parameter, torch.ones(8))


# Defects to plant: (where, what instead).  Each must show in a comparison that otherwise passes.


@contextmanager
def planted(name: str) -> Iterator[None]:
    reduce, step, update = Zero._reduce, Zero.step, adamw.update

    def without(axis: str) -> Callable[..., Tensor]:
        def patched(self: Zero, *where: Any) -> Tensor:
            kept, solo = self.axes, getattr(Axes.solo(), axis)
            self.axes = dataclasses.replace(kept, **{axis: solo})
            try:
                return reduce(self, *where)
            finally:
                self.axes = kept

        return patched

    one = torch.ones(())
    patches: dict[str, tuple[Any, str, Any]] = {
        "no sum over kv": (Zero, "_reduce", without("kv")),
        "no sum over tp": (Zero, "_reduce", without("tp")),
        "replicas counted by every rank": (zero, "weight", lambda how, degree: 1.0),
        "kv replicas and padding counted": (groups, "sqrt", lambda weight: 1.0),
        "no scale": (Zero, "step", lambda self, lr, at, scale: step(self, lr, at, one)),
        "bias correction of step 1": (Zero, "step", lambda self, lr, _, s: step(self, lr, one, s)),
        "no clipping": (zero, "clip_factor", lambda norm, limit: torch.ones_like(norm)),
        "norm before scale": (
            zero,
            "clip_factor",
            lambda norm, limit: (limit / (norm / 4.0)).clamp(max=1.0),
        ),
        "decay of everything": (
            adamw,
            "update",
            lambda *vectors, **more: update(
                *vectors[:4], vectors[4]._replace(decay=OPTIM.weight_decay), **more
            ),
        ),
        "no gather": (Zero, "gather_parameters", lambda self: None),
        "a microstep forgotten": (gradients.Accumulated, "_arrived", _last),
    }  # fmt: skip
    target, attribute, instead = patches[name]
    with mock.patch.object(target, attribute, instead):
        yield


def _last(self: Any, member: int, parameter: Tensor) -> None:
    self.layout.tensors[member].copy_(parameter.grad)
    parameter.grad = None


def train_planted(name: str, *args: Any) -> Any:
    with planted(name):
        return train(*args)


@pytest.mark.parametrize(
    ("name", "tp", "dp"),
    [
        ("no sum over kv", 4, 1),
        ("no sum over tp", 2, 2),
        ("replicas counted by every rank", 2, 2),
        ("kv replicas and padding counted", 4, 1),
        ("no scale", 1, 2),
        ("bias correction of step 1", 1, 2),
        ("no clipping", 1, 2),
        ("norm before scale", 1, 2),
        ("decay of everything", 1, 2),
        ("no gather", 1, 2),
        ("a microstep forgotten", 1, 2),
    ],
)
def test_planted_defects_are_caught(worlds: Worlds, name: str, tp: int, dp: int) -> None:
    results = worlds(tp * dp).run(train_planted, name, tp, dp, True, True, torch.float32, 4.0)
    assert error(results, tp, torch.float32) > 1e-4
