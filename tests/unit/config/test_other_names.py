"""Names of other trainers: the hints for unknown options, and the page that explains them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llamax.config.load import load_config
from llamax.config.other_names import SAME, same_setting
from llamax.config.schema import Config
from llamax.config.types import options
from llamax.runtime.errors import ConfigError

HOW_TO = Path(__file__).resolve().parents[3] / "docs/how-to"
PAGES = {"from-trl.md": "korean-chat-qlora-24gb", "from-neuron.md": "dolly-llama2-7b"}  # a recipe
SETTING = re.compile(
    r"\b((?:model|data|optim|run|checkpoint|finetune|parallel)\.[a-z_0-9]+)(=[^`,\s]+)?"
)
KEYS = {option.key for option in options(Config)}
HINTS = " ".join(SAME.values())


def rows(page: str) -> list[tuple[str, str]]:
    """The cells of the tables of a page."""
    lines = (HOW_TO / page).read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    return [(there, here) for there, here in cells]


def settings(page: str) -> list[tuple[str, str]]:
    """The settings of llamax on a page, with =VALUE or nothing."""
    prose = [line for line in (HOW_TO / page).read_text().splitlines() if line[:1] != "|"]
    return SETTING.findall("\n".join([*prose, *(here for _, here in rows(page))]))


VALUES = {
    (recipe, f"{key}{value}")
    for page, recipe in PAGES.items()
    for key, value in settings(page) + (SETTING.findall(HINTS) if page == "from-trl.md" else [])
    if value
}


def test_every_setting_of_the_pages_and_of_the_hints_exists() -> None:
    for page in PAGES:
        named = {key for key, _ in settings(page)}
        assert len(named) > 30
        assert named <= KEYS
    assert {key for key, _ in SETTING.findall(HINTS)} <= KEYS


@pytest.mark.parametrize(("recipe", "setting"), sorted(VALUES))
def test_every_value_of_the_pages_is_accepted(recipe: str, setting: str) -> None:
    load_config(recipe, [f"--{setting.replace('PROJECT', 'name')}"], within=None)


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_and_the_hints_agree(page: str) -> None:
    checked = set()
    training = [row for row in rows(page) if "llamax generate" not in row[1]]
    for there, here in training:
        names = set(re.findall(r"[a-z]\w+", there)) & SAME.keys()
        for name in names:
            keys = {key for key, _ in SETTING.findall(SAME[name])}
            assert any(key in here for key in keys), (name, here)
            checked.add(name)
    assert len(checked) > 25


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (
            ["--per_device_train_batch_size", "4"],
            "unknown option; in llamax it is data.micro_batch",
        ),
        (["--lora-alpha=16"], "unknown option; in llamax it is finetune.alpha"),
        (["--finetune.target_modules=q_proj"], "option; in llamax it is finetune.targets"),
        (["--load_in_4bit"], "has no value; in llamax it is finetune.method=qlora"),
        (["--optim", "paged_adamw_32bit"], "paged_.* is optim.offload"),
        (["--ffn_hidden_size=11008"], "option; in llamax it is model.intermediate_size"),
        (["--optim.lrr=1"], "unknown option; did you mean optim.lr"),
        (["--precision", "bf16"], "unknown option; in llamax it is run.dtype"),
        (["--run.batch_size=8"], "in llamax it is data.global_batch, in samples of a step on all"),
        (["--packing=concat"], "unknown option; in llamax it is data.packing"),
        (["--data.packing"], "has no value; write --data.packing=value"),
    ],
)
def test_an_option_of_another_trainer_is_answered_with_ours(words: list[str], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        load_config(PAGES["from-trl.md"], words, within=None)


def test_a_key_of_another_trainer_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "sft.toml"
    file.write_text("[optim]\nlearning_rate = 2e-4\n")
    with pytest.raises(
        ConfigError, match=r"optim\.learning_rate is an unknown key; in llamax it is"
    ):
        load_config(str(file))


def test_other_names_have_no_hint() -> None:
    assert same_setting("optim.lr") == ""
