"""Modules of a program's own that draw random numbers, in layers that are computed again."""

from __future__ import annotations

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as metrics
from support.models import TINY
from support.own_modules import WithDropout
from torch import Tensor

from llamax.model.llama import Llama
from llamax.model.placement import move_model
from llamax.model.recompute import Recompute
from llamax.parallel.collectives import Solo


def gradients(mode: Recompute) -> tuple[list[float], dict[str, Tensor], int]:
    """Losses and gradients of three steps, and the programs compiled after the second."""
    device = torch_xla.device()
    model = Llama(TINY, Solo("tp", device), recompute=mode).init(0)
    move_model(model, device)
    for layer in model.model.layers.values():
        layer.mlp = WithDropout(layer.mlp)
    ids, losses, compiled = torch.arange(32, dtype=torch.int32).view(2, 16).to(device), [], 0
    for step in range(3):
        if step == 2:
            compiled = int(metrics.counter_value("UncachedCompile") or 0)
        model.zero_grad(set_to_none=True)
        xm.set_rng_state(step + 1)
        total, _ = model.loss(ids, ids)
        total.backward()
        torch_xla.sync()
        losses.append(float(total.detach().cpu()))
    compiled = int(metrics.counter_value("UncachedCompile") or 0) - compiled
    found = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return losses, found, compiled


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_backward_drops_what_forward_dropped(mode: Recompute) -> None:
    losses, plain, _ = gradients("none")
    again, found, compiled = gradients(mode)
    assert again == pytest.approx(losses, rel=1e-5)
    assert found.keys() == plain.keys()
    for name, gradient in found.items():
        assert (gradient - plain[name]).abs().max() <= 1e-4 * plain[name].abs().max(), name
    assert not compiled, "a step draws others, by the same program"
