"""The NKI kernels of linear + cross-entropy in the simulator: numbers, choice, cost, mutations."""

from __future__ import annotations

import contextlib
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.simulated import Launcher, mutated
from torch import Tensor

from llamax import ops
from llamax.config.constants import nki_loss_refusal
from llamax.kernels.cross_entropy import nki_op, op, reference
from llamax.kernels.simulator.machine import CLOCK_HZ, NkiError, Tally
from llamax.parallel.collectives import Solo
from llamax.parallel.cross_entropy import vocab_parallel_loss
from llamax.tools.plan.nki_loss import kernel_seconds

TOLERANCE = 1.2e-2  # of the largest element of a gradient, as in kernels/cross_entropy/README.md
STATISTICS = 1e-5
FORWARD, BACKWARD = "cross_entropy.nki_forward", "cross_entropy.nki_backward"
Modules = dict[str, ModuleType]


class Case(NamedTuple):
    """Tokens, rows of the vocabulary and features; rows of padding; the size of logits."""

    tokens: int
    rows: int
    width: int
    padding: int = 0
    size: float = 2.0
    trains: bool = True


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x, the weight, columns of labels, log-sum-exps of a larger vocabulary, padding.

    A label in three is elsewhere; every fifth token does not count.
    """
    generator = torch.Generator().manual_seed(sum(case[:4]))
    x = torch.randn(case.tokens, case.width, generator=generator).bfloat16()
    weight = torch.randn(case.rows, case.width, generator=generator)
    weight = (weight * case.size / case.width**0.5).bfloat16()
    counted = case.rows - case.padding
    columns = torch.randint(-counted // 2, counted, (case.tokens,), generator=generator)
    columns[: counted + 1] = torch.arange(-1, counted)[: case.tokens]  # every tile and edge
    columns = columns.clamp(min=-1)
    columns[::5] = -1
    padding = None
    if case.padding:
        padding = torch.arange(case.rows) >= counted
        weight[padding] = 3 * weight[: case.padding]  # what must not count is not small
    here = (x.double() @ weight[:counted].double().T).logsumexp(1)
    log_sums = torch.logaddexp(here, here.mean().expand(case.tokens)).float()
    log_sums[::5] = torch.inf
    return x, weight, columns.int(), log_sums, padding


def error(case: Case, modules: Modules | None = None) -> tuple[float, list[Tally]]:
    """The largest error in units of what is tolerated, and the tallies of both kernels."""
    x, weight, columns, log_sums, padding = inputs(case)
    launcher = Launcher(modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nki_op, "launch", launcher)
        found = nki_op.statistics(x, weight, columns, padding).double().numpy()
        gradients = nki_op.gradients(x, weight, columns, log_sums, padding, case.trains)
    counted = case.rows - case.padding
    given = x.double().numpy(), weight[:counted].double().numpy(), columns.numpy()
    want = reference.statistics(*given)
    digits = max(STATISTICS, 1e-7 * np.abs(want[0]).max())  # float32's, of large logits
    worst = [
        np.abs(a - b).max() / np.abs(b).max() / digits for a, b in zip(found, want, strict=True)
    ]
    assert (gradients[1] is not None) == case.trains
    exact = reference.gradients(*given, log_sums.double().numpy())
    rounded = with_rounded_logit_gradients(*given, log_sums.double().numpy())
    for a, b in zip(gradients, exact, strict=True):
        if a is not None:
            array = a.double().numpy()
            worst.append(np.abs(array[: len(b)] - b).max() / np.abs(b).max() / TOLERANCE)
            worst.append(np.abs(array[len(b) :]).max(initial=0.0))  # rows of padding
    if case.size > 100:  # float32 holds four digits behind the point of such logits
        return float(max(worst)), launcher.tallies
    # Sums are float32: nothing but the logits' gradients and the result of dX is rounded.
    other = gradients[0].bfloat16() != torch.from_numpy(rounded[0]).bfloat16()
    worst.append(float(other.double().mean()) / 0.03)
    if gradients[1] is not None:
        dw = gradients[1].double().numpy()[: len(rounded[1])]
        worst.append(np.abs(dw - rounded[1]).max() / np.abs(rounded[1]).max() / 3e-4)
    return float(max(worst)), launcher.tallies


def with_rounded_logit_gradients(
    x: np.ndarray, weight: np.ndarray, columns: np.ndarray, log_sums: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """``reference.gradients`` whose gradients of logits are rounded to bfloat16."""
    dlogits = np.exp(x @ weight.T - log_sums[:, None])
    dlogits -= columns[:, None] == np.arange(len(weight))
    narrow = torch.from_numpy(dlogits).bfloat16().double().numpy()
    return narrow @ weight, narrow.T @ x


@pytest.mark.parametrize(
    "case",
    [
        Case(128, 1, 128),
        Case(256, 300, 256),
        Case(640, 1100, 128),  # edges of groups of tokens, of blocks and of tiles of rows
        Case(128, 4008, 384, padding=200),  # 128256 / 32 rows
        Case(256, 513, 640, padding=2),
        Case(256, 200, 256, trains=False),
        Case(256, 1100, 128, padding=30, trains=False),
        Case(128, 128, 8192),
    ],
)
def test_matches_float64(case: Case) -> None:
    assert error(case)[0] < 1


@pytest.mark.parametrize("size", [0.01, 20.0, 300.0])
def test_logits_of_any_size(size: float) -> None:
    """Without a maximum, exponentials would overflow or vanish."""
    assert error(Case(256, 700, 128, size=size))[0] < 1


@settings(deadline=None, max_examples=5)
@given(st.integers(1, 5), st.integers(1, 1300), st.integers(1, 5), st.booleans())
def test_any_shape(tiles: int, rows: int, chunks: int, padded: bool) -> None:
    assert error(Case(128 * tiles, rows, 128 * chunks, rows // 3 if padded else 0))[0] < 1


def test_a_rank_that_holds_padding_alone_adds_nothing() -> None:
    x, weight, _, log_sums, _ = inputs(Case(128, 64, 128))
    columns, padding = torch.full((128,), -1, dtype=torch.int32), torch.ones(64, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nki_op, "launch", Launcher())
        top, total, at_label = nki_op.statistics(x, weight, columns, padding)
        dx, dw = nki_op.gradients(x, weight, columns, log_sums, padding)
    assert (total * (top - 0.0).exp() == 0).all()
    assert not at_label.any()
    assert dw is not None
    assert not dx.any()
    assert not dw.any()


def test_the_plain_operations_match_the_reference() -> None:
    case = Case(128, 77, 128, padding=5)
    x, weight, columns, log_sums, padding = inputs(case)
    given = x.double(), weight.double(), columns
    exact = x.double().numpy(), weight[:72].double().numpy(), columns.numpy()
    found = op.statistics(*given, padding)
    np.testing.assert_allclose(found.numpy(), reference.statistics(*exact), rtol=1e-13)
    wide = log_sums.double()
    dx, dw = op.gradients(*given, wide, padding)
    assert dw is not None
    want = reference.gradients(*exact, wide.numpy())
    for a, b in ((dx, want[0]), (dw[:72], want[1])):
        np.testing.assert_allclose(a.numpy(), b, atol=1e-13 * np.abs(b).max())
    assert not dw[72:].any()
    assert op.gradients(*given, wide, padding, trains=False)[1] is None


# --- in a model's loss ---------------------------------------------------------------------------


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """``ops`` chooses the kernels, which the simulator executes."""
    launcher = Launcher()
    monkeypatch.setattr(nki_op, "launch", launcher)
    for name, function in (
        ("logit_statistics", nki_op.statistics),
        ("logit_gradients", nki_op.gradients),
    ):
        monkeypatch.setitem(ops.TABLE, name, (ops.Row("nki", lambda *_: True, function),))
    return launcher


@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_and_its_gradients(simulated: Launcher, frozen: bool) -> None:
    """Against torch's own linear and cross-entropy in float64, with ignored labels and padding."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 192, 256, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(320, 256, generator=generator) / 8).bfloat16().requires_grad_(not frozen)
    labels = torch.randint(0, 317, (2, 192), generator=generator)
    labels[0, ::3] = ops.IGNORE_INDEX
    total, count = vocab_parallel_loss(x, weight, labels, Solo("tp"), 317)
    loss = total / count
    loss.backward()
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    logits = (wide[0] @ wide[1].T)[..., :317]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert count == (labels >= 0).sum()
    assert len(simulated.tallies) == 2
    for ours, exact in zip((x, weight), wide, strict=True):
        assert ours.grad is not None or frozen
        if ours.grad is not None:
            assert exact.grad is not None
            assert ours.grad.dtype == torch.bfloat16
            assert (ours.grad - exact.grad).abs().max() < TOLERANCE * exact.grad.abs().max()


