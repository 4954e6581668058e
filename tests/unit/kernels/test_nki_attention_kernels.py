"""The NKI attention kernels in the simulator: numbers, gradients, documents, cost, mutations."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.simulated import Launcher, mutated
from torch import Tensor

from llamax import ops
from llamax.config.constants import nki_refusal
from llamax.kernels.attention import nki_op, reference
from llamax.kernels.simulator.machine import CLOCK_HZ, NkiError, Tally

TOLERANCE = 1.2e-2  # of the largest element, as in kernels/attention/README.md
CAUSAL_PAIRS = 4096**2 / 2


def inputs(shape: tuple[int, int, int, int, int], seed: int = 0, size: float = 1.0) -> list[Tensor]:
    """q, k, v and dout in bf16 for (B, S, H, K, E); q and k are ``size`` times as large."""
    B, S, H, K, E = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((H, size), (K, size), (K, 1.0), (H, 1.0))
    return [(torch.randn(B, S, n, E, generator=generator) * m).bfloat16() for n, m in sizes]


def exact(tensors: list[Tensor], documents: Tensor | None) -> list[np.ndarray]:
    """The output and gradients in float64 by the reference."""
    q, k, v, dout = (x.double().numpy() for x in tensors)
    numbers = None if documents is None else documents.numpy()
    out = reference.attention(q, k, v, numbers)
    return [out, *reference.attention_backward(dout, q, k, v, numbers)]


def by_torch(tensors: list[Tensor], documents: Tensor | None) -> list[np.ndarray]:
    """The same by torch's own attention and autograd, in float64."""
    q, k, v = (x.double().requires_grad_() for x in tensors[:3])
    out = ops.fused_attention(q, k, v, documents)
    gradients = torch.autograd.grad(out, (q, k, v), tensors[3].double())
    return [x.detach().numpy() for x in (out, *gradients)]


def simulated(
    tensors: list[Tensor], documents: Tensor | None, modules: dict[str, ModuleType] | None = None
) -> tuple[list[np.ndarray], list[Tally]]:
    """The output, the gradients and the tallies of forward and backward."""
    launcher = Launcher(modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nki_op, "launch", launcher)
        q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
        out = nki_op.attention(q, k, v, documents)
        gradients = torch.autograd.grad(out, (q, k, v), tensors[3])
    return [x.detach().double().numpy() for x in (out, *gradients)], launcher.tallies


def error(found: list[np.ndarray], want: list[np.ndarray]) -> float:
    """The largest difference over the largest element, of all results."""
    return max(
        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, want, strict=True)
    )


def check_large(found: list[np.ndarray], want: list[np.ndarray], size: float) -> None:
    """Compare results of scores that leave weights of 0 and 1.

    The gradients of q and k are all but zero then: their error is that of (dout v - delta) in bf16
    times k and q, so it is compared with the largest dv times ``size``.
    """
    largest = np.abs(want[3]).max()
    for a, b, factor in zip(found, want, (1, size, size, 1), strict=True):
        assert np.abs(a - b).max() < TOLERANCE * largest * factor


