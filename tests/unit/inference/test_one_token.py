"""A step of decoding as a list of operations: what it computes, and which models it is for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.models import tiny

from llamax import ops
from llamax.config.model import ModelConfig, RopeScaling
from llamax.inference import one_token as module
from llamax.inference.kv_cache import KVCache
from llamax.inference.kv_pool import KVPool
from llamax.inference.one_token import OneToken, one_token
from llamax.model import int8
from llamax.model.layout import transpose_weights
from llamax.model.llama import FeedForward, Llama

SMALL = tiny(
    hidden_size=64,
    intermediate_size=96,
    num_key_value_heads=2,
    vocab_size=320,
    max_position_embeddings=96,
    initializer_range=0.2,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32),
)
CONFIGS = {
    "grouped": SMALL,
    "a key head for each query head": dataclasses.replace(SMALL, num_key_value_heads=4),
    "tied, wide heads": dataclasses.replace(SMALL, tie_word_embeddings=True, head_dim=32),
}
DTYPES = {"float32": 1e-5, "int8": 0.02, "bfloat16": 0.03}  # largest difference, of largest logit
PLACES = {"one": [7], "alike": [7, 7, 7], "different": [3, 9, 1]}


def built(config: ModelConfig, dtype: str) -> Llama:
    model = Llama(config).init(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # the norms
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    if dtype == "int8":
        int8.quantize(model)
    transpose_weights(model)
    return model.to(torch.bfloat16) if dtype == "bfloat16" else model


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_cache_are_those_of_the_model(
    config: ModelConfig, dtype: str, places: list[int]
) -> None:
    if dtype == "bfloat16" and not ops.has_bf16_units():
        pytest.skip("this processor does not multiply bfloat16")
    torch.manual_seed(0)
    model, B, width = built(config, dtype), len(places), max(places) + 1
    forward = one_token(model)
    assert isinstance(forward, OneToken)
    pools = [KVPool(model, slots=4, length=12) for _ in range(2)]
    for layer in range(config.num_hidden_layers):
        for cache, copy in zip(pools[0].layers[layer], pools[1].layers[layer], strict=True):
            copy.copy_(cache.normal_())
    with torch.inference_mode():
        for _ in range(2):  # the second time with what the first has kept
            ids_B1, positions_B1 = torch.randint(320, (B, 1)), torch.tensor(places)[:, None]
            attend = pools[0].decode(positions_B1, width)
            exact = model(ids_B1, positions_B1, attend=attend)
            found = forward(ids_B1, positions_B1, pools[1], width)
            assert found.shape == exact.shape
            limit = DTYPES[dtype]
            assert (found - exact).abs().max() < limit * exact.abs().max()
    for layer in range(config.num_hidden_layers):
        for cache, copy in zip(pools[0].layers[layer], pools[1].layers[layer], strict=True):
            assert (cache - copy).abs().max() < limit * cache.abs().max()


class Doubled(FeedForward):
    def forward(self, x_BsD: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x_BsD)


class Sharper(Llama):
    def logits_of(self, x_BsD: torch.Tensor) -> torch.Tensor:
        return 2 * super().logits_of(x_BsD)


def test_a_model_with_blocks_of_a_users_own_computes_by_itself() -> None:
    changed = Llama(SMALL).init(0)
    changed.model.layers["1"].mlp.__class__ = Doubled
    hooked = Llama(SMALL).init(0)
    hooked.model.layers["0"].register_forward_hook(lambda module, inputs, y_BsD: 2 * y_BsD)
    in_float16 = Llama(SMALL, dtype=torch.float16).init(0)
    for model in (changed, hooked, Sharper(SMALL).init(0), in_float16):
        forward, cache = one_token(model), KVCache(8)
        assert not isinstance(forward, OneToken)
        with torch.inference_mode():
            text = torch.tensor([[5, 3, 8, 9]])
            exact = model(text)[:, 3:]
            model(text[:, :3], attend=cache.prefill)
            found = forward(text[:, 3:], torch.tensor([[3]]), cache, 4)
        torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-2)


def test_products_follow_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer in 8 bits has other kernels for one row than for many."""
    model, counts = built(SMALL, "int8"), []
    product = int8.Int8Linear.product

    def spied(self: int8.Int8Linear, count: int) -> int8.Product:
        counts.append(count)
        return product(self, count)

    monkeypatch.setattr(int8.Int8Linear, "product", spied)
    forward, pool = module.OneToken(model), KVPool(model, slots=4, length=12)
    with torch.inference_mode():
        for rows in (1, 1, 4, 1):
            at = torch.zeros(rows, 1, dtype=torch.int64)
            forward(at, at, pool, 1)
    layers = 4 * SMALL.num_hidden_layers  # the output projection is asked each time
    assert counts == [1] * (layers + 2) + [4] * (layers + 1) + [1] * (layers + 1)
