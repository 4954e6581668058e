"""[prepare] of a job file: the options of the real command, and what they would be refused for."""

from __future__ import annotations

import inspect
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.launch_jobs import TRICKS, job, read_by_kubernetes

from llamax.cli.options import IRREGULAR
from llamax.cli.prepare import parser
from llamax.data.prepare.pipeline import prepare
from llamax.data.prepare.row_samples import FIELDS
from llamax.launch.checks import problems
from llamax.launch.prepare import Fields, Prepare, command_line
from llamax.launch.render import render
from llamax.runtime.errors import ConfigError
from llamax.runtime.units import read_bytes

ROWS: dict[str, Any] = {
    "inputs": ["rows.jsonl", "--out=elsewhere"],
    "tokenizer": "-tokenizer",
    "template": TRICKS,
    "system": f"--out=x\n#SBATCH --nodes=9\n\t{TRICKS}",
    "fields": {"instruction": TRICKS, "answer": "-a"},
    "validation": 0.25,
    "validation_files": [TRICKS, "--b"],
    "test_files": ["c"],
    "split": "train[:10%]",
    "limit": 7,
    "drop_empty": True,
    "strict": True,
    "bos": False,
    "eos": True,
    "length": 2048,
    "max_document": "1.5 GiB",
    "workers": 3,
}


def parsed(words: list[str]) -> dict[str, Any]:
    """The options that the command reads from its arguments."""
    return vars(parser().parse_args(words))


def options_of(section: Prepare) -> dict[str, Any]:
    """The options that a section stands for, under the names of the command."""
    found = {each.name: getattr(section, each.name) for each in fields(section)}
    columns = found.pop("fields")
    pairs = [(each.name, getattr(columns, each.name)) for each in fields(columns)]
    found["field"] = [pair for pair in pairs if pair[1]]
    for name, option in IRREGULAR.items():
        if name in found:
            found[option.replace("-", "_")] = list(found.pop(name))
    found["inputs"] = list(section.inputs)
    found["tokenizer"] = section.tokenizer or None
    found["glob"] = list(section.glob) or None
    found["exclude"] = list(section.exclude)
    if section.max_document:
        found["max_document"] = read_bytes(section.max_document)
    else:
        found["max_document"] = parser().get_default("max_document")
    return found


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8)
NAMES = st.lists(TEXT, max_size=3).map(tuple)
CHOICES = {
    "train_tokenizer": st.just(0),
    "glob": NAMES,
    "exclude": NAMES,
    "validation": st.floats(0, 1, exclude_max=True),
    "bos": st.sampled_from([None, True, False]),
    "eos": st.sampled_from([None, True, False]),
    "format": st.sampled_from(["llamax", "megatron"]),
    "workers": st.integers(1, 99),
    "max_document": st.sampled_from(["", "64MiB", "2GB", "1.5 GiB"]),
    "length": st.integers(0, 9999),
    "limit": st.integers(0, 9999),
    "strict": st.booleans(),
    "drop_empty": st.booleans(),
    "validation_files": NAMES,
    "test_files": NAMES,
    "inputs": st.lists(TEXT, min_size=1, max_size=3).map(tuple),
    "fields": st.builds(Fields, **dict.fromkeys(FIELDS, st.one_of(st.just(""), TEXT))),
    **dict.fromkeys(("tokenizer", "key", "template", "system", "split"), TEXT),
}


@settings(max_examples=200)
@given(st.fixed_dictionaries(CHOICES), TEXT)
def test_the_command_reads_what_the_section_says(values: dict[str, Any], out: str) -> None:
    section = Prepare(**values)
    assert parsed(command_line(section, out)) == options_of(section) | {"out": out}


def test_a_section_with_nothing_but_the_inputs_is_the_command_with_its_defaults() -> None:
    section = Prepare(inputs=("a",), tokenizer="t", workers=1)
    assert command_line(section, "o") == ["--out=o", "--workers=1", "--tokenizer=t", "--", "a"]
    plain = parsed(["a", "--out", "o", "--tokenizer", "t", "--workers", "1"])
    assert options_of(section) | {"out": "o"} == plain
    trained = Prepare(inputs=("a",), train_tokenizer=512)
    assert parsed(command_line(trained, "o"))["train_tokenizer"] == 512


