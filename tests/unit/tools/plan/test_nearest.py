"""The nearest layout that fits, as options."""

from __future__ import annotations

import json

import pytest

from llamax.cli.plan import main
from llamax.config.hardware import load_machine
from llamax.config.load import load_config
from llamax.runtime.errors import ConfigError
from llamax.tools.plan import plan
from llamax.tools.plan.nearest import nearest, node_counts
from llamax.tools.plan.search import search

TRN1 = load_machine("trn1.32xlarge")
LARGE = "--config llama2-70b --parallel.tensor=32 --parallel.pipeline=1 --parallel.chunks=1"


@pytest.mark.parametrize(
    ("arguments", "use"),
    [
        (f"{LARGE} --nodes 4", "--parallel.pipeline=2"),
        (f"{LARGE} --nodes 1", "--nodes=4 --parallel.pipeline=2"),
        (f"{LARGE} --nodes 4 --parallel.layers_per_stage=80", "--nodes=32"),
        (
            "--config llama2-7b --parallel.tensor=1 --parallel.sequence=false",
            "--parallel.tensor=16",
        ),
        ("--config llama2-7b --nodes 4 --parallel.zero=0", "--parallel.zero=1"),
        (
            "--config llama2-7b --instance g5.12xlarge --parallel.tensor=2",
            "--nodes=2 --parallel.pipeline=4 --run.recompute=full",
        ),
        (
            "--config llama2-7b --instance g5.12xlarge --parallel.tensor=2 "
            "--parallel.layers_per_stage=32",
            "--nodes=2 --parallel.tensor=4 --run.recompute=full",
        ),
        (
            "--config llama2-7b --instance trn1.2xlarge --parallel.tensor=2",
            "--nodes=8 --parallel.pipeline=4 --run.recompute=full",
        ),
        (
            f"{LARGE} --instance p4d.24xlarge --parallel.tensor=8 --run.backend=cuda",
            "--nodes=5 --parallel.pipeline=5",
        ),
        (
            "--config llama2-7b --nodes 4 --parallel.tensor=2 --parallel.data=64",
            "--parallel.tensor=8 --parallel.data=0",
        ),
    ],
)
def test_the_nearest_layout_fits_when_pasted(
    arguments: str, use: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 6
    said = capsys.readouterr().out.splitlines()
    assert said[-2] == f"nearest layout that fits: {use}"
    assert main([*arguments.split(), *use.split()]) == 0
    fits = capsys.readouterr().out
    memory, speed = said[-1].strip().split(", ")[:2]
    assert f"memory of a rank: {memory}, fits" in fits
    assert f"\n{speed} (" in fits


@pytest.mark.parametrize(
    ("arguments", "use"),
    [
        (
            f"{LARGE} --instance p5.48xlarge",
            "--nodes=2 --parallel.tensor=4 --parallel.pipeline=4",
        ),
        (
            f"{LARGE} --instance p5.48xlarge --parallel.layers_per_stage=80",
            "--nodes=4 --parallel.tensor=8",
        ),
        (
            "--config llama2-7b --instance rtx4090",
            "--nodes=8 --parallel.tensor=1 --parallel.pipeline=8 --run.recompute=full",
        ),
        ("--config demo --instance rtx4090", "--parallel.tensor=1"),
        (
            "--config llama2-7b --instance rtx4090 --run.backend=cuda",
            "--nodes=8 --parallel.tensor=1 --parallel.pipeline=8 --run.recompute=full",
        ),
        ("--config korean-chat-lora --instance p5.48xlarge", "--data.micro_batch=2"),
        (f"{LARGE} --nodes 32 --parallel.tensor=64", "--parallel.tensor=32"),
    ],
)
def test_a_layout_that_the_machine_cannot_have_names_the_nearest(
    arguments: str, use: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        main(arguments.split())
    assert str(error.value).endswith(f"; the nearest layout that fits is {use}")
    assert main([*arguments.split(), *use.split()]) == 0
    assert "fits" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"num_attention_heads=\d+; use [\d, or]*; and 2 more$"):
        main(["--config", "llama2-7b", "--parallel.tensor=3"])


def test_a_search_that_finds_nothing_names_the_nearest_layout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = [*LARGE.split(), "--nodes", "2", "--parallel.layers_per_stage=80"]
    assert main([*whole, "--search"]) == 6
    assert capsys.readouterr().out.splitlines()[-2] == "nearest layout that fits: --nodes=32"
    assert main([*whole, "--json"]) == 6
    near = json.loads(capsys.readouterr().out)["nearest"]
    assert (near["flags"], near["nodes"], near["fits"]) == (["--nodes=32"], 32, True)


def test_where_no_layout_fits_on_any_number_of_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "llama2-7b", "--instance", "trn1.2xlarge", "--parallel.tensor=2"]
    arguments += ["--parallel.layers_per_stage=32"]  # no pipeline divides it
    assert main(arguments) == 6
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "no layout fits on any number of such nodes: the smallest, tensor 2 on 1,024 nodes "
        "(micro-batch 1, recompute full) needs 21.8 GiB of 16 GiB, 12.6 GiB of it gradients"
    )
    assert main([*arguments, "--json"]) == 6
    assert json.loads(capsys.readouterr().out)["nearest"] is None
    assert main(["--config", "llama2-7b", "--ranks", "24", arguments[-1], "--search"]) == 6
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "no layout is valid on any number of such nodes"


