"""Gradients of weights that products add to their sums, at once or put off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.models import TINY
from torch import Tensor

from llamax.config.schema import OptimConfig
from llamax.model.llama import Llama
from llamax.optim import Zero
from llamax.parallel import weight_gradient
from llamax.parallel.collectives import Axes
from llamax.parallel.weight_gradient import Additions, postponing

IDS = torch.arange(32).view(2, 16)
LAYER = "model.layers.0.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def optimized(dtype: torch.dtype = torch.float32) -> tuple[Llama, Zero]:
    model = Llama(TINY, dtype=dtype).init(0)
    parameters = model.sharded_parameters()
    return model, Zero(parameters, OptimConfig(), Axes.solo(), sequence_parallel=False)


def losses(model: Llama) -> Iterator[Tensor]:
    for shift in (1, 2):
        yield model.loss(IDS, IDS.roll(shift, 1))[0]


def plain(dtype: torch.dtype) -> dict[str, Tensor]:
    """The sums of autograd's own gradients, in float32."""
    model, sums = Llama(TINY, dtype=dtype).init(0), {}
    for total in losses(model):
        total.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            sums[name] = sums.get(name, 0) + parameter.grad.float()
            parameter.grad = None
    return sums


def summed(model: Llama, optimizer: Zero) -> dict[str, Tensor]:
    found = optimizer._gradients_of([name for name, _ in model.named_parameters()])
    return {name: gradient.clone() for name, gradient in found.items()}


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_products_add_what_autograd_would(dtype: torch.dtype, close: float) -> None:
    """In float32 into ``parameter.grad``, else into the optimizer's float32 vector."""
    (model, optimizer), expected = optimized(dtype), plain(dtype)
    for total in losses(model):
        total.backward()
    found = summed(model, optimizer)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= close * gradient.abs().max(), name


def test_what_is_put_off_comes_when_it_is_done() -> None:
    (model, optimizer), expected = optimized(), plain(torch.float32)
    later: Additions = []
    with postponing(later):
        every = [*losses(model)]
    for total in every:
        total.backward()
    assert LAYER not in summed(model, optimizer)
    assert "model.norm.weight" in summed(model, optimizer)
    for add in later:
        add()
    found = summed(model, optimizer)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


def test_a_hook_sees_and_changes_the_gradient() -> None:
    (model, optimizer), expected, seen = optimized(), plain(torch.float32), []

    def twice(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return 2 * gradient

    model.get_parameter(LAYER).register_hook(twice)
    with postponing([]):
        every = [*losses(model)]
    for total in every:
        total.backward()
    assert len(seen) == 2
    assert torch.allclose(summed(model, optimizer)[LAYER], 2 * expected[LAYER], atol=1e-6)


def test_recomputed_layers_add_too() -> None:
    (model, optimizer), expected = optimized(), plain(torch.float32)
    model.model.mode = "full"
    for total in losses(model):
        total.backward()
    found = summed(model, optimizer)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_returns_the_gradients_that_it_is_asked_for(mode: str, dtype: torch.dtype) -> None:
    """As without an optimizer; what was summed before stays as it was."""
    (model, optimizer), whole = optimized(dtype), Llama(TINY, dtype=dtype).init(0)
    model.model.mode = whole.model.mode = mode  # type: ignore[assignment]
    for total in losses(model):
        total.backward()
    before = summed(model, optimizer)
    names = [name for name, _ in model.named_parameters()][::2]
    assert LAYER in names
    with postponing([]):
        (total, _) = model.loss(IDS, IDS.roll(1, 1))
    found = torch.autograd.grad(total, [model.get_parameter(name) for name in names])
    expected = torch.autograd.grad(
        whole.loss(IDS, IDS.roll(1, 1))[0], [whole.get_parameter(name) for name in names]
    )
    for name, mine, theirs in zip(names, found, expected, strict=True):
        assert torch.equal(mine, theirs), name
    for name, gradient in summed(model, optimizer).items():
        assert torch.equal(gradient, before[name]), name


def test_gradients_of_inputs_leave_the_sums_alone() -> None:
    model, optimizer = optimized()
    layer, x = model.model.layers["0"].mlp, torch.randn(2, 16, TINY.hidden_size, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).sum(), [x])
    assert dx.abs().max() > 0
    assert summed(model, optimizer) == {}


