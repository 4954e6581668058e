"""The memory of a rank by formula, checked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.runs import share as share_of

from llamax.config.hardware import (
    load_machine,
)
from llamax.config.load import load_config
from llamax.config.schema import Config
from llamax.parallel.mesh import Mesh
from llamax.tools.plan.memory import kept, memory, plain_attention
from llamax.tools.plan.planner import plan as planned
from llamax.tools.plan.roofline import time as step_time
from llamax.tools.plan.sizes import adapter_elements
from llamax.tools.plan.state import early_gradients, gradients, state

TRN1 = load_machine("trn1.32xlarge")


APART = "--data.separate_documents=true"


ONE = [f"--{key}" for key in ("data.separate_documents=false",)]


def recipe(name: str, *overrides: str) -> Config:
    return load_config(name, overrides)


def test_state_of_llama2_7b_at_tensor_8_data_16_by_hand() -> None:
    # 6,738,415,616 parameters, of which 65 norms of 4096 are whole on every rank.
    norms = 65 * 4096
    elements = (6_738_415_616 - norms) // 8 + norms
    share = share_of(recipe("llama2-7b"), Mesh(tp=8, dp=16))
    found = {line.name: line.value for line in state(share, TRN1) if line.value}
    assert found == {
        "weights": 2 * elements,
        "masters": 4 * elements // 16,
        "moments": 8 * elements // 16,
    }
    assert gradients(share).value == 4 * elements
    assert early_gradients(share, TRN1).value == 4 * elements


def test_float32_weights_are_their_own_masters_but_where_steps_are_programs() -> None:
    share = share_of(recipe("llama2-7b", "--run.dtype=float32"), Mesh(tp=8, dp=16))
    programs, alone = (
        {line.name: line.value for line in state(share, machine)}
        for machine in (TRN1, load_machine("p4d.24xlarge"))
    )
    assert programs["masters"] == programs["weights"] / 16
    assert alone["masters"] == 0


def test_state_of_llama31_70b_at_tensor_32_by_hand() -> None:
    # 2 heads of 128 queries a rank, one head of keys and values that four ranks share
    attention = 2 * 8192 * 256 + 2 * 8192 * 128
    layer = attention + 3 * 8192 * 28672 // 32
    elements = 80 * layer + 2 * 8192 * 128256 // 32 + 161 * 8192
    assert elements == 2_331_910_144
    zero_1 = recipe("llama3.1-70b", "--parallel.tensor=32", "--parallel.zero=1")
    share = share_of(zero_1, Mesh(tp=32, dp=32))
    found = {line.name: line.value for line in state(share, TRN1) if line.value}
    assert found["weights"] == 2 * elements
    assert found["masters"] == 4 * elements // 32
    assert found["moments"] == 8 * elements // 32
    assert found["norm weights"] == 4 * 80 * 8192 * (256 + 2 * 128) // 32


def test_a_quantised_llama3_8b_spread_over_8_ranks_by_hand() -> None:
    share = share_of(recipe("news-llama3-8b-qlora"), Mesh(dp=8))
    linear = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rest = 2 * (2 * 128256 * 4096 + 65 * 4096)
    found = {line.name: line.value for line in state(share, TRN1)}
    # nf4: 4 bits, a byte for each 64 weights and 4 bytes for each 256 of those
    assert found["base"] == pytest.approx(
        linear * (4 + 8 / 64 + 32 / 16384) / 8 / 8 + rest, rel=1e-3
    )
    rank = 16 * (2 * 8192 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert found["weights"] == 2 * 32 * rank


def test_without_zero_every_rank_keeps_all_state() -> None:
    config = recipe("llama2-7b", "--parallel.zero=0")
    found = {line.name: line.value for line in state(share_of(config, Mesh(tp=8, dp=16)), TRN1)}
    assert found["moments"] == 8 * found["weights"] // 2


def test_shared_heads_and_padded_vocabulary_cost_what_they_cost() -> None:
    # tensor 16 over 8 key/value heads: two ranks hold each; 128256 rows divide, 128257 do not.
    config = recipe("llama3.1-8b", "--parallel.tensor=16", "--model.vocab_size=128257")
    share = share_of(config, Mesh(tp=16))
    assert share.kv_heads == 1
    assert share.vocabulary == 8017
    groups = {group.uneven: group for group in share.groups if group.elements > 10**7}
    qkv, vocabulary = 32 * 4096 * (256 + 2 * 128), 2 * 8017 * 4096
    assert groups[True].elements == qkv + vocabulary
    assert groups[True].summed
    assert not groups[False].summed


@pytest.mark.parametrize(
    ("mode", "each"),
    [
        ("full", 512 * 4096 * 2),
        # norms: x in float32, normalised twice; qkv and attention's output; SwiGLU in float32
        ("selective", 2 * 512 * (4096 * 8 + 4) + 4096 * (2 * 2048 + 14 * 1376)),
    ],
)
def test_activations_of_llama2_7b_by_hand(mode: str, each: int) -> None:
    config = recipe("llama2-7b", *ONE)
    share = share_of(config, Mesh(tp=8, dp=16))
    last, tables = 512 * (4096 * 6 + 4), 2 * 4 * 4096 * 128
    rotating = 2 * 4096 * 3 * 512  # q, k and v before the kernel has rotated them
    value = kept(share, TRN1, mode).value  # type: ignore[arg-type]
    assert value == 32 * each + last + tables + rotating


def test_documents_kept_apart_need_no_memory_for_pairs_on_trn1() -> None:
    share = share_of(recipe("llama2-7b", "--run.recompute=none", APART), Mesh(tp=8, dp=16))
    whole = share_of(recipe("llama2-7b", "--run.recompute=none", *ONE), Mesh(tp=8, dp=16))
    assert plain_attention(share, TRN1) == plain_attention(whole, TRN1) == ""
    assert kept(share, TRN1, "none").value == kept(whole, TRN1, "none").value
    seconds = [step_time(each, TRN1, 4).step_s for each in (whole, share)]
    assert seconds[0] < seconds[1] < 1.1 * seconds[0]


def test_an_attention_without_a_kernel_costs_every_pair_of_tokens() -> None:
    uneven = "--data.sequence_length=4032"  # not a multiple of 128
    share = share_of(recipe("llama2-7b", "--run.recompute=none", APART, uneven), Mesh(tp=8, dp=16))
    assert plain_attention(share, TRN1) == "the sequence length 4032 is not a multiple of 128"
    whole = share_of(recipe("llama2-7b", "--run.recompute=none", *ONE), Mesh(tp=8, dp=16))
    more = kept(share, TRN1, "none").value - kept(whole, TRN1, "none").value
    assert more > 0.9 * 32 * 4 * 4 * 4096**2  # layers x heads x 4 B x pairs
    assert step_time(share, TRN1, 4).step_s > 1.5 * step_time(whole, TRN1, 4).step_s
    assert "128" in plain_attention(
        share_of(
            recipe("llama2-7b", *ONE, "--data.sequence_length=1000", "--parallel.sequence=false"),
            Mesh(tp=8),
        ),
        TRN1,
    )


def test_memory_names_the_fullest_moment() -> None:
    share = share_of(recipe("llama2-7b", *ONE), Mesh(tp=8, dp=16))
    found = memory(share, TRN1)
    assert found.moment == "forward has ended"
    assert [line.name for line in found.modes] == ["none", "selective", "full"]
    small = replace(TRN1, memory_gib=found.peak / 2**30 - 0.01)
    assert not memory(share, small).fits


# --- tuning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_quantised_base_takes_what_it_takes(quant: str) -> None:
    from llamax.model import lora
    from llamax.model.qlora import expected

    config = recipe(
        "news-llama3-8b-qlora", f"--finetune.quant={quant}", "--finetune.targets=q_proj,down_proj"
    )
    share = share_of(config, Mesh(tp=4, dp=2))
    wanted = expected(config.model, config.finetune, tensor=4, data=2, itemsize=2)
    plain, linear = share.base
    assert plain == wanted.plain
    assert linear == pytest.approx(wanted.quantised, rel=0.01)
    assert adapter_elements(config) == lora.num_parameters(config.model, config.finetune)
    told = {line.name: line.value for line in state(share, TRN1)}
    assert told["dense layer"] == wanted.dense
    assert told["weights"] == 2 * share.adapters
    assert told["moments"] == 8 * share.adapters // 2


def test_a_frozen_base_saves_gradients_state_and_a_third_of_the_matmuls() -> None:
    whole = recipe("llama2-7b", *ONE, "--checkpoint.init_from=base")
    tuned = replace(whole, finetune=replace(whole.finetune, method="lora", r=8))
    untiled = replace(TRN1, product_tile=1)  # a rank of 8 would take as long as one of 128
    one, other = (planned(config, untiled, 1) for config in (whole, tuned))
    assert other.memory.peak < one.memory.peak - 4e9
    seconds = [{line.name: line.value for line in each.time.lines} for each in (one, other)]
    assert seconds[1]["matmuls"] == pytest.approx(seconds[0]["matmuls"] * 2 / 3, rel=0.02)
    assert "base gathered" not in seconds[1]
    spread = replace(whole, finetune=replace(whole.finetune, method="qlora", r=8))
    assert "base gathered" in {line.name for line in planned(spread, TRN1, 1).time.lines}
    names = {line.name for line in other.memory.lines}
    assert "base" in names
    assert "dense layer" not in names
