"""Attention of a traced program: torch-neuronx can put its own softmax into it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llamax import ops
from llamax.kernels.attention.traced import attention_cached


def test_the_softmax_is_the_function_that_torch_neuronx_replaces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NEURON_FUSE_SOFTMAX=1 puts a function in the place of torch.nn.functional.softmax."""
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    mask = torch.ones(2, 3, 5).tril(2).bool()
    seen: list[tuple[int, ...]] = []

    def fused(x: Tensor, dim: int) -> Tensor:
        assert dim == -1
        seen.append(tuple(x.shape))
        return x.softmax(dim)

    monkeypatch.setattr(F, "softmax", fused)
    found = attention_cached(q, k, v, mask)
    assert seen == [(2, 4, 3, 5)]
    expected = ops.reference_attention_cached(q, k, v, mask)
    torch.testing.assert_close(found, expected)