def test_a_machine_that_is_too_small_for_any_layout_of_a_recipe() -> None:
    with pytest.raises(ConfigError) as error:
        main(["--config", "llama2-7b", "--instance", "rtx4090", "--parallel.layers_per_stage=32"])
    assert str(error.value).endswith(
        "; no layout whose tensor ranks share a node fits on any number of such nodes: the "
        "smallest, tensor 1 on 1,024 nodes (micro-batch 1, recompute full) needs 42.9 GiB of "
        "23.5 GiB, 25.1 GiB of it gradients"
    )


def test_fewer_nodes_where_more_cannot_share_the_batch() -> None:
    any_stages = load_config("llama2-7b", ["--data.global_batch=4"])
    # 5 nodes by five stages of 7,7,6,6,6 layers; 128 by 32 stages
    assert node_counts(any_stages, TRN1, 5) == [5, 8, 16, 32, 64, 128, 4, 2, 1]
    whole = ["--parallel.layers_per_stage=32"]
    config = load_config("llama2-7b", ["--data.global_batch=4", *whole])
    assert node_counts(config, TRN1, 5) == [4, 2, 1]
    assert node_counts(config, TRN1, 2) == [2, 4, 1]
    near = nearest(config, TRN1, 5)
    assert near is not None
    assert near.plan.nodes == 4
    assert near.flags[0] == "--nodes=4"


def test_no_smaller_change_leads_to_a_layout_that_fits() -> None:
    config = load_config("llama2-7b", ["--parallel.tensor=2", "--run.recompute=none"])
    near = nearest(config, TRN1, 4)
    assert near is not None
    assert near.flags == ("--parallel.tensor=8",)
    one_change = [
        each
        for each in search(config, TRN1, 4, stages=(config.parallel.zero,))[0]
        if each.memory.fits
        and (each.run.config.data.micro_batch, each.run.config.run.recompute) == (1, "none")
    ]
    best = max(one_change, key=lambda each: each.time.tokens_per_s)
    assert near.plan.time == best.time


def test_stages_that_differ_by_a_layer_fit_a_number_of_nodes_that_divides_no_layers() -> None:
    config, machine = load_config("llama2-7b"), load_machine("trn1.32xlarge")
    near = nearest(config, machine, 3)
    assert near is not None
    assert near.flags == (
        "--parallel.pipeline=3",
        "--parallel.layers_per_stage=11,11,10",
        "--run.recompute=full",
    )
    assert plan("llama2-7b", machine, 3, overrides=near.flags).time == near.plan.time
