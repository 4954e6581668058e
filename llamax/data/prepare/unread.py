"""What rows hold and the text of their samples does not: names of columns and keys, and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from llamax.data.chat.templates import Sample, Template
from llamax.runtime.errors import DataError

MOST_NAMES = 20  # in a message
MOST_COUNTED = 1000  # different names; a row may have a key of its own
MOST_KEYS = 100  # of the messages of a row, with two renderings for each
LONGEST_NAME = 200  # characters
EMPTY: tuple[Any, ...] = (None, "", [], {})  # what says nothing; 0 and false do, as "weight": 0


class UnreadParts:
    """Finds the parts of a sample that a template leaves out of the text."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self._ignored: dict[str, bool] = {}  # keys that the template does not name

    def of(self, sample: Sample, text: str) -> list[str]:
        """Names of the columns and keys that change nothing in ``text``, the sample's."""
        found = list(sample.unread)
        for name, value in sample.variables.items():
            rest = {key: each for key, each in sample.variables.items() if key != name}
            if value not in EMPTY and self._same(sample, sample._replace(variables=rest)):
                found.append(name)
        if not self.template.chat:
            return found
        keys = dict.fromkeys(
            key for m in sample.messages for key, value in m.items() if value not in EMPTY
        )
        many = len(keys) > MOST_KEYS  # then a name that the template does not have is not read
        for key in islice(keys, MOST_KEYS):
            if key in ("role", "content") or (many and key in self.template.words):
                continue
            if many or self._ignores(key, sample):
                found.append(f"messages[].{key}")
        for number, message in enumerate(sample.messages):
            content = (message.get("content") or "").strip()
            if content and self.template.shielded(content) not in text:
                other = [*sample.messages]
                other[number] = {**message, "content": f"{message['content']}x"}
                if self._same(sample, sample._replace(messages=other)):
                    found.append(f"messages[].content of {message['role']}")
        return list(dict.fromkeys(found))

    def _ignores(self, key: str, sample: Sample) -> bool:
        others = [{k: v for k, v in m.items() if k != key} for m in sample.messages]
        if key in self.template.words:
            return self._same(sample, sample._replace(messages=others))
        if key in self._ignored:
            return self._ignored[key]
        same = self._same(sample, sample._replace(messages=others))
        if len(self._ignored) < MOST_COUNTED:
            self._ignored[key] = same
        return same

    def _same(self, sample: Sample, other: Sample) -> bool:
        """Whether two samples have the same text; False if the template refuses the other."""
        text = self.template.text(sample)
        try:
            return self.template.text(other) == text
        except DataError:
            return False


def count_names(total: Counter[str], names: Iterable[str] | Mapping[str, int]) -> None:
    """Count names, each once or as often as given; once MOST_COUNTED are known no new ones."""
    counts = names if isinstance(names, Mapping) else dict.fromkeys(names, 1)
    for name, number in counts.items():
        if name[:LONGEST_NAME] in total or len(total) < MOST_COUNTED:
            total[name[:LONGEST_NAME]] += number


def unread_names(unread: Mapping[str, int]) -> str:
    """The names of what was not read, the most frequent first, with their numbers of rows."""
    ordered = sorted(unread.items(), key=lambda item: (-item[1], item[0]))
    names = [f"{name} ({count:,} {'row' if count == 1 else 'rows'})" for name, count in ordered]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def unread_error(unread: Mapping[str, int]) -> DataError:
    """The error for rows that hold something which is not read."""
    return DataError(
        f"not read: {unread_names(unread)}; remove these columns and keys, use a template that "
        "reads them, or leave out `strict=True`"
    )
