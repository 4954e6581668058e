"""The search for a mesh that fits."""

from __future__ import annotations

import json

import pytest

from llamax.cli.plan import main
from llamax.config.hardware import load_machine
from llamax.config.load import load_config
from llamax.config.schema import Config
from llamax.tools.plan import Plan
from llamax.tools.plan.memory import MARGIN
from llamax.tools.plan.nearest import flags
from llamax.tools.plan.report import TIGHT, show_search
from llamax.tools.plan.search import pipelines, search

TRN1 = load_machine("trn1.32xlarge")


STAGE = ["--parallel.pipeline=1", "--parallel.chunks=1"]


def recipe(name: str, *overrides: str) -> Config:
    return load_config(name, overrides)


def test_a_search_that_finds_nothing_reports_why(capsys: pytest.CaptureFixture[str]) -> None:
    whole = "--parallel.layers_per_stage=32"  # no pipelines
    assert main(["--config", "llama2-7b", "--ranks", "24", whole, "--search"]) == 6
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "none of 312 layouts fits"
    assert rest[0] == "the others:"
    assert "  tensor 1: data.global_batch=1024 is not a multiple of" in rest[1]
    assert main(["--config", "llama2-7b", "--ranks", "1", "--search"]) == 6
    assert "tensor 1: 18 layouts do not fit; the smallest" in capsys.readouterr().out


def test_search_ranks_meshes_that_fit_and_counts_the_others() -> None:
    config = recipe("llama2-13b", "--parallel.layers_per_stage=40", *STAGE)  # no pipelines
    plans, refused = search(config, TRN1, 4, stages=(1,))
    fitting = [each for each in plans if each.memory.fits]
    assert fitting == plans[: len(fitting)]
    order = [(each.risks != (), -each.time.tokens_per_s) for each in fitting]
    assert order == sorted(order)
    text = "\n".join(show_search(config, plans, refused))
    assert "tensor 1: 12 layouts do not fit" in text
    assert "parallel.tensor=16 does not divide model.num_attention_heads=40" in text


@pytest.mark.parametrize(
    ("name", "instance", "nodes"),
    [
        ("llama2-70b", "trn1.32xlarge", 32),
        ("llama3.1-8b-128k", "trn1.32xlarge", 32),
        ("llama2-70b", "p5.48xlarge", 8),
        ("llama3.2-1b", "g5.12xlarge", 2),
    ],
)
def test_tensor_and_context_ranks_share_a_node(name: str, instance: str, nodes: int) -> None:
    machine = load_machine(instance)
    plans, refused = search(recipe(name, *STAGE), machine, nodes)
    assert plans
    for each in plans:
        assert machine.ranks % (each.run.mesh.tp * each.run.mesh.cp) == 0
    assert any(f"a node of {machine.ranks} ranks" in each.reason for each in refused)


def degrees(plans: list[Plan]) -> set[tuple[int, int, str]]:
    """Pipeline degree, ZeRO stage and recompute mode of every plan."""
    return {
        (each.run.mesh.pp, each.run.config.parallel.zero, each.run.config.run.recompute)
        for each in plans
    }


def test_a_search_on_trainium_tries_pipelines_that_recompute_everything() -> None:
    plans, _ = search(recipe("llama2-70b"), TRN1, 32)
    assert next(each for each in plans if each.run.config.parallel.zero == 1).run.mesh.pp > 1
    assert {pp for pp, _, _ in degrees(plans)} == {1, 2, 4, 8, 16}
    assert {mode for pp, _, mode in degrees(plans) if pp > 1} == {"full"}
    tried = degrees(plans)
    assert {zero for pp, zero, _ in tried if pp == 1} == {1, 2, 3}
    assert {zero for pp, zero, _ in tried if pp > 1} == {1}
    assert {mode for _, zero, mode in tried if zero == 3} == {"full"}


