"""Every verb of an axis against plain arithmetic, and what training sends against the formulas."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from support.metering import Meter, Metered
from support.models import tiny
from support.world import Worlds, axes
from torch import Tensor

from llamax.backends import torch_axes
from llamax.backends.torch_axes import GlooAxis, TorchAxis
from llamax.config.schema import OptimConfig
from llamax.data.loader import Batch
from llamax.model.llama import Llama
from llamax.optim.zero import Zero
from llamax.parallel.collectives import Axis, Solo
from llamax.parallel.mesh import Mesh
from llamax.training.step import TrainState

SHAPE = (4, 8, 12)


def held(rank: int, dtype: torch.dtype) -> Tensor:
    """Small integers, different on every rank: every order of addition gives the same bits."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-9, 9, SHAPE, generator=generator).to(dtype)


def verbs(mesh: Mesh, dtype: torch.dtype, kind: type[TorchAxis] = GlooAxis) -> list[str]:
    """On a rank: the verbs of each axis with a wrong result or a changed input."""
    found = []
    for axis in (axes(mesh).tp, axes(mesh).data):
        if isinstance(axis, Solo):
            continue
        assert isinstance(axis, TorchAxis)
        axis = kind(axis.name, axis.ranks, torch.device("cpu"), axis.group)
        x = [held(rank, dtype) for rank in axis.ranks]
        mine, n, r = x[axis.rank].clone(), axis.size, axis.rank
        expected = {"all_reduce": sum(x[1:], x[0]), "max": torch.stack(x).amax(0)}
        got = {"all_reduce": axis.all_reduce(mine), "max": axis.all_reduce(mine, "max")}
        for dim in (0, 1, 2, -1):
            whole = sum(x[1:], x[0])
            got[f"gather {dim}"] = axis.all_gather(mine, dim)
            expected[f"gather {dim}"] = torch.cat(x, dim)
            got[f"scatter {dim}"] = axis.reduce_scatter(mine, dim)
            expected[f"scatter {dim}"] = whole.chunk(n, dim)[r]
            for other in (0, 1, 2):
                got[f"all to all {dim} {other}"] = axis.all_to_all(mine, dim, other)
                pieces = [part.chunk(n, dim)[r] for part in x]
                expected[f"all to all {dim} {other}"] = torch.cat(pieces, other)
        for by in (1, -1, 2):
            got[f"shift {by}"] = axis.shift(mine, by)
            expected[f"shift {by}"] = x[(r - by) % n]
        waits = {
            "started gather": axis.start_all_gather(mine),
            "started scatter": axis.start_reduce_scatter(mine),
            "started shift": axis.start_shift(mine),
        }
        for verb in ("gather 0", "scatter 0", "shift 1"):
            expected[f"started {verb[:-2]}"] = expected[verb]
        got |= {name: wait() for name, wait in waits.items()}
        strided = mine.transpose(0, 2)
        got["strided"] = axis.reduce_scatter(strided, 0)
        expected["strided"] = sum(x[1:], x[0]).transpose(0, 2).chunk(n)[r]
        for name, value in expected.items():
            same = got[name].dtype == value.dtype and torch.equal(got[name], value)
            if not (same and got[name].is_contiguous()):
                found.append(f"{axis.name} {name}")
        if not torch.equal(mine, x[r]):
            found.append(f"{axis.name} wrote its input")
        if int(axis.rank_index) != r:
            found.append(f"{axis.name} rank_index")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("mesh", [Mesh(tp=2, dp=2), Mesh(tp=4)], ids=str)
def test_every_verb_computes_its_definition(worlds: Worlds, mesh: Mesh, dtype: torch.dtype) -> None:
    for found in worlds(4).run(verbs, mesh, dtype):
        assert found == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_the_verbs_of_gpus_compute_the_same(worlds: Worlds, dtype: torch.dtype) -> None:
    """They are torch.distributed's own, here over gloo in place of nccl."""
    for found in worlds(4).run(verbs, Mesh(tp=2, dp=2), dtype, TorchAxis):
        assert found == []