@pytest.mark.usefixtures("simulated")
def test_chunks_of_tokens_that_were_asked_for_use_no_kernel(simulated: Launcher) -> None:
    x, weight = torch.randn(1, 128, 128), torch.randn(9, 128)
    vocab_parallel_loss(x, weight, torch.zeros(1, 128, dtype=torch.long), Solo("tp"), 9, False, 64)
    assert simulated.tallies == []


def test_kernels_are_chosen_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(device: str, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Any:
        return SimpleNamespace(device=SimpleNamespace(type=device), shape=shape, dtype=dtype)

    def chosen(device: str, tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        x, weight = on(device, (1, tokens, width), dtype), on(device, (4008, width), dtype)
        return ops.has_kernel("logit_statistics", x, weight, torch.zeros(1, tokens))

    monkeypatch.setattr(nki_op, "available", lambda: True)
    assert chosen("xla", 4096, 2048)
    assert not chosen("cpu", 4096, 2048)
    assert not chosen("xla", 100, 2048)
    assert not chosen("xla", 4096, 2048, torch.float32)
    monkeypatch.setattr(nki_op, "available", lambda: False)
    assert not chosen("xla", 4096, 2048)


@pytest.mark.parametrize(
    ("tokens", "width", "why"),
    [
        (4096, 3072, ""),
        (100, 2048, "100 tokens are not a multiple of 128"),
        (65536, 2048, "65536 tokens are above 32768"),
        (128, 200, "hidden_size=200 is not a multiple of 128"),
        (128, 4096, "above hidden_size=3072 logits take longer to compute twice than to move"),
    ],
)
def test_refusals(tokens: int, width: int, why: str) -> None:
    assert nki_loss_refusal(tokens, width) == why


# --- cost: what the documented cycles allow ------------------------------------------------------


def least(case: Case, products: int) -> float:
    """The tensor engine's least time for so many products of the whole."""
    return products * case.tokens * case.rows * case.width / (128 * 128 * CLOCK_HZ["tensor"])


def test_cost() -> None:
    case = Case(1024, 1002, 2048)
    _, (forward, backward) = error(case)
    assert forward.bound() == backward.bound() == "tensor"
    assert forward.seconds() <= 1.35 * least(case, 1)
    assert backward.seconds() <= 1.5 * least(case, 3)


@pytest.mark.parametrize(
    "case",
    [
        Case(512, 1024, 1024),
        Case(384, 1300, 640, trains=False),
        Case(128, 257, 4224),
        Case(4224, 640, 256),
    ],
)
def test_the_planner_knows_the_cost(case: Case) -> None:
    worst, tallies = error(case)
    assert worst < 1
    planned = kernel_seconds(case.tokens, case.rows, case.width, case.trains)
    for tally, seconds in zip(tallies, planned, strict=True):
        assert seconds == pytest.approx(tally.seconds(), rel=0.03)


@pytest.mark.parametrize(("tokens", "width"), [(4096, 4096), (2048, 8192)])
def test_full_segments_and_blocks_fit_the_core(
    monkeypatch: pytest.MonkeyPatch, tokens: int, width: int
) -> None:
    """The simulator refuses a full SBUF or PSUM; products are left out, which would take long."""

    def begin(dst: Any, stationary: Any, moving: Any) -> None:
        dst.write(np.zeros(dst.shape, np.float32), summing=True)

    launcher = Launcher()
    for module in (FORWARD, BACKWARD):
        isa = import_module(f"llamax.kernels.{module}").nisa
        monkeypatch.setattr(isa, "nc_matmul", begin)
    monkeypatch.setattr(nki_op, "launch", launcher)
    x, weight = (torch.zeros(n, width, dtype=torch.bfloat16) for n in (tokens, 1024))
    columns = torch.zeros(tokens, dtype=torch.int32)
    nki_op.statistics(x, weight, columns, None)
    nki_op.gradients(x, weight, columns, torch.zeros(tokens), None)
    for tally in launcher.tallies:
        assert tally.sbuf_high_bytes <= 170 * 1024
        assert tally.psum_high_banks <= 4


def test_logits_are_not_in_hbm() -> None:
    """Bytes grow with rows + tokens by operands and sums, and with their product by re-reading."""
    _, (forward, backward) = error(Case(512, 1024, 128))
    operands = (512 + 1024) * 128 * 2
    assert forward.hbm_bytes < 512 * 1024 * 4  # fewer than the logits' own
    assert forward.hbm_bytes == 2 * 512 * 128 * 2 + 1024 * 128 * 2 + 4 * 512 * 4
    assert backward.hbm_bytes < 3 * operands + (512 * 2 + 1024 * 4) * 128 + 4096 * 3


# --- mutations -----------------------------------------------------------------------------------

SMALL = {"BLOCK": 128, "GROUP": 256, "ROWS": 256, "SEGMENT": 256}
MUTATIONS = [  # module, a part of a line, what replaces it
    (FORWARD, "operand0=kept, op1=nl.add", "operand0=1.0, op1=nl.add"),
    (FORWARD, "reduce_res=added, bias=minus", "reduce_res=added"),
    (FORWARD, "nisa.tensor_copy(dst=top, src=new)", "pass"),
    (FORWARD, "data1=new, data2=top, op=nl.maximum", "data1=new, data2=new, op=nl.maximum"),
    (FORWARD, "operand0=low * 1.0", "operand0=0.0"),
    (FORWARD, "operand0=low * 1.0", "operand0=low + 1.0"),
    (FORWARD, "op0=nl.equal", "op0=nl.less_equal"),
    (FORWARD, "start // TILE + i", "i"),
    (FORWARD, "data1=at_label, data2=found, op=nl.add", "data1=found, data2=found, op=nl.maximum"),
    (FORWARD, "min(BLOCK, rows - low)", "min(BLOCK, (rows - low) // TILE * TILE)"),
    (FORWARD, "rows[:, nl.ds(c * TILE, TILE)]", "rows[:, nl.ds(0, TILE)]"),
    (FORWARD, "nl.ds(low + start, count)", "nl.ds(start, count)"),
    (FORWARD, "data1=logits, data2=hidden, op=nl.add", "data1=logits, data2=hidden, op=nl.maximum"),
    (FORWARD, "padding[:, nl.ds(low, size)]", "padding[:, nl.ds(0, size)]"),
    (FORWARD, "dst=padded, data1=logits", "dst=logits, data1=logits"),
    (BACKWARD, "op0=nl.subtract, operand0=first", "op0=nl.add, operand0=first"),
    (BACKWARD, "(low + part) * 1.0", "low * 1.0"),
    (BACKWARD, "start // TILE + tile, 1", "tile, 1"),
    (BACKWARD, ", bias=statistics[1][:, token]", ""),
    (BACKWARD, "            reverse1=True,\n", ""),
    (BACKWARD, "op0=nl.equal", "op0=nl.not_equal"),
    (BACKWARD, "dst=p[:, tile, nl.ds(part, size)]", "dst=p[:, tile, nl.ds(0, size)]"),
    (BACKWARD, "dx if low + size == rows else waiting", "dx"),
    (BACKWARD, "if low > 0 else None", "if low > ROWS else None"),
    (BACKWARD, "result if start > 0 else None", "None"),
    (BACKWARD, "data1=total, data2=summed, op=nl.add", "data1=total, data2=summed, op=nl.maximum"),
    (BACKWARD, "stationary=turned[c]", "stationary=turned[0]"),
    (BACKWARD, "nl.ds(low + first, count), :]", "nl.ds(first, count), :]"),
    (BACKWARD, "nl.ds(start + i * TILE, TILE), place", "nl.ds(i * TILE, TILE), place"),
    (BACKWARD, "dw[nl.ds(low + first, count), place]", "dw[nl.ds(first, count), place]"),
    (BACKWARD, "dtype=p.dtype", "dtype=nl.float32"),
    (BACKWARD, "total = nl.ndarray((count, part)",  # a bank that holds the last sum
     "total = total if 0 < first <= size - TILE else nl.ndarray((count, part)"),
    (FORWARD, "in range(weight_t.shape[1]):", "in range(weight_t.shape[1] - 1):"),
    (BACKWARD, "dtype=result.dtype", "dtype=nl.bfloat16"),
    (BACKWARD, "total.shape, dtype=nl.float32", "total.shape, dtype=nl.bfloat16"),
    (BACKWARD, "width), dtype=nl.float32, buffer=nl.hbm", "width), dtype=x.dtype, buffer=nl.hbm"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "old", "new"), MUTATIONS)
def test_a_mutation_is_caught(module: str, old: str, new: str) -> None:
    """A changed line gives another number or breaks a limit, in kernels with small blocks."""
    case = Case(640, 300, 256, padding=20)
    with contextlib.suppress(NkiError):
        assert not error(case, small(module, old, new))[0] < 1


def test_small_blocks_are_right() -> None:
    assert error(Case(640, 300, 256, padding=20), small(FORWARD, "", ""))[0] < 1


def small(module: str, old: str, new: str) -> Modules:
    """Both kernels with small blocks, one of them changed."""
    made = {}
    for name in (FORWARD, BACKWARD):
        made[name] = mutated(name, old if name == module else "", new)
        vars(made[name]).update(SMALL)
    return made