def test_every_option_of_prepare_is_a_key() -> None:
    keys = {each.name for each in fields(Prepare)}
    assert keys == set(inspect.signature(prepare).parameters) - {"out"} | {"length"}
    assert [each.name for each in fields(Fields)] == list(FIELDS)


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "slurm", "k8s"])
def test_a_rendered_phase_gives_the_command_these_options(tmp_path: Path, launcher: str) -> None:
    """The script runs with a python3 that writes its arguments."""
    this = job(prepare=ROWS, mpirun__hostfile="")
    assert problems(this, launcher, "prepare") == []
    text = render(this, launcher, "prepare")
    if launcher == "k8s":
        (container,) = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"]
        text = read_by_kubernetes(container["command"][2])
    fake = tmp_path / "bin"
    fake.mkdir()
    for name in ("srun", "python3"):
        (fake / name).write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >{tmp_path}/arguments\n')
        (fake / name).chmod(0o755)
    text = text.replace("cd -- /fsx/llama", f"cd -- {tmp_path}\nPATH={fake}:$PATH")
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "arguments").read_text().split("\0")[:-1]
    words = words[words.index("prepare") + 1 :]
    assert parsed(words) == options_of(this.prepare) | {"out": "tokens/llama2"}
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": []}, "prepare.inputs is empty; set it to the text files, rows or folders"),
        ({"inputs": ["a", ""]}, "prepare.inputs has an empty name; use '.' for the working"),
        ({"train_tokenizer": 512}, "prepare.tokenizer and prepare.train_tokenizer are both set"),
        ({"tokenizer": ""}, "prepare.tokenizer is empty; set it to a tokenizer.model, tokenizer"),
        ({"max_document": "much"}, "prepare.max_document: 'much' is not a size such as 64MiB or"),
        ({"max_document": "0.1"}, "prepare.max_document='0.1' is below one byte"),
        (
            {"template": "alpaca", "format": "megatron"},
            "prepare.format=megatron cannot store which tokens are answers; remove it, or",
        ),
        ({"template": "alpaca", "glob": ["*.py"]}, "prepare.glob is for text; remove it"),
        ({"template": "alpaca", "exclude": ["x"]}, "prepare.exclude is for text; remove it"),
        ({"system": "S"}, "prepare.system is for rows, which prepare.template asks for; remove"),
        ({"fields": {"answer": "a"}}, "prepare.fields is for rows, which prepare.template asks"),
        ({"drop_empty": True}, "prepare.drop_empty is for rows, which prepare.template asks for"),
    ],
)
def test_what_the_command_would_refuse_is_refused_before(
    changes: dict[str, Any], message: str
) -> None:
    section = {"inputs": ["a"], "tokenizer": "t", **changes}
    (found,) = problems(job(prepare=section), "slurm", "prepare")
    assert message in found
    assert problems(job(prepare=section), "slurm", "train") == []


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"templat": "a"}, "prepare.templat is an unknown key; did you mean template?"),
        ({"fields": {"question": "q"}}, "prepare.fields.question is an unknown key"),
        ({"fields": "q"}, "prepare.fields='q' is a string; write it as a section [prepare.fields]"),
        ({"format": "megatorn"}, 'prepare.format="megatorn" is unknown; write llamax or megatron'),
        ({"validation": 1}, "prepare.validation=1.0 is out of range; use 0 or more and below 1"),
        ({"bos": "yes"}, 'prepare.bos="yes" is a string; write true or false'),
        ({"system": "a\x1b[2J"}, "prepare.system='a\\x1b[2J' holds a control character"),
        ({"template": "a\nb"}, "prepare.template='a\\nb' holds a control character"),
    ],
)
def test_the_section_is_strict(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        job(prepare=section)
    assert message in str(refused.value)


@pytest.mark.parametrize("blend", ["0.7 web 0.3 books", "1. web 2 books", "1e-1 web 9E-1 books"])
def test_a_blend_cannot_be_prepared(blend: str) -> None:
    this = job(overrides__data__path=blend)
    assert problems(this, "slurm", "train") == []
    (found,) = problems(this, "slurm", "prepare")
    assert found.startswith(f"data.path={blend!r} is a blend; prepare writes one dataset")


def test_random_tokens_are_trained_on_and_not_prepared() -> None:
    this = job(overrides__data__path="random")
    assert problems(this, "slurm", "train") == []
    (found,) = problems(this, "slurm", "prepare")
    assert found.startswith("data.path=random names tokens that training makes itself; use over")
    (found,) = (each for each in problems(this, "sagemaker", "train") if "data.path" in each)
    assert found.startswith("data.path=random, but jobs on SageMaker train on sagemaker.data")
