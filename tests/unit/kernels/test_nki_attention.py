"""NKI flash attention: the contract with a stand-in for its package, and when it is chosen."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.sharers import Rank
from support.stand_ins import install_module
from torch import Tensor

from llamax import ops
from llamax.backends import nxd
from llamax.kernels.attention import blocks, nki_kernel
from llamax.parallel.mesh import Mesh

# --- attention -----------------------------------------------------------------------------------


def nki_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lnc: int = 1,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = True,
    mixed_precision: bool = True,
    seed: Tensor | None = None,
    hardware_type: object = None,
    transpose_nki_inputs: bool = True,
) -> Tensor:
    """q, k, v (batch, heads, head_dim, seq) with as many k as q heads -> (batch, heads, seq, d)."""
    assert q.shape == k.shape == v.shape, "the caller repeats key/value heads"
    assert q.shape[3] % 2048 == 0
    assert causal
    assert transpose_nki_inputs
    assert lnc == 1, "trn1"
    scale = softmax_scale or q.shape[-2] ** -0.5
    scores = torch.einsum("bhds,bhdt->bhst", q, k) * scale
    hidden = torch.ones(q.shape[3], q.shape[3], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("bhst,bhdt->bhsd", weights, v)


@pytest.fixture
def neuron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    install_module(monkeypatch, "torch_xla.runtime", device_type=lambda: "NEURON")
    install_module(
        monkeypatch,
        "neuronx_distributed.kernels.flash_attn",
        nki_flash_attn_func=nki_flash_attn_func,
    )
    nki_kernel.available.cache_clear()
    nki_kernel.warn.cache_clear()
    yield
    nki_kernel.available.cache_clear()


@pytest.mark.usefixtures("neuron_core")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_flash_attention_contract(kv_heads: int) -> None:
    """Contract: layouts, repetition of key/value heads, gradients summed over the copies."""
    length = 2048
    shapes = ((1, length, 4, 3), (1, length, kv_heads, 3), (1, length, kv_heads, 3))
    ours = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    expected = ops.reference_attention(*ours, None)
    found = nki_kernel.attention(*theirs)
    assert found.shape == expected.shape
    dout = torch.randn_like(expected)
    expected.backward(dout)
    found.backward(dout)
    torch.testing.assert_close(found, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(b.grad, a.grad)


def on_xla(length: int, width: int = 128) -> Any:
    device, shape = SimpleNamespace(type="xla"), (1, length, 8, width)
    return SimpleNamespace(device=device, dtype=torch.bfloat16, shape=shape)


@pytest.mark.usefixtures("neuron_core")
def test_flash_attention_is_chosen_by_shape_and_refused_loudly(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("llamax"), "propagate", True)
    x = on_xla(4096)
    assert ops.kernel("attention", x, x, x, None) is nki_kernel.attention
    assert not caplog.records
    for q, documents, why in (
        (on_xla(2047), None, "the sequence length 2047 is not a multiple of 2048"),
        (on_xla(2048, 256), None, "head_dim=256 is above 128"),
        (x, x, "documents are kept apart"),
    ):
        for _ in range(2):
            assert ops.kernel("attention", q, q, q, documents) is ops.traced_attention
        assert why in caplog.messages[-1]
    assert nki_kernel.warn.cache_info().misses == 3, "one line for each reason"


def test_nothing_changes_without_nxd(caplog: pytest.LogCaptureFixture) -> None:
    nki_kernel.available.cache_clear()
    x = on_xla(4096)
    assert ops.kernel("attention", x, x, x, None) is ops.traced_attention
    mesh = Mesh(tp=2, dp=2)
    with nxd.shared_groups(mesh) as same:
        assert same is mesh
    assert not caplog.records
    assert "neuronx_distributed" not in sys.modules


@pytest.mark.usefixtures("neuron_core")
def test_flash_attention_is_for_neuron_cores_only(monkeypatch: pytest.MonkeyPatch) -> None:
    install_module(monkeypatch, "torch_xla.runtime", device_type=lambda: "CPU")
    nki_kernel.available.cache_clear()
    x = on_xla(4096)
    assert ops.kernel("attention", x, x, x, None) is ops.traced_attention


# --- blocks of ranks that share a sequence -------------------------------------------------------


class Launched:
    """A kernel as ``nki.jit`` makes it: called through the grid it is launched on."""

    def __init__(self, function: Any) -> None:
        self.function, self.grids = function, list[tuple[int, ...]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(tuple(grid))
        return self.function


def scores(q: Tensor, k: Tensor, use_causal_mask: bool, softmax_scale: float) -> Tensor:
    found = torch.einsum("bhds,bhdt->bhst", q, k) * softmax_scale
    if use_causal_mask:
        hidden = torch.ones(found.shape[-2:], dtype=torch.bool).triu(1)
        found = found.masked_fill(hidden, -math.inf)
    return found


def by_partition(lse: Tensor) -> Tensor:
    """[B, H, S] -> [B, H, 128, S / 128]: query 128 t + p at [p, t]."""
    return lse.unflatten(2, (-1, 128)).transpose(2, 3)


def flash_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    logit_bias: Tensor | None = None,
    softmax_scale: float | None = None,
    use_causal_mask: bool = True,
    sliding_window: int = -1,
    mixed_precision: bool = True,
    dropout_p: float = 0.0,
    config: object = None,
) -> tuple[Tensor, Tensor]:
    """q, k (bs, heads, d, seq), v (bs, heads, seq, d) -> o (bs, heads, seq, d), lse."""
    assert (logit_bias, sliding_window, dropout_p, seed, config) == (None, -1, 0.0, None, None)
    assert q.shape == k.shape == v.mT.shape
    assert q.shape[3] % 2048 == 0
    found = scores(q, k, use_causal_mask, softmax_scale or q.shape[2] ** -0.5)
    return found.softmax(-1) @ v, by_partition(found.logsumexp(-1))


def flash_attn_bwd(
    q_ref: Tensor,
    k_ref: Tensor,
    v_ref: Tensor,
    o_ref: Tensor,
    dy_ref: Tensor,
    lse_ref: Tensor,
    seed_ref: Tensor | None,
    logit_bias_ref: Tensor | None = None,
    use_causal_mask: bool = False,
    mixed_precision: bool = False,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Everything (bs, heads, d, seq); weights are those of the given log-sum-exp."""
    q, k, v, o, dy = q_ref, k_ref, v_ref, o_ref, dy_ref
    assert q.shape == k.shape == v.shape == o.shape == dy.shape
    assert lse_ref.shape == (*q.shape[:2], 128, q.shape[3] // 128)
    scale = softmax_scale or q.shape[2] ** -0.5
    lse = lse_ref.transpose(2, 3).flatten(2)
    weights = (scores(q, k, use_causal_mask, scale) - lse.unsqueeze(-1)).exp()
    along = (o * dy).sum(2).unsqueeze(-1)
    dscores = weights * (dy.mT @ v - along) * scale
    return k @ dscores.mT, q @ dscores, dy @ weights


class Mirrored(Rank):
    """A rank of a ring of two that receives what it sends."""

    def start_shift(self, x: Tensor, by: int = 1) -> Callable[[], Tensor]:
        return x.clone


@pytest.mark.usefixtures("neuron_core")
@pytest.mark.parametrize("share", [1, 2], ids=["ring", "gathered"])
@pytest.mark.parametrize("rank", [0, 1])
def test_blocks_of_ranks_that_share_a_sequence(
    monkeypatch: pytest.MonkeyPatch, rank: int, share: int
) -> None:
    """Contract: layouts, log-sum-exps, repetition of heads; equal to the plain blocks."""
    kernels = {"flash_fwd": Launched(flash_fwd), "flash_attn_bwd": Launched(flash_attn_bwd)}
    install_module(monkeypatch, "neuronxcc.nki.kernels.attention", **kernels)
    whole = 2 * 2 * 2048
    shapes = (1, whole // 2, 2, 3), (1, share * whole // 2, 2, 3)
    plain = [torch.randn(shape, requires_grad=True) for shape in shapes]
    fused = [x.detach().clone().requires_grad_() for x in plain]
    there = Mirrored(rank, 2)
    expected = blocks.attention(*plain, None, there)
    found = nki_kernel.by_blocks(*fused, None, there)
    dout = torch.randn_like(expected)
    expected.backward(dout)
    found.backward(dout)
    torch.testing.assert_close(found, expected)
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(b.grad, a.grad)
    for kernel in kernels.values():
        assert kernel.grids == [(1, 2)] * 5, "2 n + 1 blocks, on a grid of batch and heads"


@pytest.mark.usefixtures("neuron_core")
def test_blocks_are_chosen_by_the_length_of_a_chunk(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("llamax"), "propagate", True)
    q, k = on_xla(4096), on_xla(8192)
    assert ops.kernel("attention_by_blocks", q, k, None, Rank(0, 2)) is nki_kernel.by_blocks
    assert ops.kernel("attention_by_blocks", q, q, None, Rank(0, 2)) is nki_kernel.by_blocks
    assert not caplog.records
    uneven = "the 8 chunks of 8192 tokens that parallel.context=4 makes are not multiples of 2048"
    for mine, keys, documents, context, why in (
        (on_xla(2048), on_xla(8192), None, 4, uneven),
        (on_xla(2048), on_xla(2048), None, 4, uneven),
        (q, k, k, 2, "documents are kept apart"),
    ):
        chosen = ops.kernel("attention_by_blocks", mine, keys, documents, Rank(0, context))
        assert chosen is blocks.attention
        assert why in caplog.messages[-1]
