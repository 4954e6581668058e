"""Inputs of products that backward makes again: nothing changes but what forward keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import tiny
from support.world import Worlds, axes
from torch import Tensor

from llamax import ops
from llamax.config.schema import FinetuneConfig
from llamax.model import lora
from llamax.model.llama import Llama
from llamax.parallel import tensor_parallel
from llamax.parallel.collectives import Solo
from llamax.parallel.mesh import Mesh
from llamax.parallel.tensor_parallel import column_matmul, is_made_again

MODEL = tiny(hidden_size=64, intermediate_size=176, num_attention_heads=8)
ALL, NONE = 0, 2**62  # bytes from which an input is made again


def stepped(mesh: Mesh, mode: Any, dtype: torch.dtype, tuned: bool, least: int) -> list[Tensor]:
    """In a rank: the loss of a batch, all gradients, and the bytes that forward keeps."""
    before, tensor_parallel.MADE_AGAIN_BYTES = tensor_parallel.MADE_AGAIN_BYTES, least
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    try:
        here = axes(mesh, 1)
        model = Llama(MODEL, here.tp, sequence_parallel=True, dtype=dtype, recompute=mode).init(0)
        if tuned:
            lora.adapt(model, FinetuneConfig(r=4), torch.empty(0, dtype=dtype))
            lora.init(model, 0)
        ids = torch.arange(64).remainder(MODEL.vocab_size).view(2, 32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss, _ = model.loss(ids, ids.roll(1))
        loss.backward()
    finally:
        tensor_parallel.MADE_AGAIN_BYTES = before
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *gradients, torch.tensor(sum(saved.values()))]


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_inputs_made_again_change_no_bit(
    worlds: Worlds, tensor: int, mode: str, dtype: torch.dtype, tuned: bool
) -> None:
    mesh, run = Mesh(tp=tensor), worlds(tensor).run
    *again, less = run(stepped, mesh, mode, dtype, tuned, ALL)[0]
    *kept, more = run(stepped, mesh, mode, dtype, tuned, NONE)[0]
    assert len(again) > MODEL.num_hidden_layers
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))
    if mode == "full":  # the hooks of recomputation are nearer
        return
    layers, tokens = MODEL.num_hidden_layers, 64
    normed = 2 * tokens // tensor * MODEL.hidden_size
    gated = tokens * MODEL.intermediate_size // tensor
    frozen_first = normed // 2 * tuned  # needs no gradient, so that no operation is in the graph
    assert more - less == dtype.itemsize * (layers * (normed + gated) - frozen_first)


def test_an_input_is_made_again_for_every_product_and_backward() -> None:
    x, norm, *weights = (torch.randn(shape) for shape in ((2, 8, 16), 16, (4, 16), (6, 16)))
    for tensor in (x, norm, *weights):
        tensor.requires_grad_()

    def gradients(product: Any) -> list[Tensor]:
        normed = ops.rms_norm(x, norm, 1e-5)
        total = sum(product(normed, weight).sum() for weight in weights)
        total.backward(retain_graph=True)
        total.backward()
        found = [tensor.grad for tensor in (x, norm, *weights)]
        for tensor in (x, norm, *weights):
            tensor.grad = None
        return found

    def made_again(normed: Tensor, weight: Tensor) -> Tensor:
        return column_matmul(normed, weight, Solo("tp"), False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_parallel, "MADE_AGAIN_BYTES", 0)
        assert is_made_again(ops.rms_norm(x, norm, 1e-5))
        found = gradients(made_again)
    assert not is_made_again(ops.rms_norm(x, norm, 1e-5)), "too small"
    torch.testing.assert_close(found, gradients(ops.linear))
