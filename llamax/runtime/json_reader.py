"""Reads JSON that llamax did not write itself: bounded in size and depth, with finite numbers.

Python's ``json`` accepts NaN, infinities and integers of thousands of digits, and fails with
RecursionError for deep nesting.  Here each of them is a ``JsonError``, a ValueError with one line
that says what is wrong; a value within the bounds can be printed, copied and computed with.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from llamax.runtime.errors import LinkError
from llamax.runtime.files import plain_file

MAX_BYTES = 64 << 20  # of a file; the tokenizer.json of 256k tokens takes 35 MB
MAX_DEPTH = 64
MAX_DIGITS = 40  # of an integer; model_max_length of transformers has 31


class JsonError(ValueError):
    """JSON that is malformed or out of bounds; the message is a clause such as "is not JSON"."""


def parse_json(data: bytes | str, strict: bool = True) -> Any:
    """The value of a JSON text.

    Without ``strict`` NaN, infinities and long integers are accepted: what Python's own ``json``
    writes for numbers that are not finite.

    Raises JsonError.
    """
    try:
        if strict:
            value = json.loads(
                data, parse_constant=_constant, parse_float=_float, parse_int=_integer
            )
        else:
            value = json.loads(data)
    except JsonError:
        raise
    except json.JSONDecodeError as error:
        raise JsonError(f"is not JSON ({_place(error)}: {error.msg})") from None
    except UnicodeDecodeError:
        raise JsonError("is not JSON: it is not text in UTF-8") from None
    except RecursionError:
        raise JsonError(f"is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError:  # an integer of more digits than Python converts
        raise JsonError("holds a number of thousands of digits") from None
    if isinstance(data, str):
        openers = data.count("[") + data.count("{")
    else:
        openers = data.count(b"[") + data.count(b"{")
    if openers > MAX_DEPTH and too_deep(value):
        raise JsonError(f"is nested more than {MAX_DEPTH} levels deep")
    return value


def parse_object(data: bytes | str, strict: bool = True) -> dict[str, Any]:
    """The JSON object of a text; see ``parse_json``.  Raises JsonError, also for another value."""
    value = parse_json(data, strict)
    if not isinstance(value, dict):
        raise JsonError("is not a JSON object")
    return value


def read_json(path: Path, max_bytes: int = MAX_BYTES, strict: bool = True) -> Any:
    """The value of a JSON file; see ``parse_json``.

    Raises JsonError, also for a larger or special file, and OSError if it cannot be read.
    """
    try:
        with open(path, "rb", opener=plain_file) as file:
            data = file.read(max_bytes + 1)
    except LinkError:
        raise JsonError("is not a plain file") from None
    if len(data) > max_bytes:
        raise JsonError(f"is larger than {max_bytes / 2**20:g} MiB")
    return parse_json(data, strict)


def read_object(path: Path, max_bytes: int = MAX_BYTES, strict: bool = True) -> dict[str, Any]:
    """The JSON object in a file; see ``read_json``.  Raises JsonError, also for another value."""
    value = read_json(path, max_bytes, strict)
    if not isinstance(value, dict):
        raise JsonError("is not a JSON object")
    return value


def _place(error: json.JSONDecodeError) -> str:
    """The line of a mistake; in a text of one line, such as a row, its character."""
    text = error.doc.rstrip()
    if not text or "\n" in text.lstrip():
        return f"line {error.lineno}"
    return f"character {min(error.pos, len(text)) + 1}"


def _constant(name: str) -> float:
    raise JsonError(f"holds {name}, which is not a number in JSON")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise JsonError(f"holds the number {text[:40]}, which is out of range")
    return number


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise JsonError(f"holds an integer of {len(text)} digits")
    return int(text)


def too_deep(value: Any) -> bool:
    """Whether a value of JSON is nested more than MAX_DEPTH levels deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        nested: list[Any] = []
        for container in level:
            values = container.values() if isinstance(container, dict) else container
            nested.extend(v for v in values if isinstance(v, dict | list))
        if not nested:
            return False
        level = nested
    return True
