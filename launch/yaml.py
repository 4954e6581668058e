"""YAML from plain dictionaries, lists, strings and numbers: what manifests need, and no more.

Every string is in double quotes with escapes, unless it is a plain word that no YAML version reads
as anything else; a text of several lines is a literal block.  Source: YAML 1.2.2, chapters 7 and 8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

WORD = re.compile(r"[A-Za-z/][A-Za-z0-9./_-]*")
NOT_WORDS = {"y", "n", "yes", "no", "true", "false", "on", "off", "null"}


def dump(*documents: Any) -> str:
    """The documents of a file."""
    return "---\n".join("\n".join(_lines(document)) + "\n" for document in documents)


def _lines(value: Any) -> Iterator[str]:
    """The lines of a mapping or a sequence, not indented."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _entry(f"{_text(key)}:", item, "  ")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _entry("-", item, "  ")
    else:
        yield _scalar(value)


def _entry(start: str, item: Any, indent: str) -> Iterator[str]:
    """An entry: on the same line where it is a scalar or empty, else below it."""
    if isinstance(item, str) and "\n" in item.rstrip("\n") and _is_literal(item):
        yield f"{start} |"
        yield from (f"{indent}{line}" if line else "" for line in item[:-1].split("\n"))
    elif isinstance(item, (str, int)):
        yield f"{start} {_scalar(item)}"
    elif not item:
        yield f"{start} {'{}' if isinstance(item, Mapping) else '[]'}"
    elif start == "-":
        first, *rest = _lines(item)
        yield f"- {first}"
        yield from (f"{indent}{line}" if line else "" for line in rest)
    else:
        yield start
        yield from (f"{indent}{line}" if line else "" for line in _lines(item))


def _is_literal(text: str) -> bool:
    """Whether a literal block keeps ``text`` as it is."""
    plain = all(letter.isprintable() or letter == "\n" for letter in text)
    return plain and text.endswith("\n") and not text.endswith("\n\n") and text[0] not in " \n"


def _scalar(value: str | int | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else _text(value)


def _text(text: str) -> str:
    if WORD.fullmatch(text) and text.lower() not in NOT_WORDS:
        return text
    return '"' + "".join(map(_letter, text)) + '"'


def _letter(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    if " " <= letter <= "~":
        return letter
    number = ord(letter)
    return f"\\x{number:02x}" if number < 256 else f"\\U{number:08x}"
