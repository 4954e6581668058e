"""Every kernel against its float64 reference: the result and each gradient, any shape."""

import importlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llamax import ops
from llamax.kernels.attention import op as attention_op
from llamax.kernels.attention import reference as attention_reference
from llamax.kernels.linear import op as linear_op
from llamax.kernels.linear import reference as linear_reference
from llamax.kernels.rms_norm import op as rms_norm_op
from llamax.kernels.rms_norm import reference as rms_norm_reference
from llamax.kernels.rope import op as rope_op
from llamax.kernels.rope import reference as rope_reference
from llamax.kernels.swiglu import op as swiglu_op
from llamax.kernels.swiglu import reference as swiglu_reference
from llamax.model import rope

# Largest difference over the largest element, or over 1 where all are smaller (a lone token has
# gradients of zero); the README of each kernel says the same.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
EVERY_SHAPE = settings(deadline=None, max_examples=25)


def agree(ours: Sequence[Tensor], exact: Sequence[np.ndarray], dtype: torch.dtype) -> None:
    assert len(ours) == len(exact)
    for place, (a, b) in enumerate(zip(ours, exact, strict=True)):
        assert a.shape == b.shape, place
        difference = np.abs(a.detach().double().numpy() - b).max(initial=0)
        assert difference <= TOLERANCE[dtype] * np.abs(b).max(initial=1), (place, difference)


