"""What does not fit in a configuration is named, all of it at once, with its place and remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.refused_config import SHAPE, refused

from llamax.config.load import (
    RECIPES,
    find_config,
    load_config,
    parse_config,
)
from llamax.config.schema import Config
from llamax.config.toml import tomllib
from llamax.config.types import (
    options,
)
from llamax.runtime.errors import ConfigError


@pytest.mark.parametrize(
    ("tables", "overrides", "lines"),
    [
        (
            {},
            ["--model.hidden_sise=8"],
            ["--model.hidden_sise is an unknown option; did you mean model.hidden_size?"],
        ),
        ({}, ["--lr=1"], ["--lr is an unknown option; did you mean optim.lr?"]),
        ({}, ["--qqqq=1"], ["--qqqq is an unknown option; see --help"]),
        ({}, ["--run.steps"], ["--run.steps has no value; write --run.steps=value"]),
        (
            {},
            ["--run.steps", "--run.seed=1"],
            ["--run.steps has no value; write --run.steps=value"],
        ),
        ({}, ["run.steps=3"], ["'run.steps=3' is not an option; write --section.key=value"]),
        ({}, ["--run.steps=ten"], ['run.steps="ten" is a string; write an integer']),
        ({}, ["--run.steps=1.5"], ["run.steps=1.5 is a float; write an integer"]),
        ({}, ["--run.steps=true"], ["run.steps=true is a truth value; write an integer"]),
        ({}, ["--optim.lr=fast"], ['optim.lr="fast" is a string; write a number']),
        ({}, ["--optim.lr=true"], ["optim.lr=true is a truth value; write a number"]),
        ({}, ["--parallel.sequence=1"], ["parallel.sequence=1 is an integer; write true or false"]),
        (
            {},
            ["--parallel.sequence=yes"],
            ['parallel.sequence="yes" is a string; write true or false'],
        ),
        ({}, ["--parallel.zero=true"], ["parallel.zero=true is a truth value; write an integer"]),
        (
            {},
            ["--run.backend=tpu"],
            ['run.backend="tpu" is unknown; write cpu, cuda, xla or neuron'],
        ),
        (
            {},
            ["--model.eos_token_id=[1.5]"],
            ["model.eos_token_id=[1.5] is a list; write an integer or a list of integers"],
        ),
        ({}, ["--run.steps={}"], ["run.steps={} is a table; write an integer"]),
        (
            {},
            ["--run.steps=1979-05-27"],
            ['run.steps="1979-05-27" is a date or time; write an integer'],
        ),
        (
            {},
            [f"--optim.lr={10**400}"],
            [f"optim.lr={10**400} is an integer; write a number"],
        ),
        (
            {},
            ["--optim.lr=" + "1" * 5000],
            ['optim.lr="' + "1" * 5000 + '" is a string; write a number'],
        ),
        ({"run": {"folder": 3}}, [], ["run.folder=3 is an integer; write a string"]),
        (
            {"modle": {}},
            [],
            ["modle is an unknown section; did you mean model?"],
        ),
        (
            {"zzz": 1},
            [],
            [
                "zzz is an unknown section; there are model, parallel, optim, data, checkpoint, "
                "finetune, run"
            ],
        ),
        ({"optim": {"beta_1": 0.9}}, [], ["optim.beta_1 is an unknown key; did you mean beta1?"]),
        (
            {"run": {"backend": "tpu", "stepss": 1}},
            [],
            [
                "run.stepss is an unknown key; did you mean steps?",
                'run.backend="tpu" is unknown; write cpu, cuda, xla or neuron',
            ],
        ),
        ({"optim": 3}, ["--optim.lr=1"], ["optim=3 is an integer; write it as a section [optim]"]),
        (
            {"model": {**SHAPE, "rope_scaling": {"type": "x"}}},
            [],
            [
                "model.rope_scaling.type is an unknown key; there are factor, low_freq_factor, "
                "high_freq_factor, original_max_position_embeddings"
            ],
        ),
        (
            {"model": {k: v for k, v in SHAPE.items() if k != "vocab_size"}},
            [],
            ["model.vocab_size is missing; write an integer"],
        ),
    ],
)
def test_what_does_not_fit_is_named_with_the_remedy(
    tables: dict[str, Any], overrides: list[str], lines: list[str]
) -> None:
    assert refused({"model": SHAPE, **tables}, *overrides) == lines


def message(name: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(str(name), overrides)
    return str(error.value)


def test_an_error_names_where_its_values_come_from(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text((RECIPES / "demo.toml").read_text().replace("\nsteps =", "\nstepz ="))
    assert message(path).startswith(f"{path}: run.stepz is an unknown key")
    path.write_text(re.sub(r"(?m)^min_lr = .*", "min_lr = 9", (RECIPES / "demo.toml").read_text()))
    assert message(path).startswith(f"{path}: optim.min_lr=9.0 is above optim.lr=")
    assert message(path, "--optim.lr=8").startswith(
        f"{path} with --optim.lr=8: optim.min_lr=9.0 is above optim.lr=8.0; "
    )
    assert message("demo", "--optim.min_lr=9").startswith(
        "recipe demo with --optim.min_lr=9: optim.min_lr=9.0 is above optim.lr="
    )
    assert message("demo", "--optim.lr=8", "--optim.min_lr=9").startswith("command line: optim.")
    assert message("demo", "--run.sede=1").startswith("command line: --run.sede is an unknown")
    assert message("demo", "--run.seed=x").startswith('command line: run.seed="x" is a string')
    assert message("demo", "--run.seed=x", "--optim.min_lr=9").splitlines()[:2] == [
        "recipe demo: 2 problems",
        '  command line: run.seed="x" is a string; write an integer',
    ]


def test_all_problems_come_at_once() -> None:
    tables = {"model": {**SHAPE, "vocab_size": "many"}, "dat": {}, "run": {"step": 3, "seed": -1}}
    assert refused(
        tables, "--optim.lr=x", "--parallel.tensor=16", "--optim.warmup_ratio=2", "--n"
    ) == [
        "--n has no value; write --n=value",
        "dat is an unknown section; did you mean data?",
        "run.step is an unknown key; did you mean steps?",
        'model.vocab_size="many" is a string; write an integer',
        'optim.lr="x" is a string; write a number',
        "optim.warmup_ratio=2.0 is out of range; use 0 or more and below 1",
        "run.seed=-1 is out of range; use 0 or more",
        "parallel.tensor=16 does not divide model.num_attention_heads=8; use 1, 2, 4 or 8",
    ]
    assert refused({"model": SHAPE, "run": {"steps": -1}}, "--optim.lrr=1") == [
        "--optim.lrr is an unknown option; did you mean optim.lr?",
        "run.steps=-1 is out of range; use 1 or more",
    ]
    assert refused({"model": SHAPE, "optim": {"min_lr": 1, "lr": 0}, "run": {"steps": -1}}) == [
        "optim.lr=0.0 is out of range; use a number above 0",
        "run.steps=-1 is out of range; use 1 or more",
    ]
    assert refused({}) == [
        "model is missing; write a section with hidden_size, intermediate_size, "
        "num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size"
    ]


KEYS = [option.key for option in options(Config)]


@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_another_type_is_reported_once(key: str) -> None:
    """What stands in for it breaks no rule, and hides no other mistake."""
    recipe = tomllib.loads(find_config("demo").read_text())
    section, name = key.rsplit(".", 1)
    table = recipe
    for part in section.split("."):
        table = table.setdefault(part, {})
    table[name] = [[1]]
    broken = "run.log_every" if key != "run.log_every" else "run.steps"
    with pytest.raises(ConfigError) as raised:
        parse_config(recipe, [f"--{broken}=-1"], 4)
    _, first, second = str(raised.value).splitlines()
    assert first.strip().startswith(f"{key}=[[1]] is a list; write ")
    assert second.strip() == f"command line: {broken}=-1 is out of range; use 1 or more"


@pytest.mark.parametrize("section", ["model", "parallel", "optim", "data", "checkpoint", "run"])
def test_a_section_without_a_value_is_reported_once(section: str) -> None:
    recipe = tomllib.loads(find_config("demo").read_text()) | {
        section: "x",
        "finetune": 3,
    }
    with pytest.raises(ConfigError) as raised:
        parse_config(recipe, [], 4)
    assert sorted(line.split("=")[0].strip() for line in str(raised.value).splitlines()[1:]) == (
        sorted(("finetune", section))
    )


@pytest.mark.timeout(120)
def test_a_file_with_very_many_unknown_keys_is_refused_soon(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[run]\n" + "".join(f"steps{number} = 1\n" for number in range(100_000)))
    with pytest.raises(ConfigError, match=r"problems\n  run\.steps0 is an unknown key") as error:
        load_config(str(path))
    assert re.search(r"\n  and 999\d\d more$", str(error.value))
