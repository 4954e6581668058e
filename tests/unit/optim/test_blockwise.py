"""AdamW's moments in 8 bits and in host memory.

The hashes are those of bitsandbytes 0.50.2 on a CPU: its maps, its portable quantiser and the
states of its AdamW8bit with it.  (The quantiser of its compiled CPU library rounds through a table
with steps of 2**-15, and makes 0 a number.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from llamax.config.schema import OptimConfig
from llamax.optim import Zero
from llamax.optim.blockwise import Blockwise, bits_of, dequantize, dynamic_map, quantize
from llamax.parallel.collectives import Axes
from llamax.parallel.sharding import Block, Replica, Shard, ShardedParameter, ShardedParameters
from llamax.runtime.errors import ConfigError

CPU, OPTIM = torch.device("cpu"), OptimConfig(beta2=0.999, weight_decay=0.01, max_grad_norm=0.0)
YES, NO = torch.tensor(True), torch.tensor(False)


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in tensors)).hexdigest()[:16]


def numbers(length: int, step: int = 1) -> Tensor:
    """Numbers of every size, the same in every version of torch; a block of zeros among them."""
    place = torch.arange(length, dtype=torch.int64)
    sizes = torch.tensor([1.0, 1e-1, 1e-2, 1e-4, 1e-6, 1e-9, 0.0])
    parts = ((place * 7919 * step + step) % 2003 - 1001).float() / 1001
    return parts * sizes[(place // 64 + step) % 7]


def test_maps_and_codes_are_those_of_bitsandbytes() -> None:
    assert digest(dynamic_map(True, CPU)) == "e732639a65f497b4"
    assert digest(dynamic_map(False, CPU)) == "305f002cc11278fb"
    x = numbers(256 * 40)
    assert digest(*quantize(x, True)) == "de984b6b7beac1a6"
    assert digest(*quantize(x.abs(), False)) == "57a1a2f3a8aae091"
    assert digest(dequantize(*quantize(x, True), True)) == "10dbbe66d6056585"


def test_an_error_is_at_most_half_a_step() -> None:
    """Dettmers et al. 2022: the steps around 1 are 1/64 wide, and small numbers keep a digit."""
    x = numbers(256 * 40)
    error = (dequantize(*quantize(x, True), True) - x).view(-1, 256).abs()
    largest = x.view(-1, 256).abs().amax(1, keepdim=True)
    assert (error <= largest * 0.0071).all()
    small = (x.view(-1, 256).abs() < largest * 0.01) & (x.view(-1, 256).abs() > largest * 1e-4)
    assert small.any()
    assert (error[small] < 0.3 * x.view(-1, 256).abs()[small]).all()


@pytest.mark.parametrize("signed", [True, False])
def test_a_checkpoint_gives_the_same_bits_back(signed: bool) -> None:
    moment, other = (Blockwise(256 * 80, signed, CPU, False) for _ in range(2))
    x = numbers(256 * 80)
    x[256:512] *= 1e-29  # partly below what is kept
    x[512:768] = dynamic_map(True, CPU) * 1e-38  # products of which are subnormal
    moment.take(x if signed else x.abs(), YES)
    other.load(moment.exact())
    assert other.codes.equal(moment.codes)
    assert other.absmax.equal(moment.absmax)
    assert other.values().equal(moment.values())
    assert not moment.values()[512:768].any(), "what is so small is 0"
    if signed:
        negative = (moment.codes.view(-1, 256) != 255).all(1) & (moment.absmax > 0)
        assert negative.any(), "the map has no -1"


def test_new_numbers_are_left_where_the_step_was_not_finite() -> None:
    moment = Blockwise(512, True, CPU, True)
    moment.take(numbers(512), YES)
    before = moment.codes.clone(), moment.absmax.clone()
    moment.take(torch.full((512,), torch.nan), NO)
    assert moment.codes.equal(before[0])
    assert moment.absmax.equal(before[1])


# --- the optimizer -------------------------------------------------------------------------------


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    return {
        "matrix": Parameter(numbers(64 * 256, 3).view(64, 256).to(dtype)),
        "small": Parameter(numbers(8 * 256, 4).view(8, 256).to(dtype)),
        "norm": Parameter(torch.ones(6000, dtype=dtype)),  # 23.4 blocks
    }


def made(weights: dict[str, Parameter], optim: OptimConfig, bucket_bytes: int = 7500) -> Zero:
    named = {name: ShardedParameter(p, Replica()) for name, p in weights.items()}
    return Zero(
        ShardedParameters(named),
        optim,
        Axes.solo(),
        sequence_parallel=False,
        bucket_bytes=bucket_bytes,
    )


def take(zero: Zero, weights: dict[str, Parameter], number: int, bad: float = 0.0) -> None:
    for at, weight in enumerate(weights.values()):
        gradient = numbers(weight.numel(), 10 * number + at).view(weight.shape)
        (weight.float() * gradient * (1.0 + bad)).sum().backward()
    zero.step(torch.tensor(1e-3), torch.tensor(float(number)), torch.tensor(1.0))


def quantised(zero: Zero) -> Iterator[Blockwise]:
    for group in zero.groups:
        for bucket in group.buckets:
            yield from (m for m in bucket.moments if isinstance(m, Blockwise))


def test_states_are_those_of_bitsandbytes() -> None:
    weights = parameters()
    zero = made(weights, replace(OPTIM, state_bits=8))
    for number in range(1, 6):
        take(zero, weights, number)
    assert [(group.names, group.key.bits) for group in zero.groups] == [
        (["matrix"], 8),
        (["small"], 32),
        (["norm"], 32),
    ]
    means, squares = [*quantised(zero)][::2], [*quantised(zero)][1::2]
    assert len(means) > 5
    assert digest(*(m.codes for m in means), *(m.absmax for m in means)) == "44960e477077508a"
    assert digest(*(m.codes for m in squares), *(m.absmax for m in squares)) == "459cc56224f46c95"


def test_steps_stay_close_to_those_of_32_bits() -> None:
    """Gradients of one size, as within a matrix; a hundred times smaller ones become 0."""
    eight, plain = parameters(), parameters()
    zeros = made(eight, replace(OPTIM, state_bits=8)), made(plain, OPTIM)
    for number in range(1, 11):
        for zero, weights in zip(zeros, (eight, plain), strict=True):
            generator = torch.Generator().manual_seed(number)
            for weight in weights.values():
                gradient = torch.randn(weight.shape, generator=generator)
                (weight * gradient).sum().backward()
            zero.step(torch.tensor(1e-3), torch.tensor(float(number)), torch.tensor(1.0))
    moved = (plain["matrix"] - parameters()["matrix"]).abs().mean()
    assert 0 < (eight["matrix"] - plain["matrix"]).abs().mean() < 0.02 * moved
    assert eight["norm"].equal(plain["norm"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [32, 8])
def test_state_in_host_memory_makes_the_same_steps(dtype: torch.dtype, bits: int) -> None:
    here, there = parameters(dtype), parameters(dtype)
    optim = replace(OPTIM, state_bits=bits, max_grad_norm=1.0)
    one, other = made(here, optim), made(there, replace(optim, offload=True))
    for number in (1, 2, 3):
        bad = torch.inf if number == 2 else 0.0
        before = [run.tensor.clone() for run in other.owned()]
        take(one, here, number, bad)
        take(other, there, number, bad)
        after = [run.tensor.clone() for run in other.owned()]
        assert all(map(torch.equal, before, after)) == (number == 2)
        for a, b in zip(one.owned(), other.owned(), strict=True):
            assert (a.name, a.kind, a.start) == (b.name, b.kind, b.start)
            assert a.tensor.equal(b.tensor)
        assert all(here[name].equal(there[name]) for name in here)
    kept = {32: 8.0, 8: 2 * (1 + 4 / 256)}[bits] * 64 * 256 + 8.0 * (2048 + 6000)
    masters = 4.0 * (64 * 256 + 2048 + 6000) * (dtype == torch.float16)
    assert one.state_bytes() - other.state_bytes() == kept + masters


def test_a_cut_inside_a_block_is_refused() -> None:
    def bits(shape: tuple[int, ...], cut: Shard | Replica, degree: int) -> int:
        named = {"w": ShardedParameter(torch.zeros(shape), cut)}
        return bits_of(ShardedParameters(named, degree), "w")

    columns = Shard(1, (Block(1024),))
    assert bits((8, 256), columns, 4) == 8
    with pytest.raises(ConfigError, match=r"parallel.tensor=8 cuts w into pieces of 128; use opt"):
        bits((8, 128), columns, 8)
    assert bits((8, 100), Shard(1, (Block(200),)), 2) == 32, "not made of blocks on any mesh"
    assert bits((512, 8), Shard(0, (Block(1024),)), 2) == 8
    with pytest.raises(ConfigError, match=r"cuts w into pieces of 3968"):
        bits((496, 8), Shard(0, (Block(992),)), 2)
    assert bits((16, 256), Replica(), 2) == 8