def test_a_backward_sums_the_gradients_that_it_is_asked_for() -> None:
    (model, optimizer), expected = optimized(), plain(torch.float32)
    for total in losses(model):
        total.backward(inputs=[model.get_parameter(LAYER)])
    (found,) = summed(model, optimizer).items()
    assert found[0] == LAYER
    assert torch.allclose(found[1], expected[LAYER], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_adds_rows(dtype: torch.dtype) -> None:
    """Bit for bit as torch's own gradient in the first microstep; ids come several times."""
    (model, optimizer), whole = optimized(dtype), Llama(TINY, dtype=dtype).init(0)
    ids = IDS % 5
    for each in (model, whole):
        each.model.embed_tokens(ids).float().square().sum().backward()
    expected = whole.get_parameter(EMBEDDING).grad
    found = summed(model, optimizer)[EMBEDDING]
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    assert torch.allclose(found, expected.float(), rtol=0.02, atol=1e-3)
    before = found.clone()
    rows = model.model.embed_tokens(ids)
    (returned,) = torch.autograd.grad(rows.sum(), [model.get_parameter(EMBEDDING)])
    assert returned.float().sum() == ids.numel() * TINY.hidden_size
    assert torch.equal(summed(model, optimizer)[EMBEDDING], before)


@pytest.fixture
def three_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding's gradient in three blocks of rows, the last one short."""
    rows = -(-TINY.vocab_size // 3) + 1
    monkeypatch.setattr(weight_gradient, "BLOCK_BYTES", 4 * TINY.hidden_size * rows)


@pytest.mark.usefixtures("three_blocks")
def test_the_gradient_of_an_embedding_lies_in_blocks() -> None:
    """Nothing of the whole gradient's size is made; its bits are those of torch's own gradient."""
    (model, optimizer), whole = optimized(), Llama(TINY).init(0)
    total = model.model.embed_tokens.gradient_sum
    for each in (model, whole):
        each.model.embed_tokens(IDS % 31).square().sum().backward()
    assert model.get_parameter(EMBEDDING).grad is None
    sizes = [part.nbytes for part in total.parts()]
    assert len(sizes) == 3
    assert max(sizes) <= weight_gradient.BLOCK_BYTES
    assert torch.equal(summed(model, optimizer)[EMBEDDING], whole.get_parameter(EMBEDDING).grad)
    optimizer.zero_grad()
    assert not total.parts()


@pytest.mark.usefixtures("three_blocks")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_blocks_of_an_embedding_are_updated_as_a_whole(tied: bool, hooked: bool) -> None:
    """Over buckets that end within a block, also where autograd makes a part of the gradient."""
    shape = replace(TINY, tie_word_embeddings=tied)
    optim, one = OptimConfig(lr=0.1, max_grad_norm=0.0), torch.tensor(1.0)
    weights = []
    for block_bytes in (2**20, weight_gradient.BLOCK_BYTES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weight_gradient, "BLOCK_BYTES", block_bytes)
            model = Llama(shape).init(0)
            optimizer = Zero(
                model.sharded_parameters(),
                optim,
                Axes.solo(),
                sequence_parallel=False,
                bucket_bytes=1000,
            )
            first, second = losses(model)
            first.backward()
            if hooked:
                model.get_parameter(EMBEDDING).register_hook(lambda gradient: 2 * gradient)
            second.backward()
            optimizer.step(torch.tensor(0.1), one, one)
            assert model.get_parameter(EMBEDDING).grad is None
            weights.append({name: x.clone() for name, x in model.state_dict().items()})
    for name, expected in weights[0].items():
        assert torch.equal(weights[1][name], expected), name
