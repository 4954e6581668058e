"""The size of the largest program that a run compiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.runs import on_mesh

from llamax.cli.plan import main
from llamax.config.hardware import load_machine
from llamax.config.load import load_config
from llamax.parallel.mesh import Mesh
from llamax.tools.plan import plan, search
from llamax.tools.plan.nearest import nearest
from llamax.tools.plan.program import largest_program
from llamax.tools.plan.report import LARGE

TRN1 = load_machine("trn1.32xlarge")
INSTRUCTION = 2 * 128 * 128 * 512  # FLOPs
LAYER = 2 * 4096 * (4 * 4096 + 3 * 11008) // 8  # of Llama-2-7B, a token and a rank of tensor 8
HEAD = 2 * 4096 * 32000 // 8
SCORES = 2 * 4096 * 512  # 4,096 tokens seen by half, 4 heads of 128


def test_the_program_of_llama2_7b_by_hand() -> None:
    """A microstep as published: tensor 8, 4,096 tokens, nothing recomputed."""
    flops = 4096 * (32 * (3 * LAYER + 3.5 * SCORES) + 3 * HEAD)
    assert plan("llama2-7b", TRN1, 4).program == flops / INSTRUCTION == pytest.approx(1.33e6, 0.01)


def test_stages_and_chunks_make_programs_smaller_by_hand() -> None:
    config = load_config("llama2-7b", ["--run.recompute=full"])
    chunks = replace(config, parallel=replace(config.parallel, chunks=2))
    down = 2 * 4096 * 11008 // 8
    # of a microbatch: forward, forward again but for the last product, and backward
    chunk = 4 * (4 * LAYER - down + 4.5 * SCORES)
    found = largest_program(on_mesh(chunks, Mesh(tp=8, pp=4, ends=True)), TRN1)
    assert found == 4096 * (chunk + 3 * HEAD) / INSTRUCTION
    stage = 8 * (4 * LAYER - down + 4.5 * SCORES)
    found = largest_program(on_mesh(config, Mesh(tp=8, pp=4)), TRN1)
    assert found == 4096 * (stage + 3 * HEAD) / INSTRUCTION


def test_a_frozen_base_needs_fewer_products() -> None:
    whole, tuned = (
        plan("llama2-7b", TRN1, 4, overrides=more).program
        for more in ([], ["--finetune.method=lora", "--checkpoint.init_from=base"])
    )
    assert 0.6 * whole < tuned < 0.75 * whole


def test_a_machine_without_a_compiler_has_no_limit() -> None:
    gpus = load_machine("p5.48xlarge")
    found = plan("llama2-7b", gpus, 1, overrides=["--run.backend=cuda", "--data.micro_batch=8"])
    assert found.program > 5e6
    assert not found.large


def test_a_large_program_is_said_and_stands_behind_smaller_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    large = ["--parallel.tensor=4", "--run.recompute=full", "--data.micro_batch=1"]
    arguments = ["--config", "llama3.1-8b", "--nodes", "32"]
    assert main([*arguments, *large]) == 0, "it fits; the compiler may refuse it"
    shown = capsys.readouterr().out
    assert "largest program: 7.92M instructions for products, of 5M for all, large" in shown
    assert f"note: {LARGE}" in shown

    assert main([*arguments, "--search"]) == 0
    found = capsys.readouterr().out.splitlines()
    rows = found[2:12]
    assert not any("large" in row for row in rows)
    (line,) = (line for line in found if "faster but large is " in line)
    assert LARGE in found
    changes = line.partition(" is ")[2].split()
    assert main([*arguments, *changes]) == 0
    assert "for all, large" in capsys.readouterr().out


def test_a_machine_whose_compiler_takes_more_gets_the_faster_layout() -> None:
    config = load_config("llama3.1-8b")
    patient = replace(TRN1, program_instructions=100_000_000)
    careful, fast = (search(config, machine, 32)[0][0] for machine in (TRN1, patient))
    assert careful.program < 5e6 < fast.program
    assert careful.time.tokens_per_s < fast.time.tokens_per_s


def test_the_nearest_layout_has_small_programs_where_there_are_some() -> None:
    over = ["--parallel.tensor=1", "--run.recompute=none", "--parallel.zero=1"]
    config = load_config("llama3.1-8b", over)
    near = nearest(config, TRN1, 32)
    assert near is not None
    assert near.fits
    assert not near.plan.large
