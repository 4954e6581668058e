"""The README is executed: its library example and its commands; it is short."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from llamax.__main__ import COMMANDS
from llamax.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_library_example_runs(tmp_path: Path, ranks: int) -> None:
    code = block("python")
    script = tmp_path / "step.py"
    script.write_text(code if ranks > 1 else code.replace("tp=2", "tp=1"))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(script)],
        env=environ,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(re.findall(r"rank \d: loss \d\.\d+, gradient norm \d\.\d+", done.stdout))
    assert len(lines) == ranks
    norms = {line.rpartition(" ")[2] for line in lines}
    assert len(norms) == 1, "all ranks clip alike"
    if ranks == 4:
        losses = [line.split()[3] for line in lines]
        assert losses[0] == losses[1]
        assert losses[2] == losses[3]
        assert losses[0] != losses[2]


def test_every_command_and_option_exists(capsys: pytest.CaptureFixture[str]) -> None:
    commands = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    for name, line in re.findall(r"^llamax (\w+) ([^#\n]*)", commands, re.MULTILINE):
        with suppress(SystemExit):  # argparse's way of ending
            assert importlib.import_module(COMMANDS[name][0]).main(["--help"]) == 0
        helped = capsys.readouterr().out
        for option in re.findall(r"--[\w-]+", line):
            assert option in helped, f"llamax {name} has no {option}"


def test_every_setting_exists() -> None:
    for override in re.findall(r"--[a-z]+\.[a-z0-9_]+=[^`\s]+", README):
        load_config("demo", ["--checkpoint.init_from=hub", override])


def test_it_is_short_and_names_five_files() -> None:
    assert len(README.splitlines()) < 110
    first = README.partition("## Read these five files first")[2].partition("\n## ")[0]
    files = re.findall(r"^\d\. \[(\S+)\]\((\S+)\):", first, re.MULTILINE)
    assert len(files) == 5
    for name, target in files:
        assert name == target
        assert (ROOT / target).is_file()


def test_the_makefile_has_the_two_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", block("sh"), re.MULTILINE):
        assert f"\n{target}:" in makefile
