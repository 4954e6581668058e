"""``llamax COMMAND``: version, help, commands and their nearest names."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.checkpoints import llama
from support.run_folders import make_run
from support.saving import saved

from llamax import __version__
from llamax.__main__ import COMMANDS, dispatch
from llamax.cli.options import Parser


def llamax(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "llamax", *argv], capture_output=True, text=True)


def test_version_and_help() -> None:
    assert llamax("--version").stdout == f"llamax {__version__}\n"
    shown = llamax("--help")
    assert shown.returncode == 0
    for name, (_, about) in COMMANDS.items():
        assert f"  {name:<13} {about}\n" in shown.stdout
    bare = llamax()
    assert (bare.returncode, bare.stdout) == (2, shown.stdout)
    assert llamax("help").stdout == llamax("help", "help").stdout == shown.stdout


@pytest.mark.parametrize("name", ["train", "plot"])
def test_help_with_a_command_is_the_help_of_the_command(name: str) -> None:
    assert llamax("help", name).stdout == llamax(name, "--help").stdout != ""


def test_help_with_an_unknown_command_is_refused() -> None:
    done = llamax("help", "trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean train?" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_plain_text_and_explains_every_option(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parsers, shown_by = list[Parser](), Parser.format_help
    monkeypatch.setattr(Parser, "format_help", lambda self: parsers.append(self) or shown_by(self))
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(COMMANDS[name][0]).main(["--help"])
    shown = capsys.readouterr().out
    assert f"llamax {name}" in shown
    assert "``" not in shown
    (parser,) = parsers
    assert str(parser.description)[0].isupper()
    assert [action.dest for action in parser._actions if not action.help] == []


def test_help_of_commands_needs_no_torch() -> None:
    code = """
import sys
from llamax.__main__ import COMMANDS, dispatch
from llamax.cli.options import Parser
for name in COMMANDS:
    try:
        dispatch([name, "--help"])
    except SystemExit as left:
        assert left.code == 0, name
    heavy = {"torch", "numpy", "tokenizers", "transformers", "matplotlib"} & {*sys.modules}
    assert not heavy, f"{name}: {heavy}"
"""
    # the setting of steady_heap, so that train does not start again
    environ = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environ)


def test_commands_that_only_look_need_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 12)
    checkpoint = saved(tmp_path / "saved", llama(), torch.bfloat16, 2)
    commands: list[tuple[list[str], list[str]]] = [
        (["plan", "--config", "tinyllama-1.1b"], ["torch", "numpy"]),
        (["plan", "--config", "tinyllama-1.1b", "--search"], ["torch", "numpy"]),
        (["watch", str(run), "--once"], ["torch", "numpy"]),
        (["report", str(run), "--out", str(tmp_path / "page.html")], ["torch"]),
        (["inspect", str(checkpoint)], ["torch", "tokenizers"]),
        (["inspect", str(checkpoint.parent)], ["torch", "tokenizers"]),
    ]
    code = f"""
import sys
from llamax.__main__ import dispatch
for words, heavy in {commands}:
    assert dispatch(words) == 0, words
    assert not {{*heavy}} & {{*sys.modules}}, words
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("options", [["--help"], ["--config", "no-such-recipe"]])
def test_the_training_program_needs_no_torch_before_its_configuration(options: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "llamax.train", *options],
        capture_output=True,
        text=True,
    )
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == (0 if options == ["--help"] else 2)
    assert "llamax.config.load" in names
    assert not names & {"torch", "numpy"}


def test_unknown_commands_are_refused_with_the_nearest() -> None:
    done = llamax("trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "llamax: 'trian' is not a command; did you mean train?\n"
    assert llamax("zzz").stderr == (
        f"llamax: 'zzz' is not a command; there are {', '.join(COMMANDS)}\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_program(name: str) -> None:
    assert importlib.util.find_spec(COMMANDS[name][0]) is not None


def test_a_command_gets_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sequence[str]] = []
    module = types.ModuleType("llamax_test_program")
    module.main = lambda argv: seen.append(argv) or 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(COMMANDS, "try", (module.__name__, "a program of this test"))
    assert dispatch(["try", "--a", "b"]) == 5
    assert seen == [["--a", "b"]]


def test_help_imports_the_standard_library_alone() -> None:
    code = (
        "import sys; before = set(sys.modules); from llamax.__main__ import dispatch; "
        "dispatch(['--help']); new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['llamax']"
