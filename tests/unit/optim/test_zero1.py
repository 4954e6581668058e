"""AdamW with ZeRO-1 on one rank, compared with torch and float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from support.memory import held_bytes
from support.models import TIED
from torch import Tensor
from torch.nn import Parameter

from llamax.config.schema import OptimConfig
from llamax.model.llama import Llama
from llamax.optim import Owned, Zero, adamw
from llamax.parallel.collectives import Axes, Solo
from llamax.parallel.sharding import Replica, ShardedParameter, ShardedParameters
from llamax.runtime.errors import ConfigError

OPTIM = OptimConfig(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)


SHAPES = {"embed": (11, 6), "norm": (6,), "up": (7, 6), "down": (6, 7), "last": (6,)}


ONE = torch.tensor(1.0)


def draw(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    torch.manual_seed(1)
    return {name: Parameter(torch.randn(shape).to(dtype)) for name, shape in SHAPES.items()}


def gradients(step: int, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {n: size * torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}


def backward(parameters: dict[str, Parameter], wanted: dict[str, Tensor]) -> None:
    """Leave ``wanted`` as autograd leaves gradients."""
    sum((parameters[name].float() * g).sum() for name, g in wanted.items()).backward()


def make(
    parameters: dict[str, Parameter], optim: OptimConfig = OPTIM, bucket_bytes: int = 80
) -> Zero:
    return Zero(
        ShardedParameters({n: ShardedParameter(p, Replica()) for n, p in parameters.items()}),
        optim,
        Axes.solo(),
        sequence_parallel=False,
        bucket_bytes=bucket_bytes,
    )


def take(zero: Zero, step: int, scale: float = 1.0, lr: float = OPTIM.lr) -> float:
    return float(zero.step(torch.tensor(lr), torch.tensor(step), torch.tensor(scale)))


def state(zero: Zero) -> list[Tensor]:
    return [owned.tensor.clone() for owned in zero.owned()]


def test_twenty_steps_equal_torch() -> None:
    """Two decay groups, changing lr, gradients that clipping shortens and that it leaves alone."""
    mine, theirs = draw(), draw()
    zero = make(mine)
    decay = [p for p in theirs.values() if p.dim() > 1]
    rest = [p for p in theirs.values() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    torch_adamw = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(0.9, 0.95), eps=1e-8)
    for step in range(1, 21):
        lr = OPTIM.lr * (1 - step / 40)
        wanted = gradients(step, size=1.0 if step % 2 else 0.01)
        backward(mine, wanted)
        backward(theirs, wanted)
        norm = torch.nn.utils.clip_grad_norm_(list(theirs.values()), OPTIM.max_grad_norm)
        for group in torch_adamw.param_groups:
            group["lr"] = lr
        torch_adamw.step()
        torch_adamw.zero_grad()
        assert take(zero, step, lr=lr) == pytest.approx(float(norm), rel=1e-6)
        assert (float(norm) > 1) == bool(step % 2)
        for name in SHAPES:
            torch.testing.assert_close(mine[name], theirs[name], rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("change", [adamw.fused, adamw.plain])
@pytest.mark.parametrize("step", [1, 2, 1000, 3_000_000])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_update_equals_the_formula_in_float64(
    change: Callable[..., None], step: int, beta1: float
) -> None:
    optim = dataclasses.replace(OPTIM, beta1=beta1, beta2=0.999)
    torch.manual_seed(0)
    p, g, m, v = torch.randn(4, 1000).unbind()
    v = v.abs()
    lr, factor, decay = 0.02, 0.3, 0.1
    g64, p64 = 0.3 * g.double(), p.double()
    m64 = beta1 * m.double() + (1 - beta1) * g64
    v64 = 0.999 * v.double() + 0.001 * g64**2
    hat = m64 / (1 - beta1**step), v64 / (1 - 0.999**step)
    p64 = p64 - lr * decay * p64 - lr * hat[0] / (hat[1].sqrt() + optim.eps)
    values = map(torch.tensor, (lr, float(step), factor, True))
    change([p], [g], [m], [v], adamw.Step(*values, decay, optim))
    for got, want in ((p, p64), (m, m64), (v, v64)):
        torch.testing.assert_close(got, want.float(), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("change", [adamw.fused, adamw.plain])
def test_update_without_finite_changes_nothing(change: Callable[..., None]) -> None:
    before = torch.rand(4, 33)
    p, g, m, v = before.clone().unbind()
    g[5] = math.nan
    values = map(torch.tensor, (0.1, 1.0, math.nan, False))
    change([p], [g], [m], [v], adamw.Step(*values, 0.1, OPTIM))
    for row, want in ((p, 0), (m, 2), (v, 3)):
        assert torch.equal(row, before[want])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_changes_nothing(dtype: torch.dtype, bad: float) -> None:
    parameters = draw(dtype)
    zero = make(parameters)
    backward(parameters, gradients(1))
    take(zero, 1)
    before, weights = state(zero), {n: p.detach().clone() for n, p in parameters.items()}
    wanted = gradients(2)
    wanted["norm"][3] = bad
    backward(parameters, wanted)
    assert not math.isfinite(take(zero, 2))
    assert all(torch.equal(a, b) for a, b in zip(before, state(zero), strict=True))
    assert all(torch.equal(weights[n], p) for n, p in parameters.items())
    backward(parameters, gradients(3))
    assert math.isfinite(take(zero, 3)), "and the bad gradient is forgotten"


def test_scale_multiplies_the_gradient_before_the_clip() -> None:
    one, other = draw(), draw()
    plain, scaled = make(one), make(other)
    for step in (1, 2):
        backward(one, gradients(step))
        backward(other, {n: g / 8 for n, g in gradients(step).items()})
        assert take(scaled, step, scale=8.0) == pytest.approx(take(plain, step), rel=1e-6)
        for name in SHAPES:
            torch.testing.assert_close(one[name], other[name])


@pytest.mark.parametrize("max_norm", [0.0, 0.25, 1e3])
def test_max_grad_norm_reaches_the_update(max_norm: float) -> None:
    """With beta 0 the first moment is the clipped gradient itself."""
    parameters = draw()
    zero = make(parameters, dataclasses.replace(OPTIM, beta1=0.0, max_grad_norm=max_norm))
    backward(parameters, gradients(1))
    norm = take(zero, 1)
    kept = sum(float(o.tensor.square().sum()) for o in zero.owned() if o.kind == "exp_avg")
    assert math.sqrt(kept) == pytest.approx(min(norm, max_norm or math.inf), rel=1e-5)


def test_tied_weights_are_one_parameter() -> None:
    tied = draw()
    alone = make(draw())
    tied["head"] = tied["embed"]
    zero = make(tied)
    assert [o.name for o in zero.owned()] == [o.name for o in alone.owned()]
    backward(tied, gradients(1))
    whole = torch.cat([g.flatten() for g in gradients(1).values()])
    assert take(zero, 1) == pytest.approx(float(whole.norm()), rel=1e-6)
    assert tied["head"].data_ptr() == tied["embed"].data_ptr()


def test_frozen_parameters_are_left_alone_and_unused_ones_only_decay() -> None:
    parameters = draw()
    parameters["up"].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    zero = make(parameters)
    assert "up" not in {owned.name for owned in zero.owned()}
    backward(parameters, {"embed": gradients(1)["embed"]})
    take(zero, 1)
    assert torch.equal(parameters["up"], before["up"])
    assert torch.equal(parameters["norm"], before["norm"])
    decayed = before["down"] * (1 - OPTIM.lr * OPTIM.weight_decay)
    torch.testing.assert_close(parameters["down"].detach(), decayed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_microsteps_add_up_in_float32(dtype: torch.dtype) -> None:
    """A sum that bfloat16 cannot hold: 1 + 255 x 2^-9."""
    parameters = draw(dtype)
    zero = make(parameters, dataclasses.replace(OPTIM, beta1=0.0, max_grad_norm=0.0))
    for microstep in range(256):
        size = 2.0**-9 if microstep else 1.0
        backward(parameters, {n: torch.full(shape, size) for n, shape in SHAPES.items()})
    take(zero, 1)
    for owned in zero.owned():
        if owned.kind == "exp_avg":
            assert torch.equal(owned.tensor, torch.full_like(owned.tensor, 1 + 255 / 512))


def test_zero_grad_forgets() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        parameters = draw(dtype)
        zero = make(parameters)
        backward(parameters, gradients(1))
        zero.zero_grad()
        assert take(zero, 1) == 0


def test_bfloat16_follows_float32_masters() -> None:
    """Steps too small for bfloat16 are not lost, and weights are the rounded masters."""
    parameters = draw(torch.bfloat16)
    masters = {name: p.detach().double() for name, p in parameters.items()}
    first = {name: torch.zeros_like(p) for name, p in masters.items()}
    second = {name: torch.zeros_like(p) for name, p in masters.items()}
    zero = make(parameters, dataclasses.replace(OPTIM, lr=1e-4))
    for step in range(1, 31):
        wanted = gradients(step)
        backward(parameters, wanted)
        rounded = {n: g.bfloat16().double() for n, g in wanted.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in rounded.values()))
        assert take(zero, step, lr=1e-4) == pytest.approx(norm, rel=1e-6)
        for name, g in rounded.items():
            g = g * min(1.0, 1.0 / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            decay = 0.1 if g.dim() > 1 else 0.0
            hat = first[name] / (1 - 0.9**step), second[name] / (1 - 0.95**step)
            masters[name] *= 1 - 1e-4 * decay
            masters[name] -= 1e-4 * hat[0] / (hat[1].sqrt() + 1e-8)
    got = whole(zero.owned(), "master")
    for name, master in masters.items():
        torch.testing.assert_close(got[name], master.float().flatten(), rtol=1e-5, atol=1e-6)
        assert torch.equal(parameters[name].flatten(), got[name].bfloat16())


def whole(owned: object, kind: str) -> dict[str, Tensor]:
    """Flat parameters from runs."""
    runs: dict[str, list[Owned]] = {}
    for one in owned:  # type: ignore[attr-defined]
        if one.kind == kind:
            runs.setdefault(one.name, []).append(one)
    return {
        name: torch.cat([run.tensor for run in sorted(some, key=lambda run: run.start)])
        for name, some in runs.items()
    }


def test_parameters_follow_their_masters() -> None:
    parameters = draw(torch.bfloat16)
    zero, others = make(parameters), parameters["up"].clone()
    for owned in zero.owned():
        if owned.name == "norm" and owned.kind == "master":
            owned.tensor.fill_(1.2345)
    zero.gather_parameters()
    assert torch.equal(parameters["norm"], torch.full((6,), 1.2345).bfloat16())
    assert torch.equal(parameters["up"], others)


def test_float32_weights_are_their_own_masters() -> None:
    zero = make(draw())
    assert {owned.kind for owned in zero.owned()} == {"weight", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(("dtype", "each"), [(torch.float32, 12), (torch.bfloat16, 2 + 4 + 12)])
def test_state_bytes_by_formula(dtype: torch.dtype, each: int) -> None:
    parameters = draw(dtype)
    n = sum(p.numel() for p in parameters.values())
    zero = make(parameters)
    assert zero.state_bytes() == each * n
    assert zero.state_bytes() == held_bytes(zero)
    kinds = [id(owned.tensor.untyped_storage()) for owned in zero.owned()]
    backward(parameters, gradients(1))
    take(zero, 1)
    assert zero.state_bytes() == held_bytes(zero), "nothing is made by the first step"
    assert all(p.grad is None for p in parameters.values())
    assert len(kinds) == len(list(zero.owned()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_inputs_same_bits_and_buckets_do_not_matter(dtype: torch.dtype) -> None:
    results = []
    for bucket_bytes in (80, 80, 1 << 20):
        parameters = draw(dtype)
        zero = make(parameters, bucket_bytes=bucket_bytes)
        for step in range(1, 4):
            backward(parameters, gradients(step))
            take(zero, step)
        results.append({name: p.detach().float() for name, p in parameters.items()})
    for name in SHAPES:
        assert torch.equal(results[0][name], results[1][name])
        torch.testing.assert_close(results[0][name], results[2][name], rtol=1e-2, atol=1e-6)


def test_what_was_frozen_too_late_is_refused_not_decayed() -> None:
    parameters = draw()
    optimizer = make(parameters)
    parameters["up"].requires_grad_(False)
    before = parameters["up"].clone()
    with pytest.raises(ConfigError, match="up was frozen after this optimizer was made"):
        optimizer.step(ONE, ONE, ONE)
    assert torch.equal(parameters["up"], before)
    make(parameters).step(ONE, ONE, ONE)
    assert torch.equal(parameters["up"], before)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        make(parameters)


def test_key_value_heads_that_the_axes_do_not_join() -> None:

    class Four(Solo):
        size = 4

    axes = dataclasses.replace(Axes.solo(), tp=Four("tp"))
    llama = Llama(TIED, axes.tp)
    with pytest.raises(ConfigError, match=r"4 tensor ranks hold each .* give the mesh kv=4"):
        Zero(llama.sharded_parameters(), OPTIM, axes, sequence_parallel=False)
