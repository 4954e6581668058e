"""A configuration as text: a TOML file, then ``--section.key=value`` on top; nothing else.

::

    recipe name or path ──> tables ──┐
    --optim.lr=1e-4     ──> on top ──┴─> types and names checked ─> Config ─> rules checked

No environment variable and no Python file takes part, and nothing is guessed: an unknown key is
refused with the nearest name, a value of another type is refused, all problems are told at once.
``dump`` writes TOML that loads back to an equal Config.
"""

from __future__ import annotations

import copy
import difflib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llamax.config.rules import either
from llamax.config.schema import Config, sections
from llamax.config.validate import problems
from llamax.runtime.errors import ConfigError, refuse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

RECIPES = Path(__file__).parent / "recipes"
WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def recipes() -> list[str]:
    """The names of the recipes that come with llamax."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_config(
    name_or_path: str, overrides: Sequence[str] = (), world_size: int | None = None
) -> Config:
    """The configuration of a recipe or a TOML file with command-line overrides on top.

    ``overrides`` are ``--section.key=value``, or ``--section.key`` and ``value`` as two items.
    Raises one ConfigError that lists every unknown name, every wrong type and, between the values
    that can be used, every rule that does not hold on ``world_size`` ranks (None: not known yet).
    """
    path = find_config(name_or_path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None
    return parse_config(tables, overrides, world_size, where=str(path))


def find_config(name_or_path: str) -> Path:
    """The file of a recipe's name or of a path; ConfigError with the nearest name if neither."""
    if name_or_path in recipes():
        return RECIPES / f"{name_or_path}.toml"
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix == ".toml" or len(path.parts) > 1:
        near = f", {path.stem} for example" if path.stem in recipes() else ""
        raise ConfigError(
            f"{path}: no such file; --config takes a recipe's name{near} or a TOML file"
        )
    raise ConfigError(f"no recipe is named {name_or_path!r}{nearest(name_or_path, recipes())}")


def parse_config(
    tables: dict[str, Any],
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    where: str = "configuration",
) -> Config:
    """The configuration of parsed TOML ``tables``; see ``load``."""
    unknown: list[str] = []
    wrong: dict[str, str] = {}
    tables = copy.deepcopy(tables)
    for key, text in _pairs(overrides, unknown):
        _override(tables, key, text, unknown)
    config: Config = build(Config, tables, "", wrong, unknown)
    refuse([*unknown, *wrong.values(), *problems(config, world_size, wrong)], where)
    return config


def nearest(name: str, names: Iterable[str]) -> str:
    """``; did you mean ...?``, or what there is where no name is near."""
    names = list(names)
    same_leaf = [known for known in names if known.rpartition(".")[2] == name]
    if close := same_leaf or difflib.get_close_matches(name.lower(), names, n=1):
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(names)}" if len(names) <= 16 else "; see --help"


# ---- from text to values


def _pairs(overrides: Sequence[str], found: list[str]) -> Iterator[tuple[str, str]]:
    """(section.key, text) of each override, from either spelling."""
    items = list(overrides)
    while items:
        item = items.pop(0)
        key, equals, text = item.removeprefix("--").partition("=")
        if not item.startswith("--"):
            found.append(f"{item!r} is not an option; write --section.key=value")
        elif equals:
            yield key, text
        elif items and not items[0].startswith("--"):
            yield key, items.pop(0)
        else:
            found.append(f"--{key} has no value; write --{key}=value")


def _override(tables: dict[str, Any], key: str, text: str, found: list[str]) -> None:
    """Put ``text`` into ``tables`` at ``key`` as the value its field would read from TOML."""
    hints = {known: hint for known, _, hint in _options()}
    if text == "none":
        hints |= dict(_optional_sections())
    if key not in hints:
        found.append(f"--{key} is an unknown option{nearest(key, hints)}")
        return
    *sections_above, name = key.split(".")
    table: Any = tables
    for section in sections_above:
        if not isinstance(table.setdefault(section, {}), dict):
            return  # refused below, where its type is checked
        table = table[section]
    hint = hints[key]
    if text == "none" and NoneType in get_args(hint):
        table.pop(name, None)
    elif hint is str or get_origin(hint) is Literal:
        table[name] = text
    else:
        try:
            table[name] = tomllib.loads(f"value = {text}")["value"]
        except ValueError:  # not TOML
            table[name] = text  # refused below, where its type is checked


