"""Fields: ranges in their types, sentences below them, also where Python drops docstrings."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Any, Literal

import pytest

from llamax.config import hardware, load, types
from llamax.config.hardware import Machine
from llamax.config.schema import Config
from llamax.config.types import (
    Count,
    Efficiency,
    Fraction,
    Natural,
    NonNegative,
    Port,
    Positive,
    descriptions,
    explain,
    options,
    out_of_range,
    range_of,
    type_hints,
)
from llamax.launch import jobfile
from llamax.launch.jobfile import JobFile


@dataclass(frozen=True)
class Inner:
    """A section."""

    share: Fraction = 0.5
    """Share of something; 0: none [of all
    things]."""
    plain: str = ""
    """Text without a unit."""
    silent: bool = False


@dataclass(frozen=True)
class Outer:
    """A section with a section inside."""

    needed: Count
    """What must be given [pieces]."""
    inner: Inner = Inner()
    choice: Literal["a", "b"] = "a"
    """One of two."""
    several: Natural | tuple[Natural, ...] | None = None
    """Some numbers, or none."""


def test_a_sentence_and_its_unit_are_the_help() -> None:
    told = {option.key: explain(option) for option in options(Outer)}
    assert told == {
        "needed": "What must be given (pieces; required)",
        "choice": "One of two (default a)",
        "several": "Some numbers, or none (default none)",
        "inner.share": "Share of something; 0: none (of all things; default 0.5)",
        "inner.plain": "Text without a unit (default empty)",
        "inner.silent": " (default false)",
    }


def test_the_range_of_a_type_is_found_inside_it() -> None:
    hints = type_hints(Outer)
    assert range_of(hints["needed"]) is range_of(Count)
    assert range_of(hints["several"]) is range_of(Natural)
    assert range_of(hints["inner"]) is range_of(hints["choice"]) is range_of(int) is None


def test_values_out_of_range_are_named_with_their_section() -> None:
    wrong: Any = Outer(0, Inner(share=1.0), choice="c", several=(1, -1))  # type: ignore[arg-type]
    assert list(out_of_range(wrong, "top")) == [
        ("top.needed", "top.needed=0 is out of range; use 1 or more"),
        ("top.choice", "top.choice='c' is unknown; use a or b"),
        ("top.several", "top.several=(1, -1) is out of range; use 0 or more"),
        ("top.inner.share", "top.inner.share=1.0 is out of range; use 0 or more and below 1"),
    ]
    assert list(out_of_range(Outer(1, several=(0, 3)))) == []


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_a_number_is_finite(value: float) -> None:
    @dataclass
    class One:
        number: Positive = value

    types._HINTS[One] = {"number": Positive}
    assert [key for key, _ in out_of_range(One())] == ["number"]


@pytest.mark.parametrize(
    ("hint", "inside", "outside"),
    [
        (Count, (1, 2**60), (0,)),
        (Natural, (0,), (-1,)),
        (Positive, (1e-300,), (0.0,)),
        (NonNegative, (0.0,), (-1e-300,)),
        (Fraction, (0.0, 0.999), (1.0, -0.1)),
        (Efficiency, (1e-9, 1.0), (0.0, 1.001)),
        (Port, (1024, 65535), (1023, 65536)),
    ],
)
def test_ranges_end_where_their_words_say(
    hint: Any, inside: tuple[float, ...], outside: tuple[float, ...]
) -> None:
    allowed = range_of(hint)
    assert allowed is not None
    assert [value for value in inside if not allowed.contains(value)] == []
    assert [value for value in outside if allowed.contains(value)] == []


@pytest.mark.parametrize("kind", [Config, JobFile, Machine])
def test_every_field_is_one_sentence_and_a_number_has_a_range(kind: type) -> None:
    for option in options(kind):
        if option.key not in ("overrides", "environment"):
            sentence = descriptions(option.owner)[option.field.name]
            assert sentence.endswith("."), option.key
            assert ". " not in sentence, option.key
        numbers = types.bare(option.hint) in (int, float)
        assert not numbers or range_of(option.hint), option.key


def test_help_survives_an_interpreter_that_drops_docstrings() -> None:
    code = "from llamax.config.load import help_text; print(help_text(), end='')"
    command = [sys.executable, "-OO", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == load.help_text()


def test_without_source_options_are_listed_without_sentences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(_: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", absent)
    descriptions.cache_clear()
    try:
        assert "  --optim.lr=FLOAT\n" in load.help_text()
        assert "(default 0.0003)" in load.help_text()
        assert "  port\n" in jobfile.help_text()
    finally:
        descriptions.cache_clear()


def test_machines_are_described_by_their_fields() -> None:
    assert descriptions(hardware.Machine).keys() == {each.name for each in fields(Machine)}
