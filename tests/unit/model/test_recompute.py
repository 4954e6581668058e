"""Modules of a program's own that draw random numbers, in layers that backward computes again."""

from __future__ import annotations

import pytest
import torch
from support.models import TINY
from support.own_modules import WithDropout
from torch import Tensor

from llamax.model.llama import Llama
from llamax.model.recompute import Recompute


def gradients(mode: Recompute) -> tuple[float, dict[str, Tensor]]:
    model = Llama(TINY, recompute=mode).init(0)
    for layer in model.model.layers.values():
        layer.mlp = WithDropout(layer.mlp)
    torch.manual_seed(1)
    ids = torch.arange(32).view(2, 16)
    total, _ = model.loss(ids, ids)
    after = torch.rand(())
    total.backward()
    assert not torch.rand(()).equal(after), "backward does not turn the generator back"
    return float(total.detach()), {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_backward_drops_what_forward_dropped(mode: Recompute) -> None:
    loss, plain = gradients("none")
    again, found = gradients(mode)
    assert again == loss
    assert found.keys() == plain.keys()
    for name, gradient in found.items():
        assert (gradient - plain[name]).abs().max() <= 1e-5 * plain[name].abs().max(), name
