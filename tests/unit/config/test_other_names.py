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

PAGE = Path(__file__).resolve().parents[3] / "docs/how-to/from-trl.md"
RECIPE = "korean-chat-qlora-24gb"
SETTING = re.compile(r"\b((?:data|optim|run|checkpoint|finetune|parallel)\.[a-z_0-9]+)(=[^`,\s]+)?")
KEYS = {option.key for option in options(Config)}
VALUES = {f"{key}{value}" for key, value in SETTING.findall(PAGE.read_text()) if value}
VALUES |= {
    f"{key}{value}" for text in SAME.values() for key, value in SETTING.findall(text) if value
}


def rows() -> list[tuple[str, str]]:
    """The cells of the tables of the page."""
    lines = [
        line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if "| `" in line
    ]
    return [(cells[0], cells[1]) for cells in lines if len(cells) == 2]


def test_every_setting_of_the_page_and_of_the_hints_exists() -> None:
    named = {key for key, _ in SETTING.findall(PAGE.read_text() + " ".join(SAME.values()))}
    assert len(named) > 35
    assert named <= KEYS


@pytest.mark.parametrize("setting", sorted(VALUES))
def test_every_value_of_the_page_is_accepted(setting: str) -> None:
    load_config(RECIPE, [f"--{setting.replace('PROJECT', 'name')}"], within=None)


def test_the_page_and_the_hints_agree() -> None:
    checked = set()
    for there, here in rows():
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
        (["--optim.lrr=1"], "unknown option; did you mean optim.lr"),
    ],
)
def test_an_option_of_another_trainer_is_answered_with_ours(words: list[str], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        load_config(RECIPE, words, within=None)


def test_a_key_of_another_trainer_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "sft.toml"
    file.write_text("[optim]\nlearning_rate = 2e-4\n")
    with pytest.raises(
        ConfigError, match=r"optim\.learning_rate is an unknown key; in llamax it is"
    ):
        load_config(str(file))


def test_other_names_have_no_hint() -> None:
    assert same_setting("optim.lr") == ""
