"""The loss on one rank: its chunks and products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llamax.parallel import cross_entropy
from llamax.parallel.collectives import Solo


def test_logits_are_products_with_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """MKL keeps what a product has packed: a product with the whole head would keep more."""
    torch.manual_seed(0)
    x, weight, labels = torch.randn(2, 48, 64), torch.randn(500, 64), torch.randint(500, (2, 48))
    shapes: list[int] = []
    product = torch.mm

    def counted(a: Tensor, b: Tensor, **more: Tensor) -> Tensor:
        shapes.append(b.shape[1])
        return product(a, b, **more)

    found = []
    for rows in (500, 64):
        monkeypatch.setattr(cross_entropy, "PRODUCT_ROWS", rows)
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "mm", counted)
            total, _ = cross_entropy.vocab_parallel_loss(*leaves, labels, Solo("tp"), 500)
        total.backward()
        found.append([total.detach(), *(leaf.grad for leaf in leaves)])
    assert shapes == [500, *7 * [64], 52]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
