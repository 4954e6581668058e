"""Attention with rotary positions in the NKI kernels: numbers, gradient, cost, mutations."""

from __future__ import annotations

import contextlib
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.simulated import Launcher, mutated
from torch import Tensor

from llamax.kernels.attention import nki_op
from llamax.kernels.attention import reference as attention
from llamax.kernels.rope import reference as rope
from llamax.kernels.simulator.machine import NkiError, Tally
from llamax.tools.plan.nki_time import head_seconds

TOLERANCE = 1.2e-2  # of the largest element, as in kernels/attention/README.md
FORWARD, BACKWARD = "attention.nki_forward", "attention.nki_backward"
ROTATE = "rope.nki_rotate"
Shape = tuple[int, int, int, int, int]  # B, S, H, K, E


def angles(positions: Tensor, width: int) -> Tensor:
    """The rotary angles [.., S, E / 2] of positions [.., S]."""
    return positions[..., None] * 10000.0 ** (-torch.arange(0, width, 2) / width)


def simulated(
    shape: Shape,
    positions: Tensor,
    documents: Tensor | None,
    modules: dict[str, ModuleType] | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray], list[Tally]]:
    """The result and gradients of q, k and v by the kernels; their inputs; and the tallies."""
    B, S, H, K, E = shape
    generator = torch.Generator().manual_seed(sum(shape))
    qkv = torch.randn(B, S, (H + 2 * K) * E, generator=generator).bfloat16()
    dout = torch.randn(B, S, H * E, generator=generator).bfloat16()
    table = angles(positions, E).repeat(1, 1, 2)
    launcher, leaf = Launcher(modules), qkv.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nki_op, "launch", launcher)
        out = nki_op.rotated_attention(leaf, table.cos(), table.sin(), H, documents)
        (gradient,) = torch.autograd.grad(out, leaf, dout)
    assert out.dtype == gradient.dtype == torch.bfloat16
    heads = [out.unflatten(-1, (-1, E)), *gradient.unflatten(-1, (-1, E)).split((H, K, K), 2)]
    given = [*qkv.unflatten(-1, (-1, E)).split((H, K, K), 2), dout.unflatten(-1, (-1, E))]
    found, inputs = ([x.detach().double().numpy() for x in each] for each in (heads, given))
    return found, inputs, launcher.tallies


def expected(inputs: list[np.ndarray], positions: Tensor, documents: Any) -> list[np.ndarray]:
    """The same in float64 by the references of rope and attention."""
    q, k, v, dout = inputs
    turns = angles(positions.double(), q.shape[-1]).expand(len(q), -1, -1).numpy()
    q, k = rope.rotate(q, turns), rope.rotate(k, turns)
    dq, dk, dv = attention.attention_backward(dout, q, k, v, documents)
    out = attention.attention(q, k, v, documents)
    return [out, rope.rotate(dq, -turns), rope.rotate(dk, -turns), dv]