def run(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The result, a random gradient for it, and the gradients by every input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    assert y.dtype == inputs[0].dtype
    dy = torch.randn(y.shape).to(y.dtype)
    return y, dy, list(torch.autograd.grad(y, leaves, dy))


def exact(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().double().numpy() for tensor in tensors]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


class TestRMSNorm:
    def check(self, dtype: torch.dtype, *shape: int) -> None:
        x, weight = draw(*shape, dtype=dtype) * 3, draw(shape[-1], dtype=dtype) + 1
        y, dy, grads = run(lambda x, w: rms_norm_op.rms_norm(x, w, 1e-2), x, weight)
        dy64, x64, weight64 = exact(dy, x, weight)
        agree([y], [rms_norm_reference.rms_norm(x64, weight64, 1e-2)], dtype)
        agree(grads, rms_norm_reference.rms_norm_backward(dy64, x64, weight64, 1e-2), dtype)

    @DTYPES
    def test_matches_float64(self, dtype: torch.dtype) -> None:
        self.check(dtype, 3, 17, 96)

    @EVERY_SHAPE
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    def test_any_shape(self, shape: list[int]) -> None:
        self.check(torch.float64, *shape)

    def test_gradients_are_the_slope(self) -> None:
        leaves = draw(2, 3, 5, dtype=torch.float64), draw(5, dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda x, w: rms_norm_op.rms_norm(x, w, 1e-2), [x.requires_grad_() for x in leaves]
        )


class TestRope:
    def check(self, dtype: torch.dtype, batch: int, rows: int, length: int, heads: int) -> None:
        width = 12
        frequencies = rope.inverse_frequencies(width, 100.0, None).double()
        positions = torch.randint(0, 50, (rows, length))
        angles = positions[..., None] * frequencies
        tables = [torch.cat((t, t), -1) for t in (angles.cos(), angles.sin())]
        if dtype != torch.float64:
            tables = [table.float() for table in tables]
        # A view inside a wider projection, as the model passes it.
        x = draw(batch, length, heads + 3, width, dtype=dtype)[:, :, 1 : heads + 1]
        y, dy, (dx,) = run(lambda x: rope_op.rotate(x, *tables), x)
        x64, dy64, angles64 = exact(x, dy, angles)
        agree([y], [rope_reference.rotate(x64, angles64)], dtype)
        agree([dx], [rope_reference.rotate(dy64, -angles64)], dtype)

    @DTYPES
    @pytest.mark.parametrize("rows", [1, 3])
    def test_matches_float64(self, dtype: torch.dtype, rows: int) -> None:
        self.check(dtype, 3, rows, 17, 4)

    @EVERY_SHAPE
    @given(st.integers(1, 3), st.booleans(), st.integers(1, 9), st.integers(1, 5))
    def test_any_shape(self, batch: int, shared: bool, length: int, heads: int) -> None:
        self.check(torch.float64, batch, 1 if shared else batch, length, heads)

    def test_writes_nothing_it_does_not_own(self) -> None:
        x, (cos, sin) = draw(2, 5, 3, 8), draw(2, 1, 5, 8)
        before = [t.clone() for t in (x, cos, sin)]
        y = rope_op.rotate(x.requires_grad_(), cos, sin)
        dy = torch.ones_like(y)
        y.backward(dy)
        for now, then in zip((x, cos, sin, dy), (*before, torch.ones_like(y)), strict=True):
            assert torch.equal(now, then)


class TestSwiGLU:
    def check(self, dtype: torch.dtype, *shape: int) -> None:
        gate_up = draw(*shape, dtype=dtype) * 3
        y, dy, grads = run(swiglu_op.swiglu, gate_up)
        dy64, gate_up64 = exact(dy, gate_up)
        agree([y], [swiglu_reference.swiglu(gate_up64)], dtype)
        agree(grads, [swiglu_reference.swiglu_backward(dy64, gate_up64)], dtype)

    @DTYPES
    def test_matches_float64(self, dtype: torch.dtype) -> None:
        self.check(dtype, 3, 17, 96)

    @EVERY_SHAPE
    @given(st.lists(st.integers(1, 6), max_size=3), st.integers(1, 9))
    def test_any_shape(self, rows: list[int], width: int) -> None:
        self.check(torch.float64, *rows, 2 * width)

    def test_gradients_are_the_slope(self) -> None:
        gate_up = draw(2, 3, 8, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(swiglu_op.swiglu, gate_up)

    def test_saves_its_input_alone(self) -> None:
        gate_up = draw(2, 3, 8).requires_grad_()
        y = swiglu_op.swiglu(gate_up)
        (saved,) = y.grad_fn.saved_tensors
        assert saved.data_ptr() == gate_up.data_ptr()


class TestLinear:
    def test_bf16_is_multiplied_in_fp32(self) -> None:
        x, weight = draw(2, 7, 33, dtype=torch.bfloat16), draw(11, 33, dtype=torch.bfloat16)
        y, dy, grads = run(linear_op.linear, x, weight)
        dy64, x64, weight64 = exact(dy, x, weight)
        agree([y], [linear_reference.linear(x64, weight64)], y.dtype)
        dx64 = linear_reference.grad_input(dy64, weight64)
        dweight64 = linear_reference.grad_weight(dy64, x64)
        agree(grads, [dx64, dweight64], y.dtype)
        agree([linear_op.grad_input(dy, weight)], [dx64], y.dtype)
        wide = linear_op.grad_weight(dy, x)
        assert wide.dtype == torch.float32
        agree([wide], [dweight64], torch.float32)

    def test_computes_only_what_is_asked(self) -> None:
        x, weight = draw(3, 4, dtype=torch.bfloat16), draw(5, 4, dtype=torch.bfloat16)
        linear_op.linear(x, weight.requires_grad_()).sum().backward()
        assert weight.grad is not None
        weight = weight.detach()
        linear_op.linear(x.requires_grad_(), weight).sum().backward()
        assert x.grad is not None
        assert weight.grad is None


class TestAttention:
    def check(
        self,
        dtype: torch.dtype,
        documents: Tensor | None,
        batch: int,
        length: int,
        heads: int,
        kv: int,
        width: int,
    ) -> None:
        # Views inside one fused projection, as the model passes them.
        qkv = draw(batch, length, heads + 2 * kv, width, dtype=dtype)
        q, k, v = qkv.split((heads, kv, kv), dim=2)
        y, dy, grads = run(lambda q, k, v: attention_op.attention(q, k, v, documents), q, k, v)
        dy64, *qkv64 = exact(dy, q, k, v)
        numbers = None if documents is None else documents.numpy()
        agree([y], [attention_reference.attention(*qkv64, numbers)], dtype)
        agree(grads, attention_reference.attention_backward(dy64, *qkv64, numbers), dtype)

    @DTYPES
    @pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
    def test_matches_float64(self, dtype: torch.dtype, packed: bool) -> None:
        documents = torch.randint(0, 6, (2, 293)).sort(dim=1)[0] if packed else None
        self.check(dtype, documents, 2, 293, 4, 2, 16)

    @EVERY_SHAPE
    @given(st.data())
    def test_any_shape(self, data: st.DataObject) -> None:
        size = lambda low, high: data.draw(st.integers(low, high))
        batch, length, kv, group = size(1, 3), size(1, 40), size(1, 3), size(1, 3)
        documents = None
        if data.draw(st.booleans()):  # in any order: numbers may come back later
            documents = torch.randint(0, size(1, 5), (batch, length), dtype=torch.int32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_op, "ATTENTION_BLOCK_QUERIES", size(1, 17))
            patch.setattr(attention_op, "ATTENTION_SCORES_BYTES", size(1, 10_000))
            self.check(torch.float64, documents, batch, length, kv * group, kv, size(1, 9))

    def test_large_scores_do_not_overflow(self) -> None:
        q, k, v = (draw(1, 9, 2, 4) * 100 for _ in range(3))
        y, _, grads = run(attention_op.attention, q, k, v)
        agree([y], [attention_reference.attention(*exact(q, k, v))], torch.float32)
        assert all(grad.isfinite().all() for grad in grads)

    def test_skips_keys_of_other_documents(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(attention_op, "ATTENTION_BLOCK_QUERIES", 4)
        documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]])
        blocks = list(attention_op._blocks(12, documents, slice(0, 1), torch.float32))
        assert [(b.start, b.stop, b.low) for b in blocks] == [(0, 4, 0), (4, 8, 0), (8, 12, 8)]
        assert [tuple(b.bias.shape) for b in blocks] == [(4, 4), (4, 8), (4, 4)]

    def test_memory_is_linear_in_the_sequence(self) -> None:
        q, k, v = (draw(1, 4096, 2, 8).requires_grad_() for _ in range(3))
        largest = 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                nonlocal largest
                result = function(*args, **(kwargs or {}))
                if isinstance(result, Tensor):
                    largest = max(largest, result.untyped_storage().nbytes())
                return result

        with Watch():
            attention_op.attention(q, k, v).sum().backward()
        assert largest <= 2 * 4 * attention_op.ATTENTION_BLOCK_QUERIES * 4096


