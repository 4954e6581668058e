"""Types of configuration fields: numbers with a range, and the sentence that describes a field.

A field is one line with its type and default, and below it one sentence that ends in the unit::

    timeout_s: Count = 600
    \"\"\"Longest duration of a collective [s].\"\"\"

The ranges are part of the types, so that any dataclass written this way can be checked, read from
TOML (``llamax.config.toml``) and explained on a help page.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from llamax.runtime.errors import join_or


@dataclass(frozen=True)
class Range:
    """The numbers that a field may hold: in words, and as a test."""

    words: str
    contains: Callable[[float], bool]


Count = Annotated[int, Range("1 or more", lambda n: n >= 1)]
Natural = Annotated[int, Range("0 or more", lambda n: n >= 0)]
ZeroStage = Annotated[int, Range("0, 1, 2 or 3", lambda n: 0 <= n <= 3)]
ZeroRanks = Annotated[int, Range("0, or 2 or more", lambda n: n == 0 or n >= 2)]
SpikeWindow = Annotated[int, Range("16 to 65536", lambda n: 16 <= n <= 65536)]
StateBits = Annotated[int, Range("8 or 32", lambda n: n in (8, 32))]
Positive = Annotated[float, Range("a number above 0", lambda x: x > 0)]
NonNegative = Annotated[float, Range("0 or more", lambda x: x >= 0)]
Fraction = Annotated[float, Range("0 or more and below 1", lambda x: 0 <= x < 1)]
Efficiency = Annotated[float, Range("above 0 and at most 1", lambda x: 0 < x <= 1)]
ContextBy = Literal["gather", "ring"]
Port = Annotated[int, Range("1024 to 65535", lambda n: 1024 <= n < 65536)]


class Option(NamedTuple):
    """A field that can be set: its key from the top, the dataclass that has it, and its type."""

    key: str
    owner: type
    field: Field[Any]
    hint: Any


_HINTS: dict[Any, dict[str, Any]] = {}  # evaluating them is slow, and a search asks often


def type_hints(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields by name, ranges included."""
    if kind not in _HINTS:
        _HINTS[kind] = get_type_hints(kind, include_extras=True)
    return _HINTS[kind]


def bare(hint: Any) -> Any:
    """A type without its range."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def range_of(hint: Any) -> Range | None:
    """The range of a type, or of the first part of it that has one."""
    if isinstance(hint, Range):
        return hint
    if get_origin(hint) is Annotated:
        return range_of(hint.__metadata__[0])
    return next(filter(None, map(range_of, get_args(hint))), None)


def section_of(hint: Any) -> Any:
    """The dataclass that a field of this type holds, or may hold; None if it holds a value."""
    kinds = (kind for kind in (hint, *get_args(hint)) if isinstance(kind, type))
    return next(filter(is_dataclass, kinds), None)


@cache
def _inner(kind: Any) -> tuple[str, ...]:
    """The fields of a dataclass that hold, or may hold, a dataclass."""
    return tuple(name for name, hint in type_hints(kind).items() if section_of(hint))


def walk(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(prefix, dataclass) of a section and of every section inside it, owners first."""
    yield prefix, section
    kind: Any = type(section)
    for name in _inner(kind):
        if is_dataclass(value := getattr(section, name)):
            yield from walk(value, f"{prefix}.{name}" if prefix else name)


def options(kind: type, prefix: str = "") -> Iterator[Option]:
    """Every option of a dataclass; those of a section inside it come last."""
    hints = type_hints(kind)
    for each in sorted(fields(kind), key=lambda each: section_of(hints[each.name]) is not None):
        if section := section_of(hints[each.name]):
            yield from options(section, f"{prefix}{each.name}.")
        else:
            yield Option(f"{prefix}{each.name}", kind, each, hints[each.name])


@cache
def _limits(kind: Any) -> tuple[tuple[str, tuple[Any, ...], Range | None], ...]:
    """The fields of a dataclass that hold certain words or numbers: name, words, range."""
    found = (
        (name, get_args(hint) if get_origin(hint) is Literal else (), range_of(hint))
        for name, hint in type_hints(kind).items()
    )
    return tuple((name, words, numbers) for name, words, numbers in found if words or numbers)


def out_of_range(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, problem) of every value that its field must not hold, sections inside included."""
    for above, owner in walk(section, prefix):
        kind: Any = type(owner)
        for name, words, allowed in _limits(kind):
            value = getattr(owner, name)
            if words:
                if value not in words:
                    key = f"{above}.{name}" if above else name
                    yield key, f"{key}={value!r} is unknown; use {join_or(words)}"
            elif allowed and value is not None:
                numbers = value if isinstance(value, tuple) else (value,)
                if not all(allowed.contains(n) and n < math.inf for n in numbers):
                    key = f"{above}.{name}" if above else name
                    yield key, f"{key}={value} is out of range; use {allowed.words}"


# ---- help


@cache
def descriptions(kind: Any) -> dict[str, str]:
    """The sentence below each field of a dataclass, read from its source.

    Empty where the source is not installed.
    """
    try:
        source = inspect.getsource(sys.modules[kind.__module__])
    except OSError:
        return {}
    (body,) = (
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__
    )
    found = {}
    for line, below in pairwise(body):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[line.target.id] = " ".join(text.value.split())
    return found


def explain(option: Option) -> str:
    """The help of an option: its sentence, then unit and default in brackets."""
    sentence = descriptions(option.owner).get(option.field.name, "")
    text, unit = re.fullmatch(r"(.*?)(?: \[(.*)\])?\.?", sentence).groups()  # type: ignore[union-attr]
    default = option.field.default
    words = {MISSING: "required", None: "default none", "": "default empty", (): "default empty"}
    shown = words.get(default, f"default {default}".lower())
    return f"{text} ({unit}; {shown})" if unit else f"{text} ({shown})"