def in_pieces(mesh: Mesh, dtype: torch.dtype) -> list[str]:
    """The same with permanent buffers that hold a few rows."""
    with mock.patch.object(torch_axes, "STAGED_BYTES", 4 * SHAPE[1] * SHAPE[2]):
        return verbs(mesh, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_messages_pass_in_pieces(worlds: Worlds, dtype: torch.dtype) -> None:
    for found in worlds(4).run(in_pieces, Mesh(tp=2, dp=2), dtype):
        assert found == []


def uneven(mesh: Mesh) -> str:
    try:
        axes(mesh).tp.reduce_scatter(torch.zeros(3), 0)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_what_does_not_part_evenly_is_refused(worlds: Worlds) -> None:
    assert set(worlds(2).run(uneven, Mesh(tp=2))) == {"tp: dim 0 of (3,) is not divisible by 2"}


def test_an_axis_of_one_is_the_identity() -> None:
    axis: Axis = Solo("tp")
    x = torch.arange(6.0)
    results = (
        axis.all_reduce(x),
        axis.all_gather(x, 0),
        axis.reduce_scatter(x, 0),
        axis.all_to_all(x, 0, 0),
        axis.shift(x),
    )
    assert all(torch.equal(result, x) for result in results)


# --- bytes ---------------------------------------------------------------------------------------


def test_each_verb_sends_what_a_ring_sends() -> None:
    class Four(Solo):
        size = 4

    meter, x = Meter(), torch.zeros(8)  # 32 bytes
    axis = Metered(Four("tp"), meter)
    axis.all_reduce(x), axis.all_gather(x, 0), axis.reduce_scatter(x, 0)
    axis.all_to_all(x, 0, 0), axis.shift(x)
    sent = {"all_reduce": 48, "all_gather": 96, "reduce_scatter": 24, "all_to_all": 24, "shift": 32}
    assert meter.sent_bytes == {("tp", verb): count for verb, count in sent.items()}
    assert set(meter.calls.values()) == {1}


# Sizes that 4 ranks divide: the counts below know no padding.
MODEL = tiny(intermediate_size=64, num_hidden_layers=3, num_key_value_heads=4, vocab_size=64)
B, S = 2, 16
Count = dict[tuple[str, str], int]


def sent(
    mesh: Mesh, sequence: bool
) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]]:
    """In a rank: calls and bytes of one training step, by (axis, verb)."""
    meter = Meter()
    mine = axes(mesh)
    mine = dataclasses.replace(
        mine,
        **{name: Metered(getattr(mine, name), meter) for name in ("tp", "data", "kv", "world")},
    )
    model = Llama(MODEL, mine.tp, sequence_parallel=sequence).init(0)
    optimizer = Zero(
        model.sharded_parameters(),
        OptimConfig(),
        mine,
        sequence_parallel=sequence,
        bucket_bytes=2**20,
    )
    ids = torch.zeros(B, S, dtype=torch.int64)
    batch = Batch(ids, ids, torch.arange(S).expand(B, S), None)
    meter.clear()
    state = TrainState(model, optimizer, mine, step_tokens=B * S, learning_rate=lambda step: 1e-3)
    state.step([batch], 1)
    return dict(meter.calls), dict(meter.sent_bytes)


@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel_bytes_are_those_of_the_formulas(worlds: Worlds, tp: int) -> None:
    """Korthikanti et al. 2022, section 4.2.2: per layer 4 gathers or scatters of an activation
    forward and as many backward, and one more gather for each column layer's weight gradient; or
    4 all-reduces without sequence parallelism, which move the same bytes twice."""
    L, activation, ring = MODEL.num_hidden_layers, 4 * B * S * MODEL.hidden_size, (tp - 1) / tp
    calls, bytes_ = worlds(tp).run(sent, Mesh(tp=tp), True)[0]
    # Forward: 2 gathers a layer and the loss's; backward: 2 again for weights, 2 transposes of
    # scatters, and the embedding's.
    assert calls["tp", "all_gather"] == L * (2 + 2 + 2) + 1 + 1
    assert bytes_["tp", "all_gather"] == (6 * L + 2) * activation * ring
    # Forward: 2 a layer and the embedding's; backward: 2 a layer and the loss's.
    assert calls["tp", "reduce_scatter"] == L * (2 + 2) + 1 + 1
    assert bytes_["tp", "reduce_scatter"] == (4 * L + 2) * activation * ring
    norms = 4 * MODEL.hidden_size * (2 * L + 1)
    losses = 4 * B * S * (1 + 2)  # the maximum, then sums and labels together
    assert bytes_["tp", "all_reduce"] == 2 * (norms + losses) * ring

    calls, bytes_ = worlds(tp).run(sent, Mesh(tp=tp), False)[0]
    assert calls["tp", "all_reduce"] == L * (2 + 2) + 1 + 1 + 2
    assert bytes_["tp", "all_reduce"] == 2 * ((4 * L + 2) * activation + losses) * ring
    assert ("tp", "all_gather") not in calls


@pytest.mark.parametrize("dp", [2, 4])
def test_zero1_sends_gradients_once_and_weights_once(worlds: Worlds, dp: int) -> None:
    """Rajbhandari et al. 2020, section 7.1: as many bytes as an all-reduce of the gradients."""
    _, bytes_ = worlds(dp).run(sent, Mesh(dp=dp), False)[0]
    whole, ring = 4 * MODEL.num_parameters(), (dp - 1) / dp
    assert bytes_["data", "reduce_scatter"] == whole * ring
    assert bytes_["data", "all_gather"] == whole * ring
    assert ("data", "all_reduce") not in bytes_, "loss and counts cross the world, once a step"
