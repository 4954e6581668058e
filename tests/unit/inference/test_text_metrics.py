"""Scores of answers, by hand and against the definition."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamax.inference.text_metrics import exact_match, longest_common, rouge_l


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("the gunman kill police", "police kill the gunman", 0.5),
        ("A, b!", "a B", 1.0),
        ("철수 입니다", "철수 아닙니다", 0.5),
        ("", "a", 0.0),
        ("?", "!", 0.0),
    ],
)
def test_rouge_l_as_its_paper_has_it(answer: str, reference: str, score: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score)


@given(st.lists(st.sampled_from("ab"), max_size=6), st.lists(st.sampled_from("ab"), max_size=6))
def test_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    def subsequences(items: list[str]) -> set[tuple[str, ...]]:
        return {part for n in range(len(items) + 1) for part in combinations(items, n)}

    assert longest_common(one, other) == max(map(len, subsequences(one) & subsequences(other)))


def test_exact_match() -> None:
    assert exact_match(" a b\n", "a b")
    assert not exact_match("a  b", "a b")
    number = re.compile(r"#### (.*)")
    assert exact_match("so\n#### 1\n#### 72", "#### 72 ", number)
    assert not exact_match("72", "#### 72", number)
    assert not exact_match("72", "no number", number)
    assert exact_match("x 7", "y 7", re.compile(r"\d"))


def test_of_alternatives_the_group_that_took_part_is_compared() -> None:
    extract = re.compile(r"#### (.*)|answer is (\w+)")
    assert exact_match("so the answer is 7", "#### 7", extract)
    assert not exact_match("so the answer is 8", "#### 7", extract)
    assert exact_match("x=", "x=", re.compile(r"x=(\d+)?"))
