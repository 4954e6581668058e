"""NF4, double quantisation and int8: bits and values are those of bitsandbytes, where it is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import MODEL, base_folder
from torch import Tensor

from llamax.checkpoint.build_model import load_base
from llamax.checkpoint.hf_folder import open_source
from llamax.config.constants import NF4_BLOCK_SCALES
from llamax.config.schema import FinetuneConfig
from llamax.model import quantize
from llamax.model.llama import Llama
from llamax.parallel.collectives import Solo

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def judge() -> Any:
    """bitsandbytes' functions."""
    return pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes, the judge of NF4, is not installed"
    ).functional


def weights(kind: str, shape: tuple[int, int] = (96, 256)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) / 30
    if kind == "outliers":
        x[::7, ::13] *= 20
    if kind == "zeros":
        x[3] = 0
        x[:, 64:128] = 0
    return x.bfloat16() if kind == "bfloat16" else x


KINDS = ["normal", "outliers", "zeros", "bfloat16"]


@pytest.mark.parametrize("kind", KINDS)
def test_nf4_has_the_bits_and_values_of_bitsandbytes(judge: Any, kind: str) -> None:
    weight = weights(kind)
    bits, state = judge.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    scales = quantize.block_scales(weight)
    packed = quantize.pack(quantize.to_levels(weight, scales))
    assert torch.equal(scales.flatten(), state.absmax)
    assert torch.equal(packed.flatten(), bits.flatten())
    expected = judge.dequantize_4bit(bits, state)
    assert torch.equal(quantize.from_levels(packed, scales, weight.dtype), expected)
    assert torch.equal(quantize.levels(CPU), judge.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(96, 256), (128, 512), (5, 64)], ids=str)
def test_double_quantisation_has_the_bits_and_values_of_bitsandbytes(
    judge: Any, kind: str, shape: tuple[int, int]
) -> None:
    """Its own tensor code is exact; its CPU library looks levels up in a table of 2^16 steps."""
    weight = weights(kind, shape)
    bits, state = judge.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    scales = quantize.block_scales(weight)
    nested = quantize.nest(scales)
    assert torch.equal(quantize.dynamic(CPU), state.state2.code)
    assert torch.allclose(nested.mean, state.offset, rtol=1e-6)
    assert torch.allclose(nested.scales, state.state2.absmax, rtol=1e-6)
    centred = scales.flatten() - state.offset
    exact, _ = torch.ops.bitsandbytes.quantize_blockwise(centred.double(), state.state2.code, 256)
    assert torch.equal(nested.codes.flatten(), exact)
    other = nested.codes.flatten() != state.absmax
    assert other.float().mean() < 0.01
    nested = nested._replace(codes=state.absmax.view(scales.shape))
    places = torch.arange(scales.numel()).view(scales.shape) // NF4_BLOCK_SCALES
    found = quantize.unnest(nested.codes, nested.scales[places], nested.mean)
    mine = quantize.from_levels(
        quantize.pack(quantize.to_levels(weight, scales)), found, weight.dtype
    )
    assert torch.allclose(mine, judge.dequantize_4bit(bits, state), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_has_the_values_of_bitsandbytes(judge: Any, kind: str) -> None:
    weight = weights(kind)
    live = weight.abs().amax(1) > 0  # a row of zeros divides by zero there
    codes, stats, _ = judge.int8_vectorwise_quant(weight[live].float())
    scales = quantize.row_scales(weight)
    mine = quantize.to_int8(weight, scales)
    assert torch.equal(scales[live], stats)
    assert torch.equal(mine[live], codes)
    dense = quantize.from_int8(mine, scales, torch.float32)
    assert torch.allclose(dense[live], judge.int8_vectorwise_dequant(codes, stats), rtol=1e-6)
    assert not dense[~live].any()


def test_every_level_and_the_middle_between_two_are_kept() -> None:
    """Known answers, without a judge: a level is itself, a middle falls to the lower one."""
    levels = torch.tensor(quantize.LEVELS)
    row = torch.cat((levels, (levels[:-1] + levels[1:]) / 2, torch.ones(33))).unsqueeze(0)
    scales = quantize.block_scales(row * 2)
    assert scales.tolist() == [[2.0]]
    found = quantize.to_levels(row * 2, scales)[0]
    assert found[:16].tolist() == list(range(16))
    assert found[16:31].tolist() == list(range(15))
    packed = quantize.pack(found.unsqueeze(0))
    assert packed[0, :2].tolist() == [0x01, 0x23]
    dense = quantize.from_levels(packed, scales, torch.float32)
    assert torch.equal(dense[0, :16], levels * 2)


def test_errors_are_as_small_as_the_levels_are_apart() -> None:
    weight = weights("normal")
    scales = quantize.block_scales(weight)
    dense = quantize.from_levels(
        quantize.pack(quantize.to_levels(weight, scales)), scales, torch.float32
    )
    error = (dense - weight).abs() / scales.repeat_interleave(64, 1)
    assert error.max() <= max(b - a for a, b in itertools.pairwise(quantize.LEVELS)) / 2 + 1e-6
    scales = quantize.row_scales(weight)
    dense = quantize.from_int8(quantize.to_int8(weight, scales), scales, torch.float32)
    assert ((dense - weight).abs() / scales.unsqueeze(1)).max() <= 0.5 / 127 + 1e-6


def test_a_base_computes_what_transformers_computes_with_it_quantised(
    judge: Any, tmp_path: Path
) -> None:
    """Single scales: those of scales are rounded by a table in bitsandbytes' CPU library."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers quantises with accelerate alone")
    folder = base_folder(tmp_path / "base")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map="cpu", dtype=torch.float32
    )
    ours = Llama(MODEL, Solo("tp"), device="meta")
    finetune = FinetuneConfig(method="qlora", double_quant=False)
    load_base(ours, open_source(folder), finetune, torch.empty(0), Solo("data"))
    ids = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(2))
    expected = theirs(ids).logits
    assert (ours(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