class TestReferences:
    """The plain torch functions that other devices take."""

    @pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
    def test_attention(self, packed: bool) -> None:
        documents = torch.randint(0, 3, (2, 13)) if packed else None
        q, k, v = draw(2, 13, 4, 8), draw(2, 13, 2, 8), draw(2, 13, 2, 8)
        y = ops.reference_attention(q, k, v, documents)
        numbers = None if documents is None else documents.numpy()
        agree([y], [attention_reference.attention(*exact(q, k, v), numbers)], torch.float32)

    def test_the_others(self) -> None:
        x, weight = draw(3, 5, 16), draw(16)
        x64, weight64 = exact(x, weight)
        y = ops.reference_rms_norm(x, weight, 1e-2)
        agree([y], [rms_norm_reference.rms_norm(x64, weight64, 1e-2)], torch.float32)
        agree([ops.reference_swiglu(x)], [swiglu_reference.swiglu(x64)], torch.float32)
        positions = torch.randint(0, 9, (3, 5))
        frequencies = rope.inverse_frequencies(16, 100.0, None)
        y = ops.reference_rotate(x[:, :, None], *rope.rope_tables(positions, frequencies))
        (angles,) = exact(positions[..., None] * frequencies)
        agree([y], [rope_reference.rotate(x64[:, :, None], angles)], torch.float32)


@pytest.mark.parametrize("operation", ops.TABLE)
def test_every_row_of_the_table_can_be_loaded(operation: str) -> None:
    *_, last = ops.TABLE[operation]
    assert last.name == "reference"
    for row in ops.TABLE[operation]:
        if isinstance(row.kernel, str):
            module, _, function = row.kernel.partition(":")
            assert callable(getattr(importlib.import_module(f"llamax.kernels.{module}"), function))
