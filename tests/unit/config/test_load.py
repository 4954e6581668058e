"""TOML and overrides: what is read, what is refused and how, and that writing loses nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamax.config.load import (
    RECIPES,
    dump_config,
    find_config,
    help_text,
    load_config,
    parse_config,
    recipes,
)
from llamax.config.schema import Config, sections
from llamax.config.toml import Problems, build, tomllib
from llamax.config.types import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    SpikeWindow,
    StateBits,
    ZeroStage,
    descriptions,
    options,
    type_hints,
)
from llamax.runtime.errors import ConfigError
from llamax.training.library import config_of

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 101,
}


ORIGIN = re.compile(r"^(configuration( with (--[\w.]+=.*? ?)+)?|command line): (?=\S)", re.S)


def refused(tables: dict[str, Any], *overrides: str) -> list[str]:
    """The lines of the one error that ``parse`` raises, without where it was."""
    with pytest.raises(ConfigError) as error:
        parse_config(tables, overrides)
    first, *rest = str(error.value).split("\n")
    if not rest:
        return [ORIGIN.sub("", first)]
    assert re.fullmatch(rf"(configuration|command line): {len(rest)} problems", first)
    return [ORIGIN.sub("", line.removeprefix("  ")) for line in rest]


def test_a_section_that_is_absent_has_its_defaults() -> None:
    config = parse_config({"model": SHAPE, "optim": {"lr": 1}})
    assert (config.optim.lr, config.run.steps, config.model.rope_scaling) == (1.0, 1000, None)
    assert type(config.optim.lr) is float


def test_overrides_in_both_spellings_come_on_top_in_order() -> None:
    tables = {"model": dict(SHAPE), "run": {"steps": 5}}
    config = parse_config(
        tables,
        [
            "--run.steps=10",
            "--run.steps",
            "20",
            "--optim.lr=2e-4",
            "--optim.min_lr",
            "0",
            "--parallel.zero=0",
            "--run.folder=2024",
            "--data.path=a=b",
            "--run.dtype=bfloat16",
            "--model.eos_token_id=[2, 3]",
            "--model.rope_scaling.factor=32",
        ],
    )
    assert (config.run.steps, config.optim.lr, config.optim.min_lr) == (20, 2e-4, 0.0)
    assert (config.run.folder, config.data.path, config.run.dtype) == ("2024", "a=b", "bfloat16")
    assert config.parallel.zero == 0
    assert config.model.eos_token_id == (2, 3)
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.factor == 32.0
    assert tables == {"model": SHAPE, "run": {"steps": 5}}
    both = {"bos_token_id": 1, "rope_scaling": {"factor": 32.0}}
    cleared = parse_config(
        {"model": {**SHAPE, **both}}, ["--model.bos_token_id=none", "--model.rope_scaling=none"]
    )
    assert cleared.model.bos_token_id is None
    assert cleared.model.rope_scaling is None


def test_a_job_file_is_no_configuration(tmp_path: Path) -> None:
    (path := tmp_path / "job.toml").write_text('name = "a"\nrecipe = "demo"\n')
    with pytest.raises(
        ConfigError, match=r"job\.toml is a job file, which llamax launch and llamax"
    ):
        load_config(str(path))


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


def test_a_length_of_the_command_line_replaces_that_of_the_file() -> None:
    assert load_config("dolly-llama2-7b").run.epochs == 3
    short = load_config("dolly-llama2-7b", ["--run.steps=10"])
    assert (short.run.steps, short.run.epochs) == (10, 0)
    both = load_config("dolly-llama2-7b", ["--run.steps=10", "--run.epochs=0"])
    assert (both.run.steps, both.run.epochs) == (10, 0)
    warm = load_config("dolly-llama2-7b", ["--optim.warmup_steps=7"]).optim
    assert (warm.warmup_steps, warm.warmup_ratio) == (7, 0.0)
    share = load_config("llama2-7b", ["--optim.warmup_ratio=0.5"]).optim
    assert (share.warmup_steps, share.warmup_ratio) == (0, 0.5)
    none = load_config("llama2-7b", ["--optim.warmup_steps=9", "--optim.warmup_ratio=0"]).optim
    assert (none.warmup_steps, none.warmup_ratio) == (9, 0.0)


def test_a_length_in_steps_and_in_epochs_is_refused() -> None:
    says = r": run\.steps=10 and run\.epochs=2 both set the length; use one of them$"
    for load in (
        lambda: load_config("finetune-demo", ["--run.steps=10", "--run.epochs=2"]),
        lambda: config_of("finetune-demo", {"run": {"steps": 10, "epochs": 2}}, 2),
        lambda: config_of("finetune-demo", {"run.steps": 10, "run.epochs": 2}, 2),
    ):
        with pytest.raises(ConfigError, match=says):
            load()


def test_a_length_given_to_a_program_replaces_that_of_the_recipe() -> None:
    for settings in ({"run": {"steps": 10}}, {"run.steps": 10}):
        found = config_of("finetune-demo", settings, 2).run
        assert (found.steps, found.epochs) == (10, 0)
    found = config_of("demo", {"optim": {"warmup_ratio": 0.5}}, 2).optim
    assert (found.warmup_steps, found.warmup_ratio) == (0, 0.5)


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


def test_the_world_takes_part() -> None:
    assert (
        parse_config({"model": SHAPE}, ["--data.global_batch=4"], world_size=4).data.global_batch
        == 4
    )
    with pytest.raises(ConfigError, match=r"data.global_batch=4 .* 3 data ranks = 3; use 3 or 6"):
        parse_config({"model": SHAPE}, ["--data.global_batch=4"], world_size=3)


def test_files_and_recipes_are_found_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(dump_config(load_config("demo")))
    assert load_config(str(path)) == load_config("demo")
    assert find_config("demo").name == "demo.toml"
    assert "llama2-7b" in recipes()
    with pytest.raises(
        ConfigError, match="no recipe is named 'llama-2-7b'; did you mean llama2-7b"
    ):
        load_config("llama-2-7b")
    with pytest.raises(ConfigError, match="did you mean llama2-7b"):
        load_config("LLAMA2-7B")
    with pytest.raises(ConfigError, match=r"named 'xyz'; there are demo, dolly-llama2-7b"):
        load_config("xyz")
    with pytest.raises(
        ConfigError, match=r"gone.toml: no such file; --config takes a recipe's name"
    ):
        load_config(str(tmp_path / "gone.toml"))
    with pytest.raises(ConfigError, match="a recipe's name, demo for example or a TOML file"):
        load_config("demo.toml")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(str(tmp_path))
    path.write_text("[model\n")
    with pytest.raises(ConfigError, match=r"mine.toml: cannot be read as TOML: .*line 1"):
        load_config(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"mine.toml: cannot be read as TOML: 'utf-8' codec"):
        load_config(str(path))
    path.write_text("[run]\nsteps = 3.5\n")
    with pytest.raises(ConfigError, match=r"mine.toml: 2 problems\n  run.steps=3.5 is a float"):
        load_config(str(path))


# ---- any configuration, there and back

NUMBERS = {
    Count: st.integers(1, 2**40),
    Natural: st.integers(0, 2**40),
    ZeroStage: st.integers(0, 3),
    SpikeWindow: st.integers(16, 2**16),
    StateBits: st.sampled_from((8, 32)),
    Positive: st.floats(0, exclude_min=True, allow_infinity=False),
    NonNegative: st.floats(0, allow_infinity=False),
    Fraction: st.floats(0, 1, exclude_max=True),
    bool: st.booleans(),
    str: st.text(),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    if hint is NoneType:
        return st.none()
    if is_dataclass(hint):
        return st.builds(hint, **{name: values(inner) for name, inner in type_hints(hint).items()})
    if hint in NUMBERS:
        return NUMBERS[hint]
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.lists(st.integers(0, 99), max_size=3).map(tuple)
    if get_args(hint):
        return st.one_of(*map(values, get_args(hint)))
    raise AssertionError(hint)


@given(values(Config))
def test_what_is_dumped_loads_back(config: Config) -> None:
    problems = Problems()
    assert build(Config, tomllib.loads(dump_config(config)), problems) == config
    assert problems.lines(config) == []


@given(st.text())
def test_any_text_can_be_an_override(text: str) -> None:
    assert (
        parse_config({"model": SHAPE}, [f"--checkpoint.init_from={text}"]).checkpoint.init_from
        == text
    )


def test_help_explains_every_field() -> None:
    text = help_text()
    config = load_config("llama3.2-1b")
    for prefix, section in sections(config):
        for each in fields(section):
            if not is_dataclass(getattr(section, each.name)):
                option = f"--{prefix}.{each.name}="
                (start,) = [s for s in re.split(r"\n  (?=--)", text) if s.startswith(option)]
                line = " ".join(start.split())
                sentence, _, unit = (
                    descriptions(type(section))[each.name].rstrip(".").partition(" [")
                )
                assert sentence in line
                assert f"({unit.rstrip(']')}" in line
    assert (
        "  --optim.warmup_steps=INT\n"
        "      Length of the rise from 0 to lr at the start (steps; default 0)\n"
    ) in text
    assert "--run.backend=cpu|cuda|xla|neuron\n" in text
    assert "--model.eos_token_id=INT|[INT, ..]\n" in text
    assert max(map(len, text.splitlines())) < 80
    assert "(features; required)" in text
    assert "(default empty)" in text


def test_reading_a_configuration_needs_no_torch() -> None:
    code = (
        "import sys; from llamax.config.load import load_config; load_config('demo', [], 4); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_page_of_recipes_names_each_of_them() -> None:
    page = (RECIPES / "README.md").read_text()
    assert [name for name in recipes() if f"`{name}`" not in page] == []


@pytest.mark.timeout(120)
def test_a_file_with_very_many_unknown_keys_is_refused_soon(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[run]\n" + "".join(f"steps{number} = 1\n" for number in range(100_000)))
    with pytest.raises(ConfigError, match=r"problems\n  run\.steps0 is an unknown key") as error:
        load_config(str(path))
    assert re.search(r"\n  and 999\d\d more$", str(error.value))
