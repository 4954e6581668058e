"""TOML to typed sections and back, strictly: for runs, jobs and machines.

::

    file ──read_toml──> tables ──build──> dataclass + Problems

Nothing is guessed: an unknown key is refused with the nearest name, a value of another type is
refused, and all problems are reported at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

from llamax.config.other_names import same_setting
from llamax.config.types import bare, out_of_range, section_of, type_hints
from llamax.runtime.errors import MOST_PROBLEMS, ConfigError, did_you_mean, join_or
from llamax.runtime.files import read_input
from llamax.runtime.json_reader import MAX_DEPTH, too_deep

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

T = TypeVar("T")
ARTICLES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
KINDS: dict[type, str] = {
    bool: "a truth value",
    int: "an integer",
    float: "a float",
    str: "a string",
    list: "a list",
    dict: "a table",
}


@dataclass
class Problems:
    """What is wrong with a table."""

    unknown: list[str] = field(default_factory=list)
    """A line for each unknown name."""
    unusable: dict[str, str] = field(default_factory=dict)
    """A line for each key that is missing or whose value has another type."""

    def lines(self, section: Any, prefix: str = "") -> list[str]:
        """All lines, with those for values of ``section`` that are out of range."""
        ranges = [line for key, line in out_of_range(section, prefix) if not self.covers(key)]
        return [*self.unknown, *self.unusable.values(), *ranges]

    def covers(self, key: str) -> bool:
        """Whether a key, or a section around it, holds no usable value."""
        section, _, _ = key.rpartition(".")
        return key in self.unusable or bool(section and self.covers(section))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file; raises ConfigError if it is absent or cannot be read as TOML."""
    try:
        tables = parse_toml(read_input(path).decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{path}: cannot be read as TOML: {why}") from None
    return tables


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text; ValueError or RecursionError if it is none, or nested deeply."""
    tables: dict[str, Any] = tomllib.loads(text)
    if too_deep(tables):
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    return tables


def build(
    kind: type[T],
    table: Any,
    problems: Problems,
    prefix: str = "",
    given: Mapping[str, Any] | None = None,
    also: Iterable[str] = (),
) -> T:
    """A dataclass from a TOML table; what is wrong with the table is added to ``problems``.

    ``given`` are fields that do not come from the table, and are no key of it.  ``also``: keys that
    the caller reads, for hints alone.  A field whose value cannot be used has its default or, where
    it is required, any value of its type.
    """
    values = dict(given or {})
    if not isinstance(table, dict):
        problems.unusable[prefix] = (
            f"{prefix}={table!r} is {_kind(table)}; write it as a section [{prefix}]"
        )
        return build(kind, {}, Problems(), prefix, given)
    hints = {name: hint for name, hint in type_hints(kind).items() if name not in values}
    dot = f"{prefix}." if prefix else ""
    for name, value in table.items():
        if name not in hints:
            what = "section" if all(map(section_of, hints.values())) else "key"
            shown = len(problems.unknown) < MOST_PROBLEMS
            hint = (same_setting(name) or did_you_mean(name, [*hints, *also])) if shown else ""
            problems.unknown.append(f"{dot}{name} is an unknown {what}{hint}")
        elif section := section_of(hints[name]):
            values[name] = build(section, value, problems, dot + name)
        else:
            try:
                values[name] = _fit(value, bare(hints[name]))
            except (TypeError, OverflowError):
                strange = isinstance(value, str) and get_origin(hints[name]) is Literal
                problems.unusable[dot + name] = (
                    f"{dot}{name}={json.dumps(value, default=str)} is "
                    f"{'unknown' if strange else _kind(value)}; write {_wanted(hints[name])}"
                )
    for each in fields(kind):  # type: ignore[arg-type]
        if each.name not in values and each.default is MISSING:
            hint, key = hints[each.name], dot + each.name
            problems.unusable.setdefault(key, f"{key} is missing; write {_wanted(hint)}")
            values[each.name] = _any(hint)
    return kind(**values)


def _any(hint: Any) -> Any:
    """Any value of a type, to stand in for one that is missing."""
    if section := section_of(hint):
        return build(section, {}, Problems())
    return get_args(hint)[0] if get_origin(hint) is Literal else bare(hint)()


def _fit(value: Any, hint: Any) -> Any:
    """``value`` as a field of this type holds it; raises TypeError unless it is of that type.

    The only conversions are from an integer to a float and from a list to a tuple.
    """
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
    elif get_origin(hint) is tuple:
        if isinstance(value, list):
            return tuple(_fit(item, bare(get_args(hint)[0])) for item in value)
    elif get_args(hint):  # a union; None has no spelling in TOML
        wanted = tuple if isinstance(value, list) else type(value)
        for choice in map(bare, get_args(hint)):
            if (get_origin(choice) or choice) is wanted:
                return _fit(value, choice)
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    raise TypeError


def _kind(value: Any) -> str:
    """The type of a TOML value in words."""
    return KINDS.get(type(value), "a date or time")


def _wanted(hint: Any) -> str:
    """What a field takes, in words."""
    hint = bare(hint)
    if section := section_of(hint):
        needed = [each.name for each in fields(section) if each.default is MISSING]
        return f"a section with {', '.join(needed or [each.name for each in fields(section)])}"
    if get_origin(hint) is Literal:
        return join_or(get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {ARTICLES[bare(get_args(hint)[0])].split()[1]}s"
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] or [hint]
    return " or ".join(ARTICLES.get(bare(kind)) or _wanted(kind) for kind in kinds)


def parse_value(text: str) -> Any:
    """A value from the command line, spelled as in TOML; the text itself if it is not TOML."""
    try:
        return parse_toml(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def to_toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(to_toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