def error(found: list[np.ndarray], want: list[np.ndarray]) -> float:
    """The largest difference over the largest element, of all results."""
    pairs = zip(found, want, strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


CASES: list[tuple[Shape, bool]] = [
    ((1, 256, 4, 2, 64), True),
    ((2, 128, 2, 1, 128), False),
    ((1, 640, 1, 1, 64), False),
]


def case(shape: Shape, packed: bool) -> tuple[Tensor, Tensor | None]:
    """Positions that begin again in each document, and the documents' numbers, or neither."""
    place = torch.arange(shape[1]).expand(shape[0], -1)
    return (place % 90, place // 90) if packed else (place[:1], None)


@pytest.mark.parametrize(("shape", "packed"), CASES)
def test_matches_float64(shape: Shape, packed: bool) -> None:
    positions, documents = case(shape, packed)
    found, inputs, _ = simulated(shape, positions, documents)
    numbers = None if documents is None else documents.numpy()
    assert error(found, expected(inputs, positions, numbers)) < TOLERANCE


def test_long_sequences_in_segments_with_tables_in_hbm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sequences above 4,096 and 8,192 tokens do, here at 256 and 512."""
    Launcher()
    monkeypatch.setattr(import_module(f"llamax.kernels.{BACKWARD}"), "SEGMENT", 256)
    monkeypatch.setattr(import_module(f"llamax.kernels.{ROTATE}"), "HELD", 512)
    positions, _ = case((1, 640, 1, 1, 64), False)
    found, inputs, _ = simulated((1, 640, 1, 1, 64), positions, None)
    assert error(found, expected(inputs, positions, None)) < TOLERANCE


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("apart", [False, True])
def test_the_planner_knows_the_cost(width: int, apart: bool) -> None:
    for length, heads in ((1024, 2), (2048, 1)):
        place = torch.arange(length)[None]
        documents = place // 50 % 3 if apart else None
        _, _, tallies = simulated((1, length, heads, 1, width), place, documents)
        planned = head_seconds(length, width, apart, heads, 1)
        for tally, seconds in zip(tallies, planned, strict=True):
            assert seconds == pytest.approx(tally.seconds(), rel=0.05)


def test_each_tensor_crosses_hbm_once() -> None:
    """Forward: qkv twice, out, tables; backward: qkv twice, out, dout, tables."""
    length, width = 512, 128
    _, _, tallies = simulated((1, length, 2, 1, width), torch.arange(length)[None], None)
    rows, tables, statistics = length * width * 2, length * width * 4, 3 * 2 * length * 4
    for tally, tensors in zip(tallies, (4 + 4 + 2, 4 + 4 + 2 + 2), strict=True):
        assert tensors * rows < tally.hbm_bytes <= tensors * rows + tables + statistics


MUTATIONS = [  # module, a part of a line, what replaces it
    (ROTATE, "(own == 1) != backward", "(own == 1) == backward"),
    (ROTATE, "operand0=scale", "operand0=1.0"),
    (ROTATE, "(crossed, 1 - own, tables[1])", "(crossed, own, tables[1])"),
    (ROTATE, "(kept, own, tables[0])", "(kept, own, tables[1])"),
    (ROTATE, "stationary=rows[:, low + i, :]", "stationary=rows[:, i, :]"),
    (ROTATE, "part = nl.ds(start // TILE", "part = nl.ds(0"),
    (ROTATE, "dst=x[nl.ds(start + i * TILE, TILE), :]", "dst=x[nl.ds(start, TILE), :]"),
    (FORWARD, "nl.ds((heads + kv) * width, width)", "nl.ds(kv * width, width)"),
    (FORWARD, "dst.dtype, 1.0, False", "dst.dtype, 1.0, True"),
    (FORWARD, "store_rows(rows[1], turned, start)", "store_rows(rows[1], loaded, start)"),
    (BACKWARD, "(minus_lse[b, h], out[b, :, h, :])", "(minus_lse[b, h], dout[b, :, h, :])"),
    (BACKWARD, "negate=True", "negate=False"),
    (BACKWARD, "result.dtype, scale, True", "result.dtype, scale, False"),
    (BACKWARD, "low + start, part), identity", "low, part), identity"),
    (BACKWARD, "(tables[0][b], tables[1][b])", "(tables[1][b], tables[0][b])"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "old", "new"), MUTATIONS)
def test_a_mutation_is_caught(module: str, old: str, new: str) -> None:
    """A changed line gives another number or breaks a limit."""
    Launcher()
    kernels = [import_module(f"llamax.kernels.{name}") for name in (ROTATE, FORWARD, BACKWARD)]
    changed = mutated(module, old, new)
    shape = (1, 640, 1, 1, 64) if "start" in old or "low" in old else (1, 256, 2, 1, 64)
    positions, documents = case(shape, False)
    with contextlib.suppress(NkiError), pytest.MonkeyPatch.context() as patch:
        if module == ROTATE:  # the kernels imported its functions
            for name in ("load_rows", "store_rows", "rotate", "turn", "take_tables"):
                for kernel in kernels:
                    patch.setattr(kernel, name, getattr(changed, name))
        modules = {} if module == ROTATE else {module: changed}
        found, inputs, _ = simulated(shape, positions, documents, modules)
        assert not error(found, expected(inputs, positions, None)) < TOLERANCE