@pytest.mark.parametrize(
    ("backend", "instance", "nodes", "fitting"),
    [("xla", "trn1.32xlarge", 32, {2, 4, 8, 16, 32}), ("cuda", "p5.48xlarge", 8, {1, 2, 4, 8})],
)
def test_a_rank_needs_no_room_for_weights_that_are_cut(
    backend: str, instance: str, nodes: int, fitting: set[int]
) -> None:
    config, machine = recipe("llama2-70b", f"--run.backend={backend}"), load_machine(instance)
    cut = [each for each in search(config, machine, nodes)[0] if each.run.config.parallel.zero == 3]
    assert {each.run.mesh.tp for each in cut if each.memory.fits} == fitting
    smallest = min(fitting)  # whose ranks could not hold their share of the model whole
    assert 2 * config.model.num_parameters() / smallest > machine.memory_bytes()


def test_a_search_on_gpus_tries_zero_without_a_pipeline() -> None:
    config = recipe("llama2-70b", "--run.backend=cuda", *STAGE)
    plans, refused = search(config, load_machine("p5.48xlarge"), 128)
    tried = degrees(plans)
    assert {zero for pp, zero, _ in tried if pp == 1} == {1, 2, 3}
    assert {zero for pp, zero, _ in tried if pp > 1} == {1}
    assert {mode for _, zero, mode in tried if zero == 3} == {"none", "selective", "full"}
    assert {mode for pp, _, mode in tried if pp > 1} == {"none", "selective", "full"}
    assert len(plans) + len(refused) < 1200  # a second or so


@pytest.mark.parametrize(
    ("overrides", "tried"),
    [
        (["--parallel.zero=0"], {(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1)}),
        (["--parallel.zero=2"], {(1, 1), (1, 2), (1, 3), (2, 1)}),
        (["--parallel.layers_per_stage=32"], {(1, 1), (1, 2), (1, 3)}),
        (["--finetune.method=lora"], {(1, 1), (1, 3), (2, 1)}),
        (["--finetune.method=qlora"], {(1, 1), (2, 1)}),
    ],
)
def test_a_search_tries_what_the_model_and_the_method_allow(
    overrides: list[str], tried: set[tuple[int, int]]
) -> None:
    base = ["--checkpoint.init_from=base"] if "finetune" in overrides[0] else []
    config = recipe("llama2-7b", "--run.backend=cuda", *base, *overrides)
    plans, _ = search(config, load_machine("p4d.24xlarge"), 1)
    assert {(pp, zero) for pp, zero, _ in degrees(plans) if pp <= 2} == tried


def test_a_search_offers_nothing_that_the_machine_refuses() -> None:
    config = recipe("llama2-7b", "--run.backend=cuda", "--optim.offload=true")
    plans, refused = search(config, TRN1, 1)
    assert plans == []
    assert any("optim.offload=true with run.backend=xla" in each.reason for each in refused)
    assert search(config, load_machine("p4d.24xlarge"), 1)[0]


def test_listed_stages_stay_as_configured() -> None:
    full = ["--run.recompute=full", "--parallel.pipeline=2"]
    assert pipelines(recipe("llama2-7b", *full, "--parallel.layers_per_stage=17,15")) == [2]
    assert pipelines(recipe("llama2-7b", *full)) == [2, 1, 4, 8, 16, 32]


def test_a_search_tries_chunks_of_equal_layers_and_none_without_a_pipeline() -> None:
    config = recipe("llama2-70b", "--parallel.chunks=2")
    plans, _ = search(config, TRN1, 32)
    tried = {(each.run.mesh.pp, each.run.config.parallel.chunks) for each in plans}
    # 80 layers; 32 data ranks of tensor 8 or more leave a pipeline 2 and 4 microsteps to group
    assert tried == {(1, 1), *((2**k, chunks) for k in (1, 2) for chunks in (1, 2, 4))} | {
        (8, 1),
        (8, 2),
        (16, 1),
    }
    staged = next(each for each in plans if each.run.mesh.pp > 1)
    assert staged.run.config.parallel.chunks == 2  # faster, since the bubble is half as long
    alone = next(each for each in plans if each.run.mesh.pp == 1)
    assert "--parallel.chunks=1" in flags(config, 32, alone)


