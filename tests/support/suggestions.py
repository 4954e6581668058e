"""What a problem of a configuration suggests, as changes of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from llamax.config.schema import Config

KEY = r"[a-z_]+\.[a-z_]+"


def suggestions(line: str, config: Config) -> Iterator[dict[str, Any]]:
    """The changes, each by key, that ``line`` suggests for ``config``; none for free words.

    Values without a key are those of the key that the line begins with.
    """
    head, _, tail = line.partition(";")
    subject = re.match(KEY, head)
    for way in re.split(r", or |, (?=the last)", tail):
        if way.startswith(" start "):  # another number of ranks
            continue
        first, *beside = re.sub(r"^ ?(?:or )?(?:use|set) ", "", way).strip().split(" and ")
        more = [found for text in beside for found in _values(text, "", config)]
        for key, value in _values(first, subject[0] if subject else "", config):
            yield {key: value, **dict(more)}


def _values(text: str, subject: str, config: Config) -> Iterator[tuple[str, Any]]:
    text = re.sub(r" (or less|or more.*|for example|, for all ranks.*|\(.*\))$", "", text)
    named = re.fullmatch(rf"({KEY})=(.*)", text)
    key, values = (named[1], named[2]) if named else (subject, text)
    if key:
        for value in re.split(r", | or | to ", values):
            if (found := _read(value, key, config)) is not None:
                yield key, found


def _read(text: str, key: str, config: Config) -> Any:
    section, _, name = key.partition(".")
    kind: Any = type(getattr(getattr(config, section, None), name, None))
    if kind is bool:
        return {"true": True, "false": False}.get(text)
    if kind is str:
        return text if re.fullmatch(r"[a-z0-9,-]+", text) else None
    try:
        return kind(text)
    except (TypeError, ValueError):
        return None
