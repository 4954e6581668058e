"""The kernels that the table keeps for XLA are plain torch: here they meet the references on a CPU.

What they become in a program is looked at in tests/xla.
"""

from __future__ import annotations

import pytest
import torch

from llamax import ops
from llamax.kernels.attention import cache as cached
from llamax.kernels.attention import traced


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).requires_grad_()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_attention(heads: tuple[int, int], packed: bool) -> None:
    H, K = heads
    q, k, v = drawn(2, 9, H, 8), drawn(2, 9, K, 8, seed=1), drawn(2, 9, K, 8, seed=2)
    documents = torch.tensor([[0] * 4 + [1] * 5, [0, 1, 1, 2, 2, 2, 3, 3, 3]]) if packed else None
    weight = drawn(2, 9, H, 8, seed=3).detach()
    found = []
    for kernel in (ops.traced_attention, ops.reference_attention):
        out = kernel(q, k, v, documents)
        found.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_attention_keeps_products_in_the_stored_dtype() -> None:
    q, k, v = (drawn(1, 5, 2, 8, seed=s).detach().bfloat16() for s in range(3))
    out, reference = (f(q, k, v, None) for f in (ops.traced_attention, ops.reference_attention))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, reference, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_columns(dtype: torch.dtype) -> None:
    x, column = drawn(5, 7).detach(), torch.tensor([0, 6, 3, 3, 1], dtype=dtype)
    assert ops.compared_at_columns(x, column).equal(ops.reference_at_columns(x, column))
    amount = torch.arange(5.0)
    changed = ops.compared_add_at_columns(x.clone(), column, amount)
    assert changed.equal(ops.reference_add_at_columns(x.clone(), column, amount))


def test_columns_of_hidden_logits() -> None:
    """Rows that pad the vocabulary are -inf: they must not turn a sum into NaN."""
    x = torch.tensor([[1.0, -torch.inf], [2.0, -torch.inf]])
    assert ops.compared_at_columns(x, torch.tensor([0, 0])).tolist() == [1.0, 2.0]


def test_embedding() -> None:
    ids, weight = torch.tensor([[3, 0, 3], [1, 2, 3]], dtype=torch.int32), drawn(5, 4)
    found = []
    for kernel in (ops.selected_embedding, torch.nn.functional.embedding):
        out = kernel(ids, weight)
        found.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), weight)])
    torch.testing.assert_close(found[0], found[1])


def test_a_cache_is_written_by_comparison_as_by_index_and_attended_to_alike() -> None:
    cache, new = torch.randn(3, 2, 7, 4), torch.randn(3, 2, 4)
    positions = torch.tensor([[0], [6], [3]], dtype=torch.int32)
    by_index, compared = cache.clone(), cache.clone()
    ops.write_cache(by_index, ops.cache_places(positions, cache), new)
    cached.compared_write(compared, cached.compared_places(positions, cache), new)
    assert compared.equal(by_index)
    assert (by_index != cache).sum() == new.numel()
    assert by_index[1, :, 6].equal(new[1])
    q, kv = torch.randn(3, 1, 4, 4), by_index.transpose(1, 2)
    mask = torch.arange(7) <= positions[:, None]
    found, expected = (
        kernel(q, kv, kv, mask)
        for kernel in (traced.attention_cached, ops.reference_attention_cached)
    )
    torch.testing.assert_close(found, expected)
