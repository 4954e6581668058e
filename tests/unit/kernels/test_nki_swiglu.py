"""The NKI kernels of SwiGLU in the simulator: numbers, gradient, cost, mutations."""

from __future__ import annotations

import contextlib
from types import ModuleType

import numpy as np
import pytest
import torch
from support.simulated import Launcher, mutated

from llamax.kernels.simulator.machine import NkiError, Tally
from llamax.kernels.swiglu import nki_op, reference

TOLERANCE = 1.2e-2  # of the largest element, as in kernels/swiglu/README.md
FORWARD, BACKWARD = "swiglu.nki_forward", "swiglu.nki_backward"


def error(
    shape: tuple[int, ...], modules: dict[str, ModuleType] | None = None
) -> tuple[float, list[Tally]]:
    """The largest error of the result and the gradient, and the tallies."""
    generator = torch.Generator().manual_seed(sum(shape))
    gate_up = (torch.randn(shape, generator=generator) * 2).bfloat16()
    dy = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator).bfloat16()
    launcher, leaf = Launcher(modules), gate_up.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nki_op, "launch", launcher)
        y = nki_op.swiglu(leaf)
        (gradient,) = torch.autograd.grad(y, leaf, dy)
    assert y.dtype == gradient.dtype == torch.bfloat16
    wide = gate_up.double().numpy()
    want = reference.swiglu(wide), reference.swiglu_backward(dy.double().numpy(), wide)
    pairs = zip((y, gradient), want, strict=True)
    worst = [np.abs(a.detach().double().numpy() - b).max() / np.abs(b).max() for a, b in pairs]
    return float(max(worst)), launcher.tallies


@pytest.mark.parametrize("shape", [(128, 2), (2, 192, 354), (256, 5504)])
def test_matches_float64(shape: tuple[int, ...]) -> None:
    assert error(shape)[0] < TOLERANCE


def test_cost() -> None:
    """DMA bounds both ways; every number is read or written once."""
    _, (forward, backward) = error((512, 2 * 1376))
    row = 512 * 1376 * 2
    assert forward.bound() == backward.bound() == "dma"
    assert (forward.hbm_bytes, backward.hbm_bytes) == (3 * row, 5 * row)


def test_refusals() -> None:
    assert nki_op.refusal(256) == ""
    assert nki_op.refusal(100) == "100 tokens are not a multiple of 128"


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (FORWARD, "op=nl.silu", "op=nl.sigmoid"),
        (FORWARD, "data1=activated, data2=up", "data1=activated, data2=gate"),
        (FORWARD, "(start, width + start)", "(start, start)"),
        (FORWARD, "y[place, nl.ds(start, size)]", "y[place, nl.ds(0, size)]"),
        (BACKWARD, "op=nl.silu_dx", "op=nl.sigmoid"),
        (BACKWARD, "op=nl.silu, data=gate", "op=nl.silu, data=up"),
        (BACKWARD, "nl.ds(width + start, size)", "nl.ds(start, size)"),
        (BACKWARD, "data1=up, data2=slopes", "data1=gate, data2=slopes"),
        (BACKWARD, "data1=up, data2=derived", "data1=up, data2=activated"),
    ],
)
def test_a_mutation_is_caught(module: str, old: str, new: str) -> None:
    changed = mutated(module, old, new)
    with contextlib.suppress(NkiError):
        assert not error((128, 5504), {module: changed})[0] < TOLERANCE
