"""Weights in 8 bits: how near they are, what they take, and where they run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from support.models import TIED, tiny

from llamax.checkpoint.build_model import load_int8
from llamax.checkpoint.hf_folder import open_source
from llamax.checkpoint.load import load_weights
from llamax.config.model import ModelConfig
from llamax.inference.checks import check_computing
from llamax.inference.engine import LoadedModel
from llamax.inference.serving.adapters import build_served
from llamax.model import int8
from llamax.model.int8 import FEW_ROWS, NEVER, ROWS_AT_ONCE, Int8Linear
from llamax.model.llama import Llama
from llamax.parallel.collectives import Solo
from llamax.runtime.errors import ConfigError

WIDE = tiny(hidden_size=64, intermediate_size=128, vocab_size=96, num_key_value_heads=4)


KERNELS = {"bfloat16": NEVER, "integers": 1}  # from how many rows integers are multiplied
if not torch.cpu._is_vnni_supported():
    del KERNELS["integers"]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply a few rows by one of the kernels."""
    monkeypatch.setattr(int8, "integer_rows", lambda: KERNELS[request.param])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, ROWS_AT_ONCE + 1])
@pytest.mark.parametrize(("out", "columns"), [(48, 64), (33, 96), (48, 40), (7, 12), (6, 1)])
def test_the_product_is_that_of_the_rounded_weight(rows: int, out: int, columns: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(out, columns), torch.randn(1, rows, columns)
    weight[5] = 0
    layer = Int8Linear(weight, Solo("tp"), reduces=False)
    exact = (x.double() @ weight.double().t()).float()
    bound = x.abs().sum(-1, keepdim=True) * layer.scales.float() / 2  # half a step each
    rounding = 2**-7 * (x.abs() @ weight.abs().t() + bound)  # activations and result in bfloat16
    assert ((layer(x) - exact).abs() <= bound + rounding).all()
    assert (layer(x)[..., 5] == 0).all()
    assert (layer.dense() - weight).abs().max() <= layer.scales.float().max() * 0.51


@pytest.mark.skipif("integers" not in KERNELS, reason="this processor has no VNNI")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_integers_rounds_activations_to_16_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(40, 1408), (torch.randn(16, 1408) * 1000).to(dtype)
    x[1, 7], x[2], x[3, 4], x[4, 4], x[5] = 1e6, 0, math.nan, math.inf, 1e-33
    x[6], weight[3] = 1000, 2  # the largest integers alone
    layer = Int8Linear(weight, Solo("tp"), reduces=False)
    codes, scales = layer.codes, layer.scales
    y = int8.integer_product(x.float(), codes, scales)
    assert y[3:5].isnan().all()
    finite = torch.tensor([row for row in range(16) if row not in (3, 4)])
    wide, weights = x[finite].double(), (codes.double() * scales.double()[:, None]).abs()
    half_step = wide.abs().amax(1, keepdim=True) / (2 * 32258)
    exact = wide @ (codes.double() * scales.double()[:, None]).t()
    bound = half_step * weights.sum(1) + 1e-6 * (wide.abs() @ weights.t()) + 1e-30
    assert ((y[finite] - exact).abs() <= bound).all()
    alone = [int8.integer_product(row[None].float(), codes, scales) for row in x]
    assert torch.equal(torch.cat(alone)[finite], y[finite])  # to the bit


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("config", [WIDE, replace(WIDE, tie_word_embeddings=True), TIED])
def test_a_model_is_near_and_takes_a_quarter(config: ModelConfig) -> None:
    model, ids = Llama(config).init(0), torch.arange(12).view(2, 6)
    labels = ids + 1
    with torch.no_grad():
        loss, count = model.loss(ids, labels)
        logits = model(ids, last_B=torch.tensor([5, 5]))
        linear = sum(p.nbytes for n, p in model.named_parameters() if "proj" in n)
        linear += model.head.dense().nbytes
        before, tied = int8.num_bytes(model), model.lm_head is None
        int8.quantize(model)
        small, _ = model.loss(ids, labels)
        assert small.item() / count.item() == pytest.approx(loss.item() / count.item(), rel=0.01)
        near = model(ids, last_B=torch.tensor([5, 5]))
    assert (near - logits).norm() < 0.03 * logits.norm()
    kept = before - linear + (model.head.dense().nbytes if tied else 0)  # looked up too
    scales = sum(m.scales.nbytes for m in model.modules() if isinstance(m, Int8Linear))
    assert int8.num_bytes(model) == kept + linear // 4 + scales


@pytest.mark.parametrize(
    ("backend", "quantize", "message"),
    [
        ("cuda", "int8", "`quantize=int8` runs on the cpu alone, not with `backend=cuda`"),
        ("cpu", "int4", "`quantize=int4` is not known; use int8"),
    ],
)
def test_what_cannot_be_quantised_is_an_error(backend: str, quantize: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_computing(1, 0, "", backend, quantize=quantize)


def test_adapters_have_to_be_merged_first() -> None:
    source, folder = SimpleNamespace(folder=Path("base")), Path("adapters")
    loaded = LoadedModel(source, WIDE, None, folder)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="whole model, and adapters holds adapters; merge them"):
        loaded.build(Solo("tp"), torch.device("cpu"), quantize="int8")
    whole = replace(loaded, adapter=None)
    with pytest.raises(ConfigError, match="without adapters; merge `adapter` poet with"):
        build_served(whole, {"poet": loaded}, torch.device("cpu"), "", "int8")


@pytest.mark.parametrize("config", [WIDE, replace(WIDE, tie_word_embeddings=True), TIED])
def test_files_are_quantised_a_few_rows_at_a_time(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hub("float32")))
    hub.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    whole = Llama(ModelConfig.from_hub(source.model))
    load_weights(source, whole.sharded_parameters())
    int8.quantize(whole)
    monkeypatch.setattr(int8, "AT_ONCE", 5 * config.hidden_size)
    parts = Llama(whole.config, Solo("tp"), device="meta")
    load_int8(parts, source, torch.device("cpu"))
    state = dict(parts.named_buffers()) | dict(parts.named_parameters())
    for name, tensor in (*whole.named_buffers(), *whole.named_parameters()):
        assert torch.equal(state.pop(name), tensor), name
    assert not state
