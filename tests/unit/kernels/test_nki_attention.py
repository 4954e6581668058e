"""NKI flash attention: the contract with a stand-in for its package, and when it is chosen."""

from __future__ import annotations

import logging
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.stand_ins import install_module
from torch import Tensor

from llamax import ops
from llamax.backends import nxd
from llamax.kernels.attention import nki_kernel
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
    return SimpleNamespace(device=SimpleNamespace(type="xla"), shape=(1, length, 8, width))


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
