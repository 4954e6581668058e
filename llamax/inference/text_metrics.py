"""Metrics of an answer against the right one: exact match and ROUGE-L.

ROUGE-L is the F1 of the longest common subsequence of words: with l its length, precision l / words
of the answer, recall l / words of the reference.  Words are runs of Unicode letters and digits in
lower case, so Hangul counts too.

Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.
"""

from __future__ import annotations

import re

WORDS = re.compile(r"\w+")


def exact_match(answer: str, reference: str, extract: re.Pattern[str] | None = None) -> bool:
    """Whether two texts are equal but for white space around them.

    With ``extract`` only its last match is compared, or the first group that took part in it if
    there is one; an answer without a match is wrong.
    """
    if extract is None:
        return answer.strip() == reference.strip()
    found, wanted = (_last(extract, text) for text in (answer, reference))
    return found is not None and found == wanted


def _last(extract: re.Pattern[str], text: str) -> str | None:
    found = None
    for match in extract.finditer(text):
        groups = (group for group in match.groups() if group is not None)
        found = next(groups, match[0]).strip()
    return found


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L of an answer, 0 to 1; 0 where either has no words."""
    words, expected = (WORDS.findall(text.lower()) for text in (answer, reference))
    common = longest_common(words, expected)
    return 2 * common / (len(words) + len(expected)) if common else 0.0


def longest_common(first: list[str], second: list[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for item in first:
        diagonal = 0
        for j, candidate in enumerate(second, 1):
            above = row[j]
            row[j] = diagonal + 1 if item == candidate else max(above, row[j - 1])
            diagonal = above
    return row[-1]
