"""Rows of a JSON file that holds one value, read one by one in constant memory.

::

    [{...}, {...}]                              a list of rows
    {"version": 1, "data": [{...}, {...}]}      an object with one list: its rows

The file is never held whole: a row is parsed as soon as its text is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llamax.data.prepare.file_kinds import (
    MAX_DOCUMENT,
    decoded,
    reading,
    too_long,
)
from llamax.data.prepare.unpack import BLOCK_BYTES
from llamax.runtime.errors import DataError
from llamax.runtime.json_reader import MAX_DEPTH, too_deep

ROW_KEYS = ("messages", "conversations")  # an object with one of these is a row itself


def json_rows(path: Path, most: int = MAX_DOCUMENT) -> Iterator[Any]:
    """The rows of a JSON file: a list, or an object that holds one list.

    Raises DataError for a file that cannot be read, is not JSON or neither of these, and for a row
    of more than ``most`` bytes.
    """
    keys = {} if _begins_with_list(path, most) else top_level_keys(path, most)
    name = list_key(keys)
    if keys and name is None:
        raise DataError(f"{path}: is neither a list of rows nor an object with one; use JSONL")
    with reading(path) as file:
        reader = _Reader(file, path, most)
        if name is None:
            yield from reader.items()
            reader.end()
            return
        for key in reader.members():
            if key == name:
                yield from reader.items()
            else:
                reader.skip()


def top_level_keys(path: Path, most: int = MAX_DOCUMENT) -> dict[str, bool]:
    """The keys of the object in a JSON file, and whether the value of each is a list.

    Empty if the file holds another value.  Raises DataError as ``json_rows`` does.
    """
    with reading(path) as file:
        reader, keys = _Reader(file, path, most), {}
        if reader.peek() != "{":
            reader.skip()
        else:
            for key in reader.members():
                keys[key] = reader.peek() == "["
                reader.skip()
        reader.end()
    return keys


def list_key(keys: dict[str, bool]) -> str | None:
    """The key of the only list in an object; None if there is none, or if it is a row."""
    lists = [key for key, is_list in keys.items() if is_list]
    return lists[0] if len(lists) == 1 and not any(key in keys for key in ROW_KEYS) else None


def _begins_with_list(path: Path, most: int) -> bool:
    with reading(path) as file:
        return _Reader(file, path, most).peek() == "["


class _Reader:
    """Reads values out of JSON text, from a file in blocks."""

    def __init__(self, file: IO[bytes], path: Path, most: int) -> None:
        self._blocks = decoded(file, str(path))
        self._path, self._most, self._rows = path, most, 0
        self._text, self._at, self._ended = "", 0, False
        self._parse = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\n\r":
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def items(self) -> Iterator[Any]:
        """The values of the list that comes next."""
        self._take("[")
        self._rows = 0
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            self._rows += 1
            yield self._value()
            if self.peek() == "]":
                self._at += 1
                return
            self._take(",")

    def members(self) -> Iterator[str]:
        """The keys of the object that comes next; the caller reads the value of each."""
        self._take("{")
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            if self.peek() != '"':
                raise self._wrong("expecting a key in double quotes")
            key = self._value()
            self._take(":")
            yield key
            if self.peek() == "}":
                self._at += 1
                return
            self._take(",")

    def skip(self) -> None:
        """Read over a value; a list item by item."""
        if self.peek() == "[":
            for _ in self.items():
                pass
        else:
            self._value()

    def end(self) -> None:
        """Raise DataError if anything but white space follows."""
        if self.peek():
            raise self._wrong("something follows its value")

    def _take(self, mark: str) -> None:
        if self.peek() != mark:
            raise self._wrong(f"expecting {mark!r}")
        self._at += 1

    def _value(self) -> Any:
        self.peek()
        wanted = BLOCK_BYTES
        while True:
            try:
                value, stop = self._parse(self._text, self._at)
                if stop < len(self._text) or self._ended:  # a number may go on in the next block
                    openers = self._text.count("[", self._at, stop)
                    openers += self._text.count("{", self._at, stop)
                    if openers > MAX_DEPTH and too_deep(value):
                        raise self._deep()
                    if stop - self._at > self._most:
                        raise self._too_long()
                    self._at = stop
                    return value
            except RecursionError:
                raise self._deep() from None
            except ValueError as error:
                if self._ended:
                    raise self._wrong(getattr(error, "msg", str(error))) from None
            if len(self._text) - self._at > self._most:
                raise self._too_long()
            while len(self._text) - self._at < wanted and self._more():
                pass
            wanted *= 2

    def _more(self) -> bool:
        """Read a block; False at the end of the file."""
        block = next(self._blocks, None)
        self._ended = block is None
        self._text, self._at = self._text[self._at :] + (block or ""), 0
        return not self._ended

    def _too_long(self) -> DataError:
        place = f"row {self._rows}" if self._rows else "a value"
        return too_long(f"{self._path}: {place}", self._most)

    def _deep(self) -> DataError:
        where = f" (row {self._rows})" if self._rows else ""
        return DataError(f"{self._path}: is nested more than {MAX_DEPTH} levels deep{where}")

    def _wrong(self, problem: str) -> DataError:
        where = f" in row {self._rows}" if self._rows else ""
        return DataError(f"{self._path}: is not JSON ({problem}{where}); correct it")
