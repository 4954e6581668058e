"""The planner's arithmetic against figures worked out by hand, and its program's answers."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llamax.cli.plan import DOES_NOT_FIT, main
from llamax.config.hardware import (
    GIB,
    Machine,
    load_machine,
    machine_names,
    measure_machine,
    memory_share,
)
from llamax.config.load import load_config
from llamax.config.schema import Config
from llamax.parallel.mesh import Mesh
from llamax.runtime.errors import ConfigError
from llamax.tools.plan.memory import early_gradients, flash, gradients, kept, memory, state
from llamax.tools.plan.report import show_search
from llamax.tools.plan.roofline import time as step_time
from llamax.tools.plan.roofline import wire
from llamax.tools.plan.search import plan as planned
from llamax.tools.plan.search import search
from llamax.tools.plan.sizes import Share

TRN1 = load_machine("trn1.32xlarge")
APART = "--data.separate_documents=true"
ONE = [f"--{key}" for key in ("data.separate_documents=false",)]


def recipe(name: str, *overrides: str) -> Config:
    return load_config(name, overrides)


def total(lines: list[object]) -> float:
    return sum(line.value for line in lines)  # type: ignore[attr-defined]


def test_state_of_llama2_7b_at_tensor_8_data_16_by_hand() -> None:
    # 6,738,415,616 parameters, of which 65 norms of 4096 are whole on every rank.
    norms = 65 * 4096
    elements = (6_738_415_616 - norms) // 8 + norms
    share = Share(recipe("llama2-7b"), Mesh(tp=8, dp=16))
    found = {line.name: line.value for line in state(share, TRN1) if line.value}
    assert found == {
        "weights": 2 * elements,
        "masters": 4 * elements // 16,
        "moments": 8 * elements // 16,
    }
    assert gradients(share).value == 4 * elements
    assert early_gradients(share, TRN1).value == 4 * elements


def test_float32_weights_are_their_own_masters_but_where_steps_are_programs() -> None:
    share = Share(recipe("llama2-7b", "--run.dtype=float32"), Mesh(tp=8, dp=16))
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
    share = Share(recipe("llama3.1-70b"), Mesh(tp=32, dp=32))
    found = {line.name: line.value for line in state(share, TRN1) if line.value}
    assert found["weights"] == 2 * elements
    assert found["masters"] == 4 * elements // 32
    assert found["moments"] == 8 * elements // 32
    assert found["norm weights"] == 4 * 80 * 8192 * (256 + 2 * 128) // 32


def test_a_quantised_llama3_8b_spread_over_8_ranks_by_hand() -> None:
    share = Share(recipe("news-llama3-8b-qlora"), Mesh(dp=8))
    linear = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rest = 2 * (2 * 128256 * 4096 + 65 * 4096)
    found = {line.name: line.value for line in state(share, TRN1)}
    # nf4: 4 bits, a byte for each 64 weights and 4 bytes for each 256 of those
    assert found["base"] == pytest.approx(
        linear * (4 + 8 / 64 + 32 / 16384) / 8 / 8 + rest, rel=1e-3
    )
    rank = 16 * (2 * 8192 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert found["weights"] == 2 * 32 * rank


def test_without_zero1_every_rank_keeps_all_state() -> None:
    config = recipe("llama2-7b", "--parallel.zero1=false")
    found = {line.name: line.value for line in state(Share(config, Mesh(tp=8, dp=16)), TRN1)}
    assert found["moments"] == 8 * found["weights"] // 2


def test_shared_heads_and_padded_vocabulary_cost_what_they_cost() -> None:
    # tensor 16 over 8 key/value heads: two ranks hold each; 128256 rows divide, 128257 do not.
    config = recipe("llama3.1-8b", "--parallel.tensor=16", "--model.vocab_size=128257")
    share = Share(config, Mesh(tp=16))
    assert share.kv_heads == 1
    assert share.vocabulary == 8017
    groups = {group.uneven: group for group in share.groups() if group.elements > 10**7}
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
    share = Share(config, Mesh(tp=8, dp=16))
    last, tables = 512 * (4096 * 6 + 4), 2 * 4 * 4096 * 128
    assert kept(share, TRN1, mode).value == 32 * each + last + tables  # type: ignore[arg-type]


def test_documents_kept_apart_cost_every_pair_of_tokens_where_flash_knows_none() -> None:
    share = Share(recipe("llama2-7b", "--run.recompute=none", APART), Mesh(tp=8, dp=16))
    assert flash(share, TRN1) == "data.separate_documents=true"
    whole = Share(recipe("llama2-7b", "--run.recompute=none", *ONE), Mesh(tp=8, dp=16))
    assert flash(whole, TRN1) == ""
    more = kept(share, TRN1, "none").value - kept(whole, TRN1, "none").value
    assert more > 32 * 4 * 4 * 4096**2  # layers x heads x 4 B x pairs
    assert step_time(share, TRN1, 4).step_s > 1.5 * step_time(whole, TRN1, 4).step_s
    assert "2048" in flash(
        Share(
            recipe("llama2-7b", *ONE, "--data.sequence_length=1000", "--parallel.sequence=false"),
            Mesh(tp=8),
        ),
        TRN1,
    )


def test_a_group_within_a_node_uses_links_and_a_wider_one_the_network() -> None:
    assert wire(TRN1, 8, 1).name == "links"
    assert wire(TRN1, 4, 8).name == "links"
    across = wire(TRN1, 16, 8)
    assert across.name == "network"
    assert across.bytes_per_s == pytest.approx(100e9 * 0.7 / 8)  # eight rings share the node's
    # A ring of 8 moves 7/8 of the whole, and waits 7 times.
    assert wire(TRN1, 8, 1).ring(8e9) == pytest.approx(7 * (1e9 / (192e9 * 0.43) + 5e-6))
    assert wire(TRN1, 1, 1).ring(8e9) == 0


def test_time_of_matmuls_by_hand() -> None:
    config = recipe("llama2-7b", *ONE)
    found = {
        line.name: line.value for line in step_time(Share(config, Mesh(tp=8, dp=16)), TRN1, 4).lines
    }
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) // 8 + 32000 * 4096 // 8
    assert found["matmuls"] == pytest.approx(64 * 6 * 4096 * weights / (95e12 * 0.56))
    attention = 64 * 4.5 * 2 * 4096 * 4096 * 512 * 32  # the causal half, backward 2.5 times, again
    assert found["attention"] == pytest.approx(attention / (95e12 * 0.40))


def test_full_recomputation_costs_time_and_saves_memory() -> None:
    config = recipe("llama2-7b", *ONE)
    plans = {
        mode: planned(replace(config, run=replace(config.run, recompute=mode)), TRN1, 4)
        for mode in ("none", "selective", "full")
    }
    seconds = [plans[mode].time.step_s for mode in ("none", "selective", "full")]
    peaks = [plans[mode].memory.peak for mode in ("none", "selective", "full")]
    assert seconds == sorted(seconds)
    assert peaks[2] < peaks[1] <= peaks[0]


def test_a_longer_pipeline_waits_longer() -> None:
    config = recipe("llama2-13b", *ONE, "--parallel.tensor=8")
    times = [step_time(Share(config, Mesh(tp=8, dp=128 // pp, pp=pp)), TRN1, 32) for pp in (1, 4)]
    assert times[1].step_s > times[0].step_s


def test_a_search_that_finds_nothing_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "llama2-7b", "--ranks", "24", "--search"]) == 6
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "none of 144 layouts fits"
    assert rest[0] == "not these:"
    assert "  tensor 1: data.global_batch=1024 is not a multiple of" in rest[1]
    assert main(["--config", "llama2-7b", "--ranks", "1", "--search"]) == 6
    assert "tensor 1: 18 layouts do not fit; the smallest" in capsys.readouterr().out


def test_search_ranks_what_fits_and_tells_the_rest() -> None:
    plans, refused = search(recipe("llama2-7b", *ONE), TRN1, 4)
    fitting = [each for each in plans if each.memory.fits]
    assert fitting == plans[: len(fitting)]
    speeds = [each.time.tokens_per_s for each in fitting]
    assert speeds == sorted(speeds, reverse=True)
    text = "\n".join(show_search(plans, refused))
    assert "tensor 1: 12 layouts do not fit" in text
    assert "parallel.tensor=64 does not divide model.num_attention_heads=32" in text


# --- the program ---------------------------------------------------------------------------------


def test_a_plan_is_printed_within_two_seconds_and_without_torch() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-m", "llamax", "plan", "--config", "llama2-7b"]
    done = subprocess.run([*command, "--nodes", "4"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # the machine may be busy
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert done.returncode == 0, done.stderr
    assert " torch" not in done.stderr
    for words in (
        "weights",
        "gradients",
        "masters",
        "moments",
        "activations",
        "communication",
        "matmuls",
        "tensor collectives",
        "AdamW",
        "tokens/s",
        "MFU",
        "an hour",
        "$",
    ):
        assert words in done.stdout


def test_what_does_not_fit_has_an_exit_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--config", "llama2-7b", "--parallel.tensor=1", "--parallel.sequence=false"])
    assert code == DOES_NOT_FIT == 6
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_json_says_what_the_text_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "llama2-7b", "--nodes", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = {k: v for k, v in found["memory_bytes"].items() if k not in ("peak", "available")}
    assert found["memory_bytes"]["peak"] == pytest.approx(sum(lines.values()))
    steps = {k: v for k, v in found["step_s"].items() if k != "total"}
    assert found["step_s"]["total"] == pytest.approx(sum(steps.values()))
    assert found["parallel"] == {"tensor": 8, "data": 16}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parallel.tensor=3"], "parallel.tensor=3 does not divide model.num_attention_heads=32"),
        (["--parallel.tensor=3"], "and 2 more"),
        (["--instance", "trn3"], "--instance trn3 is neither a TOML file nor a machine that is"),
        (["--instance", "trn3"], "known; did you mean trn2?"),
        (["--nodes", "0"], "--nodes=0 is out of range"),
        (["--ranks", "-1"], "--ranks=-1 is out of range"),
        (["--dollars-per-hour", "-3"], "--dollars-per-hour=-3 is out of range; use 0 or more"),
        (["--dollars-per-hour", "nan"], "--dollars-per-hour=nan is out of range; use 0 or more"),
        (["--ranks", "64"], "--ranks=64 is more than the 32 devices of trn1.32xlarge"),
        (["--instance", "absent.toml"], "absent.toml: cannot be read as TOML"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        main(["--config", "llama2-7b", *arguments])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


MINE = """
[lab]
backend = "cuda"
ranks = 4
memory_gib = 24
bfloat16_tflops = 100
float32_tflops = 20
memory_gbps = 900
link_gbps = 12
dollars_per_hour = 0
"""


def test_a_machine_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(MINE)
    machine = load_machine(str(path))
    assert (machine.name, machine.ranks, machine.matmul_efficiency) == ("lab", 4, 1.0)
    assert main(["--config", "llama3.2-1b", "--instance", str(path), "--search"]) == 0
    assert "4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("ranks = 4", "ranks = 4.5", "lab.ranks=4.5 is not a whole number of 0 or more"),
        ("ranks = 4", "", "lab.ranks is missing or 0"),
        ("memory_gib = 24", "memory_gb = 24", "lab.memory_gb is an unknown key; did you mean"),
        ('"cuda"', '"rocm"', "lab.backend='rocm' is unknown; use cpu, cuda, xla or neuron"),
        ("memory_gbps = 900", "memory_gbps = -1", "is not a number of 0 or more"),
        ("memory_gib = 24", "memory_gib = nan", "lab.memory_gib=nan is not a number of 0 or more"),
        ("link_gbps = 12", "link_gbps = inf", "lab.link_gbps=inf is not a number of 0 or more"),
        ("link_gbps = 12", "link_gbps = 0", "lab.link_gbps is missing or 0"),
        ("ranks = 4", "ranks = true", "lab.ranks=True is not a whole number of 0 or more"),
        ("[lab]", "[lab]\nlink_efficiency = 1.5", "lab.link_efficiency=1.5 is no share; use above"),
        ("[lab]", "[lab]\nabout = 3", "lab.about=3 is not a string"),
        ("[lab]", "top = 1\n[lab]", "top stands outside a table"),
        ("[lab]", "[other]\nranks = 1\n[lab]", "has 2 tables"),
    ],
)
def test_a_machine_file_is_checked(tmp_path: Path, before: str, after: str, said: str) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(MINE.replace(before, after))
    with pytest.raises(ConfigError, match="lab") as error:
        load_machine(str(path))
    assert said in str(error.value)


@pytest.mark.parametrize(("zero1", "said"), [(True, "4 B + 2 B x "), (False, "2 x 4 B x ")])
def test_what_data_ranks_send_is_what_is_counted(zero1: bool, said: str) -> None:
    config = recipe("llama3.2-1b", "--parallel.tensor=8", f"--parallel.zero1={str(zero1).lower()}")
    lines = planned(config, TRN1, 1).time.lines
    assert next(line for line in lines if line.name == "data collectives").formula.startswith(said)


def test_every_known_machine_plans(capsys: pytest.CaptureFixture[str]) -> None:
    for name in machine_names()[1:]:
        assert load_machine(name).ranks >= 1
        main(["--config", "llama3.2-1b", "--instance", name, "--parallel.tensor=2"])
        assert name in capsys.readouterr().out
    assert load_machine("h100").name == "p5.48xlarge"


def test_this_machine_is_measured_and_cut_into_ranks() -> None:
    here = load_machine("cpu")
    assert here.float32_tflops > 0
    half = here.with_ranks(2)
    assert (half.ranks, half.memory_gib) == (2, here.memory_gib / 2)
    assert half.reserve_gib == here.reserve_gib  # every process has its own Python
    assert Machine.with_ranks(TRN1, 8) == replace(TRN1, ranks=8)  # the others are idle


def test_this_machine_has_its_control_groups_share_of_memory(tmp_path: Path) -> None:
    old, new = (tmp_path / "sys/fs/cgroup" / each for each in ("memory", "memory.max"))
    old.mkdir(parents=True)
    assert memory_share(8 * GIB, tmp_path) == 8 * GIB
    for limit, said in ((new, "max"), (old / "memory.limit_in_bytes", "9223372036854771712")):
        limit.write_text(f"{said}\n")
        assert memory_share(8 * GIB, tmp_path) == 8 * GIB
        limit.write_text(f"{GIB // 4}\n")
        assert memory_share(8 * GIB, tmp_path) == GIB // 4
        assert measure_machine(tmp_path).memory_gib == 0.25
        limit.unlink()


def test_notes_name_what_slows_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config", "llama2-7b", "--nodes", "4", "--instance", "h100"])
    assert "note: run.backend=xla, but p5.48xlarge wants --run.backend=cuda" in (
        capsys.readouterr().out
    )
    main(["--config", "llama2-7b", "--nodes", "4", "--data.separate_documents=true"])
    assert "note: attention computes every pair of tokens" in capsys.readouterr().out


def test_memory_names_the_fullest_moment() -> None:
    share = Share(recipe("llama2-7b", *ONE), Mesh(tp=8, dp=16))
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
    share = Share(config, Mesh(tp=4, dp=2))
    wanted = expected(config.model, config.finetune, tensor=4, data=2, itemsize=2)
    plain, linear = share.base
    assert plain == wanted.plain
    assert linear == pytest.approx(wanted.quantised, rel=0.01)
    assert Share(config, Mesh()).adapters == lora.num_parameters(config.model, config.finetune)
    told = {line.name: line.value for line in state(share, TRN1)}
    assert told["dense layer"] == wanted.dense
    assert told["weights"] == 2 * share.adapters
    assert told["moments"] == 8 * share.adapters // 2


def test_a_frozen_base_saves_gradients_state_and_a_third_of_the_matmuls() -> None:
    whole = recipe("llama2-7b", *ONE)
    tuned = replace(whole, finetune=replace(whole.finetune, method="lora", r=8))
    one, other = (planned(config, TRN1, 1) for config in (whole, tuned))
    assert other.memory.peak < one.memory.peak - 4e9
    seconds = [{line.name: line.value for line in each.time.lines} for each in (one, other)]
    assert seconds[1]["matmuls"] == pytest.approx(seconds[0]["matmuls"] * 2 / 3, rel=0.02)
    assert "base gathered" not in seconds[1]
    spread = replace(whole, finetune=replace(whole.finetune, method="qlora", r=8))
    assert "base gathered" in {line.name for line in planned(spread, TRN1, 1).time.lines}
    names = {line.name for line in other.memory.lines}
    assert "base" in names
    assert "dense layer" not in names
