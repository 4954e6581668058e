"""``llamax plan``: text, JSON, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llamax.cli.plan import DOES_NOT_FIT, main
from llamax.config.hardware import (
    load_machine,
    machine_names,
)
from llamax.runtime.errors import ConfigError

# --- the program ---------------------------------------------------------------------------------


def test_a_plan_is_printed_without_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "llamax", "plan", "--config", "llama2-7b"]
    done = subprocess.run([*command, "--nodes", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].split(".")[0].strip() for line in done.stderr.splitlines()}
    assert "llamax" in imported
    assert not imported & {"torch", "transformers"}
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


def test_json_holds_what_the_text_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "llama2-7b", "--nodes", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = {k: v for k, v in found["memory_bytes"].items() if k not in ("peak", "available")}
    assert found["memory_bytes"]["peak"] == pytest.approx(sum(lines.values()))
    steps = {k: v for k, v in found["step_s"].items() if k != "total"}
    assert found["step_s"]["total"] == pytest.approx(sum(steps.values()))
    assert found["parallel"] == {"tensor": 8, "context": 1, "pipeline": 1, "data": 16}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parallel.tensor=3"], "parallel.tensor=3 does not divide model.num_attention_heads=32"),
        (["--parallel.tensor=3"], "and 2 more"),
        (["--instance", "trn3"], "--instance trn3 is neither a TOML file nor a machine that is"),
        (["--instance", "trn3"], "known; did you mean trn2?"),
        (
            ["--nodes", "2", "--parallel.tensor=16", "--parallel.context=4"],
            "parallel.tensor=16 x parallel.context=4 does not divide a node of 32 ranks",
        ),
        (["--nodes", "2", "--ranks", "4"], "parallel.tensor=8 does not divide a node of 4 ranks"),
        (["--nodes", "0"], "--nodes=0 is out of range"),
        (["--ranks", "-1"], "--ranks=-1 is out of range"),
        (["--dollars-per-hour", "-3"], "--dollars-per-hour=-3 is out of range; use 0 or more"),
        (["--dollars-per-hour", "nan"], "--dollars-per-hour=nan is out of range; use 0 or more"),
        (["--ranks", "64"], "--ranks=64 is more than the 32 devices of trn1.32xlarge"),
        (
            ["--data.global_batch=7"],
            "(planned for trn1.32xlarge; choose another machine with --inst",
        ),
        (
            ["--config", "demo"],
            "(planned for cpu; choose another machine with --instance, or more ranks with --ranks)",
        ),
        (["--instance", "absent.toml"], "absent.toml: no such file; check the path"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        main(["--config", "llama2-7b", *arguments])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_every_known_machine_plans(capsys: pytest.CaptureFixture[str]) -> None:
    for name in machine_names()[1:]:
        tensor = min(load_machine(name).ranks, 2)
        main(["--config", "llama3.2-1b", "--instance", name, f"--parallel.tensor={tensor}"])
        assert name in capsys.readouterr().out
    assert load_machine("h100").name == "p5.48xlarge"


def test_a_machine_without_a_price_is_not_called_free(capsys: pytest.CaptureFixture[str]) -> None:
    unpriced = ["--config", "korean-chat-qlora-24gb", "--instance", "rtx3090"]
    main(unpriced)
    out = capsys.readouterr().out
    assert "no price known: set --dollars-per-hour" in out
    assert "$" not in out
    main([*unpriced, "--dollars-per-hour", "0.5"])
    assert "at $0.50 an hour" in capsys.readouterr().out


def test_notes_name_what_slows_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config", "llama2-7b", "--nodes", "4", "--instance", "h100"])
    assert "note: run.backend=xla, but p5.48xlarge needs --run.backend=cuda" in (
        capsys.readouterr().out
    )
    main(["--config", "llama2-7b", "--nodes", "4"])
    assert "note: attention is planned with llamax's NKI kernels" in capsys.readouterr().out
    main(["--config", "llama2-7b", "--nodes", "4", "--data.sequence_length=4032"])
    assert "note: attention computes every pair of tokens" in capsys.readouterr().out


def test_ranks_of_gpus_that_span_nodes_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    gpus = ["--config", "llama2-7b", "--instance", "p5.48xlarge", "--nodes", "2"]
    assert main([*gpus, "--parallel.tensor=16"]) == 0
    note = "note: tensor ranks span nodes of 8 ranks, and the network carries their messages"
    said = capsys.readouterr().out
    assert note in said
    assert "parallel.tensor=1, 2, 4 or 8 would not" in said
    assert main([*gpus, "--parallel.tensor=8"]) == 0
    assert "span nodes" not in capsys.readouterr().out


def test_a_smaller_zero_stage_is_noted_with_its_margin(capsys: pytest.CaptureFixture[str]) -> None:
    node = ["--config", "llama3.2-1b", "--parallel.zero=2"]
    assert main([*node, "--parallel.tensor=2"]) == 0
    assert "; parallel.zero=1 fits too, tight\n" in capsys.readouterr().out
    assert main([*node, "--parallel.tensor=4"]) == 0
    assert "; parallel.zero=1 fits too\n" in capsys.readouterr().out
