"""The NKI kernels of RMSNorm in the simulator: numbers, gradients, cost, mutations."""

from __future__ import annotations

import contextlib
from types import ModuleType

import numpy as np
import pytest
import torch
from support.simulated import Launcher, mutated

from llamax.kernels.rms_norm import nki_op, reference
from llamax.kernels.simulator.machine import NkiError, Tally

TOLERANCE = 1.2e-2  # of the largest element, as in kernels/rms_norm/README.md
FORWARD, BACKWARD = "rms_norm.nki_forward", "rms_norm.nki_backward"
Shape = tuple[int, ...]


def error(shape: Shape, modules: dict[str, ModuleType] | None = None) -> tuple[float, list[Tally]]:
    """The largest error of the result and both gradients, and the tallies."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, dy = ((torch.randn(shape, generator=generator) * 0.3).bfloat16() for _ in range(2))
    weight = (torch.randn(shape[-1], generator=generator) + 1).bfloat16()
    launcher = Launcher(modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nki_op, "launch", launcher)
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = nki_op.rms_norm(*leaves, 1e-2)
        found = [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]
    x64, weight64, dy64 = (t.double().numpy() for t in (x, weight, dy))
    want = [reference.rms_norm(x64, weight64, 1e-2)]
    want += reference.rms_norm_backward(dy64, x64, weight64, 1e-2)
    pairs = zip(found, want, strict=True)
    worst = [np.abs(a.detach().double().numpy() - b).max() / np.abs(b).max() for a, b in pairs]
    return float(max(worst)), launcher.tallies


@pytest.mark.parametrize("shape", [(128, 128), (2, 192, 384), (256, 4096), (128, 8192)])
def test_matches_float64(shape: Shape) -> None:
    assert error(shape)[0] < TOLERANCE


def test_cost() -> None:
    """DMA bounds the forward; every tensor is read or written once."""
    _, (forward, backward) = error((1024, 4096))
    tensor = 1024 * 4096 * 2
    assert forward.bound() == "dma"
    assert forward.hbm_bytes < 1.15 * 2 * tensor
    assert backward.hbm_bytes < 1.15 * 3 * tensor
    assert backward.seconds() < 1.5 * backward.engines_s()["dma"]


@pytest.mark.parametrize(
    ("tokens", "width", "why"),
    [
        (256, 4096, ""),
        (100, 4096, "100 tokens are not a multiple of 128"),
        (128, 200, "the width 200 is not a multiple of 128 up to 8192"),
        (128, 16384, "the width 16384 is not a multiple of 128 up to 8192"),
    ],
)
def test_refusals(tokens: int, width: int, why: str) -> None:
    assert nki_op.refusal(tokens, width) == why


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (FORWARD, "scale=1.0 / width", "scale=1.0"),
        (FORWARD, "bias=small, ", ""),
        (FORWARD, "op=nl.square", "op=nl.copy"),
        (FORWARD, "data1=unit, data2=factors", "data1=rows, data2=factors"),
        (FORWARD, "kept[:, nl.ds(i, 1)]", "kept[:, nl.ds(0, 1)]"),
        (BACKWARD, "operand0=-1.0 / width", "operand0=1.0 / width"),
        (BACKWARD, "data1=product, data2=factors", "data1=product, data2=product"),
        (BACKWARD, "nl.ds(c * TILE, TILE)", "nl.ds(0, TILE)"),
        (BACKWARD, "data=gradient, scale=inverse", "data=gradient"),
        (BACKWARD, "data2=rows, op=nl.add", "data2=rows, op=nl.subtract"),
    ],
)
def test_a_mutation_is_caught(module: str, old: str, new: str) -> None:
    changed = mutated(module, old, new)
    with contextlib.suppress(NkiError):
        assert not error((256, 256), {module: changed})[0] < TOLERANCE