def numbers(kind: str, batch: int, length: int) -> Tensor | None:
    """Document numbers [B, S] of a kind."""
    place = torch.arange(length).expand(batch, -1)
    return {
        "none": None,
        "one": torch.full((batch, length), 7),
        "short": place // 37,
        "tiles": place // 128,
        "uneven": (place > length // 3).int() + (place > length - 2).int(),
        "falling": 1000 - place // 90,
        "returning": place // 50 % 3,
        "unpadded": torch.where(place < length // 2, place // 60, -1),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["none", "one", "short", "tiles", "uneven", "falling", "returning"]
)
@pytest.mark.parametrize("shape", [(1, 256, 2, 1, 64), (2, 640, 2, 2, 128)])
def test_matches_float64(shape: tuple[int, int, int, int, int], kind: str) -> None:
    tensors, documents = inputs(shape), numbers(kind, shape[0], shape[1])
    found, _ = simulated(tensors, documents)
    assert error(found, by_torch(tensors, documents)) < TOLERANCE


def test_matches_the_reference_of_this_folder() -> None:
    tensors, documents = inputs((1, 256, 4, 2, 64), seed=3), numbers("short", 1, 256)
    found, _ = simulated(tensors, documents)
    assert error(found, exact(tensors, documents)) < TOLERANCE


@settings(deadline=None, max_examples=6)
@given(
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([64, 128]),
    st.sampled_from(["none", "short", "unpadded", "returning"]),
    st.sampled_from([0.1, 1.0, 6.0]),
)
def test_any_shape(tiles: int, groups: int, kv: int, width: int, kind: str, size: float) -> None:
    tensors = inputs((1, 128 * tiles, groups * kv, kv, width), seed=tiles, size=size)
    documents = numbers(kind, 1, 128 * tiles)
    found, _ = simulated(tensors, documents)
    want = by_torch(tensors, documents)
    if size > 1.0:
        check_large(found, want, size)
    else:
        assert error(found, want) < TOLERANCE


@pytest.mark.parametrize("size", [1.0, 4.0, 40.0])
@pytest.mark.parametrize("kind", ["none", "short"])
def test_scores_of_any_size(size: float, kind: str) -> None:
    """Large scores need running maxima; their bounds choose them by data, in one program."""
    tensors, documents = inputs((1, 1152, 1, 1, 64), size=size), numbers(kind, 1, 1152)
    q, k = (x.transpose(1, 2) for x in tensors[:2])
    assert bool(nki_op.centres(q, k)[1].any()) == (size > 1.0)
    found, _ = simulated(tensors, documents)
    check_large(found, by_torch(tensors, documents), size)


def test_a_block_with_one_large_query_is_right_too() -> None:
    tensors = inputs((1, 640, 1, 1, 64))
    tensors[0][:, 130] *= 300.0
    found, _ = simulated(tensors, None)
    assert np.isfinite(np.concatenate([x.ravel() for x in found])).all()
    assert error(found[:1], by_torch(tensors, None)[:1]) < TOLERANCE


def test_segments_of_long_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer sequences than a segment give the same gradients; here with segments of 512."""
    tensors, documents = inputs((1, 1408, 2, 1, 64), seed=9), numbers("short", 1, 1408)
    Launcher()
    monkeypatch.setattr(import_module(f"llamax.kernels.{BACKWARD}"), "SEGMENT", 512)
    for chosen in (None, documents):
        found, _ = simulated(tensors, chosen)
        assert error(found, by_torch(tensors, chosen)) < TOLERANCE


# --- cost: what the documented cycles allow ------------------------------------------------------


def causal_seconds(products: int) -> float:
    """The tensor engine's least time for matrix products over the causal half at 4096 x 128."""
    return products * CAUSAL_PAIRS * 128 / (128 * 128 * CLOCK_HZ["tensor"])


def test_cost_at_4096() -> None:
    tensors = inputs((1, 4096, 1, 1, 128))
    _, (forward, backward) = simulated(tensors, None)
    assert forward.bound() == backward.bound() == "tensor"
    assert forward.seconds() <= 1.35 * causal_seconds(2)
    assert backward.seconds() <= 1.5 * causal_seconds(5)
    apart = torch.arange(4096)[None] // 1024
    _, tallies = simulated(tensors, apart)
    for whole, separate in zip((forward, backward), tallies, strict=True):
        assert separate.seconds() <= 0.45 * whole.seconds()
        for engine in ("tensor", "scalar"):
            assert separate.cycles[engine] <= 0.45 * whole.cycles[engine]


@pytest.mark.parametrize("documents", [False, True])
def test_hbm_bytes_are_linear_in_the_length(documents: bool) -> None:
    def moved(length: int) -> list[int]:
        tensors = inputs((1, length, 2, 1, 64))
        return [
            t.hbm_bytes
            for t in simulated(tensors, numbers("short", 1, length) if documents else None)[1]
        ]

    for shorter, longer in zip(moved(512), moved(1024), strict=True):
        assert longer <= 2.01 * shorter


def test_key_value_heads_are_read_once() -> None:
    """Eight query heads that share a key/value head read it once."""
    one, eight = (simulated(inputs((1, 512, n, 1, 64)), None)[1][0].hbm_bytes for n in (1, 8))
    queries = 512 * 64 * 2 * 2 + 512 * 4 + 128 * 4  # q, the output, the log-sum-exp and a centre
    assert eight - one == 7 * queries


# --- what the graph computes for the kernels -----------------------------------------------------


def test_kinds_of_blocks_by_hand() -> None:
    documents = torch.tensor([[0] * 512 + [1] * 300 + [2] * 212 + [3] * 128])
    plain, mixed = nki_op.block_kinds(documents, forward=True)
    assert plain.shape == mixed.shape == (1, 3, 9)
    assert plain[0].tolist() == [
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [0] * 9,
        [0, 0, 0, 0, 0, 0, 0, 0, 1],
    ]
    assert mixed[0].tolist() == [[0] * 9, [0, 0, 0, 0, 1, 1, 1, 1, 0], [0] * 9]
    plain, mixed = nki_op.block_kinds(documents, forward=False)
    assert plain.shape == (1, 9, 3)
    assert plain[0, 0].tolist() == [1, 0, 0]
    assert mixed[0, 5].tolist() == [0, 1, 0]


@pytest.mark.parametrize("size", [0.3, 1.0, 2.0, 3.0])
def test_centres_bound_every_score(size: float) -> None:
    q, k, _, _ = (x.transpose(1, 2) for x in inputs((2, 640, 4, 2, 64), size=size))
    bias, again = nki_op.centres(q, k)
    scores = (q.double() @ k.double().repeat_interleave(2, 1).mT) / 8
    causal = torch.ones(640, 640, dtype=torch.bool).tril()
    largest = scores.masked_fill(~causal, -torch.inf).amax(-1)
    every = scores.amax(-1)
    for block in range(2):
        rows = slice(512 * block, 512 * (block + 1))
        centre = -bias[:, :, 0, block].double()[..., None]
        near = again[:, :, block] == 0
        assert ((every[:, :, rows] - centre)[near] < 66).all()
        assert ((largest[:, :, rows] - centre)[near] > -66).all()


@pytest.mark.parametrize(
    ("length", "width", "why"),
    [
        (256, 128, ""),
        (300, 64, "the sequence length 300 is not a multiple of 128"),
        (65536, 64, "the sequence length 65536 is above 32768"),
        (256, 96, "head_dim=96 is neither 64 nor 128"),
    ],
)
def test_refusals(length: int, width: int, why: str) -> None:
    assert nki_refusal(length, width) == why


# --- mutations -----------------------------------------------------------------------------------

FORWARD, BACKWARD = "attention.nki_forward", "attention.nki_backward"
MUTATIONS = [  # module, a part of a line, what replaces it
    (FORWARD, "scale = width**-0.5", "scale = width**-0.4"),
    (FORWARD, "channel_multiplier=-1,", "channel_multiplier=-2,"),
    (FORWARD, "value=HIDDEN * 3.0", "value=-HIDDEN"),
    (FORWARD, "first + row, row, True, False)", "first + row, row, False, False)"),
    (FORWARD, "for j in range(first):", "for j in range(first - 1):"),
    (FORWARD, "(t - row) * TILE", "t * TILE"),
    (FORWARD, "value=1.0)\n    for j", "value=2.0)\n    for j"),
    (FORWARD, "op0=nl.not_equal", "op0=nl.greater"),
    (FORWARD, "operand0=inverse", "operand0=1.0"),
    (FORWARD, "operand0=-1.0", "operand0=1.0"),
    (FORWARD, "nisa.tensor_copy(dst=top, src=new)", "pass"),
    (FORWARD, "data=top, bias=minus, scale=scale", "data=top, bias=minus, scale=1.0"),
    (FORWARD, "totals[t // 2][:, t % 2, :]", "totals[t // 2][:, 0, :]"),
    (FORWARD, "TILE, 2, values.shape[2]", "TILE, 1, values.shape[2]"),
    (FORWARD, "h = kv * groups + member", "h = member * k_t.shape[1] + kv"),
    (FORWARD, "for masked in (False, True):", "for masked in (False,):"),
    (FORWARD, "row = max(0, j - first)", "row = 0"),
    (FORWARD, "data2=offsets", "data2=sums"),
    (FORWARD, "_exact(work, sums, offsets, result, constants[0])\n", "pass\n"),
    (BACKWARD, "h = kv * groups + member", "h = member * k.shape[1] + kv"),
    (BACKWARD, "bias=minus_delta[:, one]", "bias=minus_lse[:, one]"),
    (BACKWARD, "data1=ds, data2=p, op=nl.multiply", "data1=ds, data2=p, op=nl.add"),
    (BACKWARD, "key_sums[0], low, scale, held)", "key_sums[0], low, 1.0, held)"),
    (BACKWARD, "total, start, scale, held)\n", "total, start, 1, held)\n"),
    (BACKWARD, "order = [last]", "order = []"),
    (BACKWARD, "if i != last:", "if True:"),
    (BACKWARD, "seen - TILE, TILE", "0, TILE"),
    (BACKWARD, "p[:, square], moving=dout", "ds[:, square], moving=dout"),
    (BACKWARD, "nisa.memset(dst=total, value=0.0)", "nisa.memset(dst=total, value=1.0)"),
    (BACKWARD, "data2=part, op=nl.add", "data2=part, op=nl.maximum"),
    (BACKWARD, "documents[3] if masked else documents[2]", "documents[2]"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "old", "new"), MUTATIONS)
def test_a_mutation_is_caught(module: str, old: str, new: str) -> None:
    """A changed line gives another number or breaks a limit, in one of three small cases."""
    source = mutated(module, old, new, several=True)
    cases = [((1, 768, 4, 2, 64), "none", 1.0), ((1, 768, 2, 1, 64), "falling", 1.0)]
    cases.append(((1, 640, 1, 1, 64), "none", 4.0))
    assert any(differs(source, module, *case) for case in cases)


def differs(source: ModuleType, module: str, shape: Any, kind: str, size: float) -> bool:
    tensors, documents = inputs(shape, size=size), numbers(kind, shape[0], shape[1])
    try:
        found, _ = simulated(tensors, documents, {module: source})
    except NkiError:
        return True
    wrong = error(found, by_torch(tensors, documents))
    return not wrong < TOLERANCE
