"""What torch's fused attention is given on a GPU: the same numbers, and never all scores."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from llamax import ops
from llamax.kernels.attention import fused

B, H, K, E = 2, 8, 2, 16


def inputs(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((queries, H), (keys, K), (keys, K))
    return [torch.randn(B, *shape, E, generator=generator).to(dtype) for shape in shapes]


def mask_of(queries: int, keys: int) -> Tensor:
    """Causal, and of two documents in the first sequence."""
    documents = torch.zeros(B, keys)
    documents[0, keys // 3 :] = 1
    return ops._causal_mask(torch.empty(B, queries, 1), torch.empty(B, keys, 1), documents)


@pytest.mark.parametrize(("queries", "keys"), [(12, 12), (1, 12), (5, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gets_the_numbers_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, dtype: torch.dtype
) -> None:
    given: list[tuple[int, int]] = []
    attention = F.scaled_dot_product_attention

    def seen(q: Tensor, k: Tensor, *more: Tensor | None, **settings: bool) -> Tensor:
        given.append((q.shape[1], k.shape[1]))
        return attention(q, k, *more, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    mask, leaves = mask_of(queries, keys), [x.requires_grad_() for x in inputs(queries, keys)]
    expected = ops.reference_attention_cached(*leaves, mask)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    wide = torch.autograd.grad(expected, leaves, dy)
    cast = [x.detach().to(dtype).requires_grad_() for x in leaves]
    y = fused.on_gpu(*cast, mask)
    assert y.shape == expected.shape
    assert y.dtype == dtype
    found = [y, *torch.autograd.grad(y, cast, dy.to(dtype))]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for place, (a, b) in enumerate(zip(found, [expected, *wide], strict=True)):
        assert (a.float() - b).abs().max() <= tolerance * b.abs().max(), place
    (heads,) = given
    assert heads[0] == heads[1], "masked kernels do not read grouped heads"
    assert heads[0] == (K if queries == 1 else H), "one token's cache is not copied"


@pytest.mark.parametrize(
    ("dtype", "grouped"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)]
)
@pytest.mark.parametrize("queries", [12, 6])
def test_flash_attention_reads_grouped_heads(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, grouped: bool, queries: int
) -> None:
    given: list[tuple[int, int]] = []

    def seen(q: Tensor, k: Tensor, *_: object, **settings: bool) -> Tensor:
        given.append((q.shape[1], k.shape[1]))
        assert settings["enable_gqa"] == grouped
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    mask = None if queries == 12 else causal_lower_right(queries, 12)
    fused.on_gpu(*inputs(queries, 12, dtype), mask)
    assert given == [(H, K if grouped else H)]
