"""The operations as the model calls them: against transformers, and by the table's choice."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama as hub

from llamax import ops
from llamax.config.model import RopeScaling
from llamax.model import rope

FP32 = 1e-6  # largest difference over the largest element
SCALINGS = {
    "none": None,
    "llama3.1": RopeScaling(8.0, 1.0, 4.0, 8192),
    "llama3.2": RopeScaling(32.0, 1.0, 4.0, 8192),
}


def agree(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = FP32) -> None:
    for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max(), place


def run(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result and the gradients of every input, for one fixed random gradient."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def hub_config(head_dim: int, theta: float, scaling: RopeScaling | None) -> LlamaConfig:
    rope: dict[str, float | int | str] = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        rope |= {"rope_type": "llama3", "factor": scaling.factor}
        rope |= {"low_freq_factor": scaling.low_freq_factor}
        rope |= {"high_freq_factor": scaling.high_freq_factor}
        rope |= {"original_max_position_embeddings": scaling.original_max_position_embeddings}
    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_theta=theta,
        rope_parameters=rope,
    )


class TestRope:
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
    def test_frequencies_equal_transformers(
        self, head_dim: int, scaling: RopeScaling | None
    ) -> None:
        theta = 10_000.0 if scaling is None else 500_000.0
        theirs = hub.LlamaRotaryEmbedding(hub_config(head_dim, theta, scaling)).inv_freq
        ours = rope.inverse_frequencies(head_dim, theta, scaling)
        assert ours.dtype == torch.float32
        assert ((ours - theirs) / theirs).abs().max() <= 1e-7

    def test_rotation_equals_transformers(self) -> None:
        config = hub_config(16, 500_000.0, SCALINGS["llama3.1"])
        positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 900, 0, 1]])
        cos, sin = hub.LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
        tables = rope.rope_tables(
            positions, rope.inverse_frequencies(16, 500_000.0, SCALINGS["llama3.1"])
        )
        agree(tables, (cos, sin))
        q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)

        def theirs(x: Tensor) -> Tensor:
            x = x.transpose(1, 2)
            return hub.apply_rotary_pos_emb(x, x, cos, sin)[0].transpose(1, 2)

        for x in (q, k):
            agree(run(lambda x: ops.rotate(x, *tables), x), run(theirs, x))

    def test_scores_depend_on_distance_alone(self) -> None:
        q, k = torch.randn(2, 1, 1, 1, 64)
        frequencies = rope.inverse_frequencies(64, 10_000.0, None)

        def score(query: int, key: int) -> float:
            turned = [
                ops.rotate(x, *rope.rope_tables(torch.tensor([[position]]), frequencies))
                for x, position in ((q, query), (k, key))
            ]
            return float((turned[0] * turned[1]).sum())

        assert score(5, 2) == pytest.approx(score(1005, 1002), abs=2e-4)
        assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)


class TestRMSNorm:
    def test_equals_transformers(self) -> None:
        norm = hub.LlamaRMSNorm(48, eps=1e-5)
        x, weight = torch.randn(3, 7, 48), torch.randn(48)

        def theirs(x: Tensor, weight: Tensor) -> Tensor:
            return torch.func.functional_call(norm, {"weight": weight}, x)

        agree(run(lambda x, w: ops.rms_norm(x, w, 1e-5), x, weight), run(theirs, x, weight))

    def test_bf16_equals_transformers(self) -> None:
        norm = hub.LlamaRMSNorm(48, eps=1e-5).bfloat16()
        torch.nn.init.normal_(norm.weight)
        x = torch.randn(3, 7, 48, dtype=torch.bfloat16)
        assert torch.equal(ops.rms_norm(x, norm.weight, 1e-5), norm(x))


class TestAttention:
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("length", [1, 5, 128, 131, 300])
    def test_equals_transformers(self, batch: int, length: int) -> None:
        q, k, v = (torch.randn(batch, length, heads, 16) for heads in (4, 2, 2))
        module = SimpleNamespace(num_key_value_groups=2, training=False)
        hidden = torch.full((length, length), float("-inf")).triu(1)[None, None]

        def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return hub.eager_attention_forward(module, q, k, v, hidden, scaling=0.25)[0]

        # A row with one key has gradients of zero by q and k: none to measure against.
        mine, judge = run(ops.attention, q, k, v), run(theirs, q, k, v)
        agree(mine[:1] + mine[3:], judge[:1] + judge[3:])
        if length > 1:
            agree(mine, judge, 2 * FP32)

    def test_packed_documents_are_as_if_alone(self) -> None:
        lengths = (3, 140, 1, 60)
        q, k, v = (torch.randn(1, sum(lengths), heads, 16) for heads in (4, 2, 2))
        documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
        together = run(lambda q, k, v: ops.attention(q, k, v, documents), q, k, v)

        def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
            return torch.cat([ops.attention(*part) for part in parts], dim=1)

        agree(together, run(alone, q, k, v), 2 * FP32)

    def test_long_and_short_sequences_take_the_fused_kernel(self) -> None:
        fused, blocks, *_ = ops.TABLE["attention"]
        for length, taken in ((1, True), (256, True), (257, False), (1023, False), (1024, True)):
            q, k, v = (torch.randn(1, length, heads, 8) for heads in (2, 1, 1))
            assert fused.supported(q, k, v, None) == taken
        assert not fused.supported(q, k, v, torch.zeros(1, 1024))
        assert not fused.supported(q.bfloat16(), k.bfloat16(), v.bfloat16(), None)
        long = ops.attention(q, k, v)
        agree([long], [ops.load(str(blocks.kernel))(q, k, v)])

    def test_fused_kernel_separates_documents(self) -> None:
        q, k, v = (torch.randn(2, 9, heads, 8) for heads in (4, 2, 2))
        documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [1] * 2])
        agree(
            run(lambda *qkv: ops.fused_attention(*qkv, documents), q, k, v),
            run(lambda *qkv: ops.reference_attention(*qkv, documents), q, k, v),
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_cache_continues_the_sequence(self, dtype: torch.dtype) -> None:
        q, k, v = (torch.randn(2, 11, heads, 8).to(dtype) for heads in (4, 2, 2))
        whole = ops.attention(q, k, v)
        cache = torch.nn.functional.pad(torch.stack((k, v)), (0, 0, 0, 0, 0, 5), value=1e4)
        for first in (0, 7, 10):  # all, the last four, the last one
            mask = torch.arange(16) <= torch.arange(first, 11)[:, None]
            mask = mask.expand(2, -1, -1)
            step = ops.attention_cached(q[:, first:], cache[0], cache[1], mask)
            agree([step], [whole[:, first:]], FP32 if dtype == torch.float32 else 1e-2)

    @pytest.mark.parametrize("heads", [1, 2, 6])
    def test_one_query_of_a_long_cache_is_the_same(self, heads: int) -> None:
        q, (k, v) = torch.randn(3, 1, 6, 8), torch.randn(2, 3, heads, 600, 8)
        mask = torch.arange(600) <= torch.tensor([[[0]], [[599]], [[300]]])
        k, v = (x.transpose(1, 2) for x in (k, v))
        shared = ops.load("attention.op:one_query")
        assert ops.kernel("attention_cached", q, k, v, mask) is shared
        for seen in (mask, None):
            found = ops.attention_cached(q, k, v, seen)
            exact = ops.reference_attention_cached(q.double(), k.double(), v.double(), seen)
            agree([found], [exact.float()])
        assert torch.equal(found, ops.attention_cached(q, k, v, torch.ones_like(mask)))


class TestTable:
    def test_bf16_is_widened_where_the_cpu_has_no_units(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x, weight = torch.randn(2, 3, 8).bfloat16(), torch.randn(5, 8).bfloat16()
        dy = torch.randn(2, 3, 5).bfloat16()
        for units in (True, False):
            monkeypatch.setattr(ops, "has_bf16_units", lambda units=units: units)
            assert ops.product_dtype(x) == (torch.bfloat16 if units else torch.float32)
            y, dx, dweight = run(ops.linear, x, weight)
            dx_alone = ops.matmul_grad_input(dy, weight)
            dweight_alone = ops.matmul_grad_weight(dy, x)
            assert y.dtype == dx.dtype == dweight.dtype == dx_alone.dtype == torch.bfloat16
            assert dweight_alone.dtype == (torch.bfloat16 if units else torch.float32)
            exact = dy.double().flatten(0, 1).T @ x.double().flatten(0, 1)
            agree([dweight_alone.double()], [exact], 8e-3)
            agree([dx_alone.double()], [dy.double() @ weight.double()], 8e-3)

    def test_fp32_products_are_torchs_own(self) -> None:
        x, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
        dy = torch.randn(2, 3, 5)
        assert ops.kernel("linear", x, weight) is torch.nn.functional.linear
        y = ops.linear(x.requires_grad_(), weight.requires_grad_())
        y.backward(dy)
        agree([ops.matmul_grad_input(dy, weight)], [x.grad])
        agree([ops.matmul_grad_weight(dy, x)], [weight.grad])

    def test_has_bf16_units_follows_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ask = ops.has_bf16_units.__wrapped__
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        for query in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
            monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
            assert not ask()
            monkeypatch.setattr(torch.cpu, query, lambda: True)
            assert ask()
        monkeypatch.setattr("platform.machine", lambda: "aarch64")
        assert ask() == torch.ops.mkldnn._is_mkldnn_bf16_supported()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_devices_without_a_kernel_get_the_reference(self, dtype: torch.dtype) -> None:
        x = torch.empty(2, 3, 4, 8, dtype=dtype, device="meta")
        for operation, rows in ops.TABLE.items():
            arguments = (x, x, x, None) if operation == "attention" else (x, x, x)
            last = rows[-1].kernel
            last = ops.load(last) if isinstance(last, str) else last
            assert ops.kernel(operation, *arguments) is last, operation

    def test_kernels_are_imported_when_first_chosen(self) -> None:
        script = (
            "import sys, torch, llamax.ops as ops;"
            "kernels = lambda: sorted(m for m in sys.modules if m.startswith('llamax.kernels.'));"
            "assert not kernels();"
            "assert 'torch._dynamo' not in sys.modules, 'its import takes as long as torch';"
            "ops.swiglu(torch.ones(2));"
            "print(*kernels())"
        )
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert result.stdout.split() == ["llamax.kernels.swiglu", "llamax.kernels.swiglu.op"]