def test_a_search_tries_nearly_equal_stages_where_ranks_do_not_divide_the_layers() -> None:
    config = recipe("llama2-7b", "--data.global_batch=768")
    plans, _ = search(config, TRN1, 3)
    cut = {
        each.run.mesh.pp: each.run.config.parallel.layers_per_stage
        for each in plans
        if each.run.config.parallel.layers_per_stage
    }
    assert cut == {3: "11,11,10", 6: "6,6,5,5,5,5", 12: "3,3,3,3,3,3,3,3,2,2,2,2"}
    uneven = next(each for each in plans if each.run.config.parallel.layers_per_stage)
    assert f"--parallel.layers_per_stage={cut[uneven.run.mesh.pp]}" in flags(config, 3, uneven)


def test_a_search_prints_the_fastest_pipeline_as_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--config", "llama2-70b", "--nodes", "4", *STAGE, "--parallel.tensor=32"]
    assert main([*arguments, "--search"]) == 0
    _, header, best, *rest = capsys.readouterr().out.splitlines()
    row = dict(zip(header.split(), best.split(), strict=False))
    assert (row["tensor"], row["pipeline"], row["data"], row["zero"]) == ("8", "16", "1", "1")
    (line,) = (line for line in rest if line.startswith("the fastest is "))
    changes = line.removeprefix("the fastest is ").split()
    assert changes[:2] == ["--parallel.tensor=8", "--parallel.pipeline=16"]
    assert changes[2:] == ["--data.micro_batch=2"]
    assert main([*arguments, *changes]) == 0
    shown = capsys.readouterr().out
    assert "tensor 8 x pipeline 16 x data 1" in shown
    assert "tight" not in shown


def test_a_search_lists_layouts_without_a_margin_last(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "llama2-70b", "--nodes", "4", *STAGE, "--parallel.tensor=32"]
    assert main([*arguments, "--search"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not any(row.endswith("  tight") for row in lines[2:12])
    (line,) = (line for line in lines if "faster but tight is " in line)
    gain, _, changes = line.partition("% faster but tight is ")
    pipeline = ["--parallel.tensor=8", "--parallel.pipeline=8", "--parallel.chunks=2"]
    assert changes.split()[:3] == pipeline
    assert lines[lines.index(line) + 1] == TIGHT
    assert main([*arguments, *changes.split()]) == 0
    shown = capsys.readouterr().out
    assert "tensor 8 x pipeline 8 x data 2" in shown
    assert " of 16 GiB, fits, tight; fullest" in shown
    assert f"note: {TIGHT}" in shown

    plans, _ = search(recipe("llama2-70b"), TRN1, 4)
    fitting = [each for each in plans if each.memory.fits]
    tight = [each.memory.peak * (1 + MARGIN) > 16 * 2**30 for each in fitting]
    assert tight == [each.memory.tight for each in fitting]
    safe = tight.index(True)
    assert not any(each.large for each in fitting[:safe])
    assert all(each.risks for each in fitting[safe:])
    speed = [each.time.tokens_per_s for each in fitting]
    assert float(gain) == round(100 * (speed[safe] / speed[0] - 1), 1)


def test_a_search_for_programs_has_the_nearest_layout_where_none_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--config", "llama2-70b", "--nodes", "1", "--search", "--json"]
    assert main(arguments) == 6
    found = json.loads(capsys.readouterr().out)
    assert found["layouts"]
    assert not any(each["fits"] for each in found["layouts"])
    assert found["nearest"]["fits"]
    assert main(["--config", "llama2-70b", *found["nearest"]["flags"]]) == 0
    capsys.readouterr()
    assert main([*arguments, "--nodes", "32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "nearest" not in found
    fitting = [each for each in found["layouts"] if each["fits"]]
    risky = [each["tight"] or each["large"] for each in fitting]
    assert risky == sorted(risky)
    assert (
        {True, False} == {each["tight"] for each in fitting} == {each["large"] for each in fitting}
    )