def build(kind: Any, table: Any, prefix: str, wrong: dict[str, str], unknown: list[str]) -> Any:
    """An instance of dataclass ``kind`` from a TOML table.

    Names that it does not have are left out, with a line in ``unknown``.  A key whose value cannot
    be used gets a line in ``wrong``; the instance has its default there or, where a key is
    required, a value that means nothing.
    """
    if not isinstance(table, dict):
        wrong[prefix] = f"{prefix}={table!r} is {_kind(table)}; write it as a section [{prefix}]"
        return build(kind, {}, prefix, {}, [])
    hints, values = get_type_hints(kind), {}
    dot = f"{prefix}." if prefix else ""
    for name, value in table.items():
        if name not in hints:
            what = "section" if kind is Config else "key"
            unknown.append(f"{dot}{name} is an unknown {what}{nearest(name, hints)}")
        elif section := _section(hints[name]):
            values[name] = build(section, value, dot + name, wrong, unknown)
        else:
            try:
                values[name] = _fit(value, hints[name])
            except (TypeError, OverflowError):
                strange = isinstance(value, str) and get_origin(hints[name]) is Literal
                wrong[dot + name] = (
                    f"{dot}{name}={json.dumps(value, default=str)} is "
                    f"{'unknown' if strange else _kind(value)}; write {_wanted(hints[name])}"
                )
    for each in fields(kind):
        if each.name not in values and each.default is MISSING:
            hint, key = hints[each.name], dot + each.name
            wrong.setdefault(key, f"{key} is missing; write {_wanted(hint)}")
            values[each.name] = build(hint, {}, key, {}, []) if _section(hint) else hint()
    return kind(**values)


def _fit(value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` wants it, or TypeError; the only change of type is int to float."""
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
    elif get_origin(hint) is tuple:
        if isinstance(value, list):
            return tuple(_fit(item, get_args(hint)[0]) for item in value)
    elif get_args(hint):  # a union; None has no spelling in TOML
        wanted = tuple if isinstance(value, list) else type(value)
        for choice in get_args(hint):
            if (get_origin(choice) or choice) is wanted:
                return _fit(value, choice)
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    raise TypeError


def _section(hint: Any) -> Any:
    """The dataclass that a field holds (or may hold), or None."""
    return next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)


def _kind(value: Any) -> str:
    """The type of a TOML value in words."""
    names: dict[type, str] = {
        bool: "a truth value",
        int: "an integer",
        float: "a float",
        str: "a string",
        list: "a list",
        dict: "a table",
    }
    return names.get(type(value), "a date or time")


def _wanted(hint: Any) -> str:
    """What a field takes, in words."""
    if section := _section(hint):
        return f"a section with {', '.join(each.name for each in fields(section))}"
    if get_origin(hint) is Literal:
        return either(get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {WORDS[get_args(hint)[0]].split()[1]}s"
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] or [hint]
    return " or ".join(WORDS.get(kind) or _wanted(kind) for kind in kinds)


# ---- from values to text


def dump_config(config: Config) -> str:
    """TOML that ``load`` reads back to an equal Config."""
    lines: list[str] = []
    for prefix, section in sections(config):
        lines += ["", f"[{prefix}]"]
        for each in fields(section):
            value = getattr(section, each.name)
            if value is not None and not is_dataclass(value):
                lines.append(f"{each.name} = {toml(value)}")
    return "\n".join(lines[1:]) + "\n"


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def help_text() -> str:
    """Every option with its type, one line, unit and default, section by section."""
    lines, section, optional = [], "", dict(_optional_sections())
    for key, each, hint in _options():
        if section != (section := key.rpartition(".")[0]):
            without = f" (--{section}=none: without)" if section in optional else ""
            lines += ["", f"{section}:{without}"]
        option = f"--{key}={_placeholder(hint)}"
        default = {MISSING: "required", None: "default none", "": "default empty"}.get(
            each.default, f"default {each.default}".lower()
        )
        unit = f"{each.metadata['unit']}; " if each.metadata["unit"] else ""
        lines.append(f"  {option:<48}  {each.metadata['help']} ({unit}{default})")
    return "\n".join(lines[1:]) + "\n"


def _options(kind: Any = Config, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """(section.key, field, type) of every option; sections inside a section come last."""
    hints = get_type_hints(kind)
    for each in sorted(fields(kind), key=lambda each: _section(hints[each.name]) is not None):
        if section := _section(hints[each.name]):
            yield from _options(section, f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}", each, hints[each.name]


def _optional_sections(kind: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(section, type) of every section that may be absent; ``none`` takes it away."""
    for name, hint in get_type_hints(kind).items():
        if section := _section(hint):
            if NoneType in get_args(hint):
                yield prefix + name, hint
            yield from _optional_sections(section, f"{prefix}{name}.")


def _placeholder(hint: Any) -> str:
    """A type as one word of a command line."""
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    names = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT"}
    return names.get(hint, "INT|[INT, ..]" if any(map(get_args, get_args(hint))) else "INT")
