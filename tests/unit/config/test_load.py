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
from support.refused_config import SHAPE

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
    ZeroRanks,
    ZeroStage,
    descriptions,
    type_hints,
)
from llamax.runtime.errors import ConfigError
from llamax.training.library import config_of


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
    ZeroRanks: st.sampled_from((0, *range(2, 99))),
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
