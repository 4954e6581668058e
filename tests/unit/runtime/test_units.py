"""Numbers, bytes, times and rates in words."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from llamax.config.flops import mfu
from llamax.runtime import units
from llamax.runtime.units import (
    amount,
    eta,
    perplexity,
    read_bytes,
    show_bytes,
    show_fine_time,
    show_flops,
    show_number,
    show_rate,
    show_time,
    tokens_per_s,
)


def test_rates() -> None:
    assert mfu(10.0, 3.0, 60.0) == 0.5
    assert mfu(10.0, 3.0, 0.0) == 0.0
    assert tokens_per_s(100, 0.5) == 200.0
    assert tokens_per_s(100, 0.0) == 0.0
    assert eta(3, 10, 2.0) == 14.0
    assert eta(12, 10, 2.0) == 0.0
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(32.0)) == pytest.approx(32.0)
    assert perplexity(1e4) == math.inf


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (7, "7"),
        (0.5, "0.50"),
        (999, "999"),
        (999.7, "1.00K"),
        (1000, "1K"),
        (1234, "1.23K"),
        (12_345, "12.3K"),
        (123_456, "123K"),
        (999_999, "1.00M"),
        (6_738_415_616, "6.74B"),
        (2.0e12, "2T"),
        (5e16, "50000T"),
    ],
)
def test_numbers_in_words(n: float, text: str) -> None:
    assert show_number(n) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [(512, "512 B"), (1024, "1 KiB"), (1536, "1.50 KiB"), (3 * 2**29, "1.50 GiB")],
)
def test_bytes_in_words(n: float, text: str) -> None:
    assert show_bytes(n) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 FLOP"), (524288, "524 kFLOP"), (9.5e13, "95 TFLOP"), (2e18, "2000 PFLOP")],
)
def test_flops_in_words(n: float, text: str) -> None:
    assert show_flops(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00s"),
        (0.254, "0.25s"),
        (9.994, "9.99s"),
        (9.999, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.9, "1h00m"),
        (7620, "2h07m"),
        (86399.9, "1d00h"),
        (5 * 86400 + 3 * 3600, "5d03h"),
    ],
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert show_time(seconds) == show_fine_time(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.23e-6, "0.00123ms"), (0.0034567, "3.46ms"), (0.0994, "99.4ms"), (0.0996, "0.10s")],
)
def test_short_times_in_words(seconds: float, text: str) -> None:
    assert show_fine_time(seconds) == text


@pytest.mark.parametrize("show", [units.show_time, units.show_number, units.show_bytes])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, -1e300, -1.0, 0.0])
def test_any_number_is_shown(show: Callable[[float], str], value: float) -> None:
    assert 0 < len(show(value)) < 24


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("512B", 512),
        ("64MiB", 64 * 2**20),
        ("64 MB", 64 * 10**6),
        ("1.5g", 1_500_000_000),
        ("2 GiB", 2**31),
        ("3k", 3000),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e6", "64 bananas", "1 2", "9" * 40])
def test_other_texts_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as 64MiB"):
        read_bytes(text)


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 tokens"), (1, "1 token"), (2, "2 tokens"), (6428, "6.43K tokens")]
)
def test_large_numbers_and_their_nouns(number: int, text: str) -> None:
    assert amount(number, "token") == text


@pytest.mark.parametrize(
    ("n", "text"),
    [(3.35e12, "3350 GB/s"), (83e9, "83 GB/s"), (8.8e9, "8.80 GB/s"), (3.1e8, "310 MB/s")],
)
def test_speeds_in_words(n: float, text: str) -> None:
    assert show_rate(n) == text


def test_things_in_a_row() -> None:
    assert units.row(1, "step") == "1 step was"
    assert units.row(3, "validation") == "3 validations in a row were"
