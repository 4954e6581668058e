"""The length that a plan prices, and where it comes from."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from support.tiny_run import make_dataset

from llamax.cli.options import number
from llamax.cli.plan import main
from llamax.config.hardware import load_machine
from llamax.config.load import load_config
from llamax.runtime.errors import ConfigError
from llamax.tools.plan import plan

TEXT = ["--config", "llama2-7b", "--nodes", "4"]  # 1024 x 4096 tokens a step
ROWS = ["--config", "dolly-llama2-7b", "--data.path=nowhere"]  # 64 samples a step, 3 epochs


@pytest.mark.parametrize(
    ("arguments", "steps", "origin"),
    [
        (TEXT, 480_000, "run.steps=480,000"),
        ([*TEXT, "--run.steps=7"], 7, "run.steps=7"),
        ([*TEXT, "--steps", "100"], 100, "--steps=100"),
        ([*TEXT, "--tokens", "300B"], 71_526, "--tokens=300,000,000,000, up to a whole step"),
        ([*TEXT, "--tokens", "1"], 1, "--tokens=1, up to a whole step"),
        ([*TEXT, "--samples", "1M"], 977, "--samples=1,000,000"),
        (ROWS, 1000, "assumed, run.steps=1,000"),
        ([*ROWS, "--samples=15011"], 704, "run.epochs=3 of --samples=15,011"),
        ([*ROWS, "--samples=15011", "--epochs=1"], 235, "--epochs=1 of --samples=15,011"),
        ([*ROWS, "--samples=15011", "--run.epochs=2"], 470, "run.epochs=2 of --samples=15,011"),
        ([*ROWS, "--tokens=131072"], 1, "--tokens=131,072, up to a whole step"),
    ],
)
def test_time_and_cost_follow_the_length(
    arguments: list[str], steps: int, origin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f" in {steps:,} step{'s' if steps > 1 else ''}" in said
    assert f"\nlength: {origin}\n" in said
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == steps
    assert found["run_s"] == pytest.approx(steps * found["step_s"]["total"])
    price = load_machine(found["instance"]).dollars_per_hour * found["nodes"]
    assert found["dollars"] == pytest.approx(found["run_s"] / 3600 * price)
    assert main([*arguments, "--search", "--json"]) == 0
    assert {each["steps"] for each in json.loads(capsys.readouterr().out)["layouts"]} == {steps}


def test_epochs_of_a_data_set_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = make_dataset(tmp_path)
    sized = ["--data.sequence_length=32", "--data.global_batch=8", f"--data.path={dataset}"]
    arguments = ["--config", "demo", "--instance", "trn1.2xlarge", *sized]
    assert main([*arguments, "--epochs=2"]) == 0
    said = capsys.readouterr().out
    (samples,) = [line for line in said.splitlines() if line.startswith("length: --epochs=2 of ")]
    counted = int(samples.split(" of ")[1].split()[0].replace(",", ""))
    assert f" in {-(-2 * counted // 8):,} steps (2 x {counted:,} samples)" in said
    assert samples.endswith(f" samples in {dataset}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps=1", "--tokens=1"], "--steps and --tokens both give the length; use one of them"),
        (["--tokens=1", "--epochs=1"], "--tokens and --epochs both give the length"),
        (["--tokens=1", "--samples=1"], "--tokens and --samples both give the length"),
        (["--steps=1", "--samples=1", "--epochs=1"], "--steps and --epochs both give the length"),
        (["--tokens=1", "--run.steps=1"], "--tokens and --run.steps both give the length"),
        (["--epochs=1", "--run.epochs=1"], "--epochs and --run.epochs both give the length"),
        (["--samples=1", "--run.steps=1"], "--samples and --run.steps both give the length"),
        (["--tokens=0"], "--tokens=0 is out of range; use 1 or more"),
        (["--epochs=2", "--data.path=nowhere"], "--epochs=2 needs the samples of an epoch: nowh"),
        (["--epochs=2", "--data.path=nowhere"], "and no nowhere.idx; give --samples as well"),
    ],
)
def test_a_length_that_is_given_twice_or_unknown(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        main([*TEXT, *arguments])
    assert said in str(error.value)


def test_the_library_takes_the_same_lengths() -> None:
    config = load_config("llama2-7b")
    assert plan(config, nodes=4, tokens=3 * 2**22).run.steps == 3
    assert plan("llama2-7b", nodes=4, steps=5).length == "`steps=5`"
    with pytest.raises(ConfigError, match="`steps` and `tokens` both give the length"):
        plan(config, nodes=4, steps=5, tokens=3)


def test_numbers_with_suffixes() -> None:
    texts = ["2000", "15_000", "1.5K", "300B", "2t", "3e11", "1.25e2", ".5M"]
    found = [2000, 15_000, 1500, 3 * 10**11, 2 * 10**12, 3 * 10**11, 125, 500_000]
    assert [number(each) for each in texts] == found
    for text in ("", "3x", "0.5", "1e-3", "-1", "1e999", "B", "1.0001K"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number such as"):
            number(text)
