"""Mistakes on a command line: one line, exit code 2, and what to write instead."""

from __future__ import annotations

import pytest

from llamax.__main__ import dispatch
from llamax.cli import train
from llamax.runtime.process import run_main

LAST = "a name that begins with - stands last, after --"


@pytest.mark.parametrize(
    ("words", "problem", "hint"),
    [
        ("inspect -x.txt", "arguments are required: path", f"{LAST}: llamax inspect ... -- -x.txt"),
        ("inspect run -x.txt", "unrecognized arguments: -x.txt", LAST),
        ("merge a b -c --out o", "unrecognized arguments: -c", "merge ... -- -c"),
        ("generate hub --prompt -hi", "--prompt: expected one argument", "sign: --prompt=-hi"),
        ("generate hub --prompt", "expected one argument", "generate --help lists the options"),
        ("generate hub --max-tokens 3", "unrecognized arguments", "did you mean --max-new-tokens?"),
        ("generate hub --prompt --greedy", "expected one argument", "--help lists the options"),
        ("inspect run --zzz=1", "unrecognized arguments", "--help lists the options"),
        ("inspect", "arguments are required: path", "llamax inspect --help lists the options"),
        ("inspect --jsom -- -x.txt", "unrecognized arguments: --jsom", "did you mean --json?"),
        ("serve hub --quantize int4", "invalid choice: 'int4'", "serve --help lists the options"),
        ("serve hub --quantise int8", "unrecognized arguments", "did you mean --quantize?"),
        ("launch --jobs j.toml --on k8s", "are required: --job", "did you mean --job?"),
        ("doctor --config demo", "unrecognized arguments: --config demo", "and give --job FILE"),
        ("launch --config=demo --on k8s", "are required: --job", 'recipe = "NAME"'),
        ("plan --job job.toml", "are required: --config", "launch and doctor; give --config REC"),
        ("inspect run --config=j", "unrecognized arguments: --config=j", "inspect --help lists"),
        ("plan llama2-7b", "arguments are required: --config", "did you mean --config llama2-7b?"),
        ("audit demo --nodes 2", "are required: --config", "did you mean --config demo?"),
        ("doctor job.toml", "unrecognized arguments: job.toml", "did you mean --job job.toml?"),
        ("plan demo --config", "--config: expected one argument", "plan --help lists the options"),
        ("launch k8s --job j --on k8s", "unrecognized arguments: k8s", "launch --help lists the"),
        ("launch job.toml --on k8s", "are required: --job", "did you mean --job job.toml?"),
        ("plan", "arguments are required: --config", "llamax plan --help lists the options"),
    ],
)
def test_one_line_with_a_hint(
    words: str, problem: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        dispatch(words.split())
    line = capsys.readouterr().err
    assert end.value.code == 2
    assert line.startswith(f"llamax {words.split()[0]}: ")
    assert line.count("\n") == 1
    assert problem in line
    assert hint in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config demo --rank 2", "--rank is an unknown option; did you mean --ranks?"),
        ("--rank 2", "--rank is an unknown option; did you mean --ranks?"),
        ("--confg demo", "--confg is an unknown option; did you mean --config?"),
        ("--config demo --precompil", "--precompil is an unknown option; did you mean --precompil"),
        (
            "my.toml --ranks 2",
            "--config is missing; give a recipe's name or a TOML file; did you mean "
            "--config my.toml?\n",
        ),
        (
            "--config demo --ranks -2",
            "argument --ranks: '-2' is not a whole number such as 2000, "
            "300B or 3e11; llamax train --help",
        ),
        ("--ranks 2", "--config is missing; give a recipe's name or a TOML file; llamax train --h"),
    ],
)
def test_a_mistake_in_an_option_of_train(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        train.main(words.split())
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"llamax train: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "prepare x --out o --tokenizer t --template dolly --field answer=a --field answer=b",
            "--field answer is a and b; give it once",
        ),
        ("evaluate hub --test-file x --field answer=a --field answer=b", "--field answer is a and"),
        ("generate hub --field answer=a --field answer=b", "--field answer is a and b; give it on"),
        ("generate hub --greedy --top-p 0.5", "--greedy draws nothing, and --top-p is of drawing"),
        ("generate hub --greedy --temperature 1", "--greedy draws nothing, and --temperature is"),
    ],
)
def test_options_that_contradict_each_other(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(dispatch, words.split()) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"llamax: {message}")
    assert line.count("\n") == 1


def test_a_name_after_two_dashes_is_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    from llamax.cli.inspect import parser

    assert parser().parse_args(["--json", "--", "-x.txt"]).path == "-x.txt"
    assert not capsys.readouterr().err
