"""The configuration of a run as text: a TOML file, then ``--section.key=value`` on top.

::

    checkpoint.init_from ─> [model] ─┐
    recipe name or path ──> tables ──┤
    --optim.lr=1e-4     ──> on top ──┴─> names and types ─> Config ─> ranges and rules

No environment variable and no Python file takes part.  All problems are reported at once.
``dump_config`` writes TOML that loads back to an equal Config.
"""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from llamax.config.base_model import contradictions, pin_base, supply_model
from llamax.config.constants import CONFIG_FILE
from llamax.config.other_names import same_setting
from llamax.config.schema import Config, sections
from llamax.config.toml import Problems, build, parse_value, read_toml, to_toml
from llamax.config.types import bare, explain, options, section_of, type_hints
from llamax.config.validate import problems
from llamax.runtime.errors import MOST_PROBLEMS, ConfigError, did_you_mean, refuse

RECIPES = Path(__file__).parent / "recipes"
# A setting that is given takes the place of another one in the file.
REPLACES = {
    "run.steps": "run.epochs",
    "optim.warmup_steps": "optim.warmup_ratio",
    "optim.warmup_ratio": "optim.warmup_steps",
}
COMMAND_LINE = "command line"
INDENT = " " * 6


def recipes() -> list[str]:
    """The names of the recipes that come with llamax."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_config(
    name_or_path: str,
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    given_in: str = COMMAND_LINE,
    within: Path | None = Path(),
    node_ranks: int | None = None,
) -> Config:
    """The configuration of a recipe or a TOML file with command-line overrides on top.

    ``overrides`` are ``--section.key=value``, or ``--section.key`` and ``value`` as two items.  A
    length in steps replaces one in epochs, and a warm-up in steps one as a ratio.  The model of
    ``checkpoint.init_from`` takes the place of a recipe's, and fills that of a file.  ``given_in``
    is where the overrides come from, for messages.  ``world_size`` is in ranks, None where it is
    not known yet.  ``within`` is the folder of relative paths, None to open no folder: for the
    configuration that a run has written.
    ``node_ranks``: the ranks of a node, where tensor and context ranks must share one.

    Raises one ConfigError that lists every unknown name, every wrong type and, between the values
    that can be used, every rule that is broken.
    """
    path = find_config(name_or_path)
    recipe, where = is_recipe(path), source_name(path)
    tables = read_toml(path)
    if "recipe" in tables:
        raise ConfigError(
            f"{path} is a job file, which llamax launch and llamax doctor take as --job; --config "
            "takes a recipe's name or the TOML file of a run"
        )
    return parse_config(tables, overrides, world_size, where, given_in, recipe, within, node_ranks)


def recorded_config(path: str | Path) -> Config:
    """The configuration that a run has written; it is whole, and no other folder is opened."""
    return load_config(str(path), within=None)


def config_in(folder: Path) -> Config | None:
    """The configuration in a run's folder or a checkpoint; None without one of this llamax."""
    path = folder / CONFIG_FILE
    try:
        return recorded_config(path) if path.is_file() else None
    except ConfigError:
        return None


def is_recipe(path: Path) -> bool:
    """Whether the file is a recipe that comes with llamax."""
    return path.parent == RECIPES


def source_name(path: Path) -> str:
    """A recipe or another file in messages."""
    return f"recipe {path.stem}" if is_recipe(path) else str(path)


def find_config(name_or_path: str) -> Path:
    """The file of a recipe or of a path; raises ConfigError with the nearest name if neither."""
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
    raise ConfigError(f"no recipe is named {name_or_path!r}{did_you_mean(name_or_path, recipes())}")


def parse_config(
    tables: dict[str, Any],
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    where: str = "configuration",
    given_in: str = COMMAND_LINE,
    recipe: bool = False,
    within: Path | None = Path(),
    node_ranks: int | None = None,
) -> Config:
    """The configuration of parsed TOML ``tables``; see ``load_config``.

    An error names its origin: ``where``, ``given_in``, or both.
    """
    found, typed = Problems(), list[str]()
    tables = copy.deepcopy(tables)
    pairs = list(_pairs(overrides, typed))
    given, pinned = dict(pairs), ""
    if within is not None:
        settings = copy.deepcopy(tables)
        for key, text in pairs:
            _override(settings, key, text, [])
        pinned = pin_base(settings, within)
        supply_model(tables, settings, recipe, within)
    for key, text in pairs:
        _override(tables, key, text, typed)
    if pinned:
        tables.setdefault("checkpoint", {})["init_from"] = pinned
    typed += take_place(tables, given)
    config = build(Config, tables, found)
    broken = [*found.unknown, *found.unusable.values()]
    contradicting = [] if within is None or broken else [*contradictions(config, within)]
    broken += contradicting or problems(config, world_size, found.unusable, node_ranks)
    origins = [(given_in, problem) for problem in typed]
    for problem in broken:
        shown = len(origins) < MOST_PROBLEMS
        origins.append((_origin(problem, given, where, given_in) if shown else where, problem))
    if len({origin for origin, _ in origins}) == 1:
        refuse([problem for _, problem in origins], origins[0][0])
    refuse([text if origin == where else f"{origin}: {text}" for origin, text in origins], where)
    return config


def take_place(tables: dict[str, Any], given: Mapping[str, object]) -> Iterator[str]:
    """Drop from ``tables`` what settings in ``given``, by section.key, replace; their problems."""
    for key, other in REPLACES.items():
        section, _, name = other.partition(".")
        if key in given and other not in given and isinstance(tables.get(section), dict):
            tables[section].pop(name, None)
    steps, epochs = (given.get(f"run.{name}") for name in ("steps", "epochs"))
    if steps is not None and epochs not in (None, 0, "0"):
        yield f"run.steps={steps} and run.epochs={epochs} both set the length; use one of them"


def _origin(problem: str, given: dict[str, str], where: str, given_in: str) -> str:
    """Where the values that a problem names come from: ``where``, ``given_in``, or both."""
    what = problem.partition("; ")[0]  # without the remedy, which names other keys
    keys = {o.key for o in options(Config) if re.search(rf"(?<![\w.]){o.key}(?![\w.])", what)}
    if not keys & {*given}:
        return where
    named = [f"--{key}={given[key]}" for key in given if key in keys]
    return given_in if keys <= {*given} else f"{where} with {' '.join(named)}"


def _pairs(overrides: Sequence[str], wrong: list[str]) -> Iterator[tuple[str, str]]:
    """(section.key, text) of each override, from either spelling."""
    items = list(overrides)
    while items:
        item = items.pop(0)
        key, equals, text = item.removeprefix("--").partition("=")
        if not item.startswith("--"):
            wrong.append(f"{item!r} is not an option; write --section.key=value")
        elif equals:
            yield key, text
        elif items and not items[0].startswith("--"):
            yield key, items.pop(0)
        else:
            hint = same_setting(key) or f"; write --{key}=value"
            wrong.append(f"--{key} has no value{hint}")


def _override(tables: dict[str, Any], key: str, text: str, wrong: list[str]) -> None:
    """Put ``text`` into ``tables`` at ``key`` as the value that TOML would give its field."""
    hints = {option.key: bare(option.hint) for option in options(Config)}
    if text == "none":
        hints |= dict(_optional_sections())
    if key not in hints:
        hint = same_setting(key) or did_you_mean(key, hints)
        wrong.append(f"--{key} is an unknown option{hint}")
        return
    *sections_above, name = key.split(".")
    table: Any = tables
    for section in sections_above:
        if not isinstance(table.setdefault(section, {}), dict):
            return  # refused where its type is checked
        table = table[section]
    hint = hints[key]
    if text == "none" and NoneType in get_args(hint):
        table.pop(name, None)
    else:
        table[name] = text if hint is str or get_origin(hint) is Literal else parse_value(text)


def dump_config(config: Config) -> str:
    """TOML that ``load_config`` reads back to an equal Config."""
    lines: list[str] = []
    for prefix, section in sections(config):
        lines += ["", f"[{prefix}]"]
        for each in fields(section):
            value = getattr(section, each.name)
            if value is not None and not is_dataclass(value):
                lines.append(f"{each.name} = {to_toml(value)}")
    return "\n".join(lines[1:]) + "\n"


def help_text() -> str:
    """Every option with its type, sentence, unit and default, section by section."""
    lines, section, optional = [], "", dict(_optional_sections())
    for option in options(Config):
        if section != (section := option.key.rpartition(".")[0]):
            without = f" (--{section}=none: without)" if section in optional else ""
            lines += ["", f"{section}:{without}"]
        lines.append(f"  --{option.key}={_placeholder(option.hint)}")
        lines += describe(explain(option))
    return "\n".join(lines[1:]) + "\n"


def describe(text: str) -> list[str]:
    """The text below an option, in lines that fit a terminal of 80 columns."""
    return textwrap.wrap(text, 79, initial_indent=INDENT, subsequent_indent=INDENT)


def _optional_sections(kind: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(section, type) of every section that may be absent; ``none`` takes it away."""
    for name, hint in type_hints(kind).items():
        if section := section_of(hint):
            if NoneType in get_args(hint):
                yield prefix + name, hint
            yield from _optional_sections(section, f"{prefix}{name}.")


def _placeholder(hint: Any) -> str:
    """A type as one word of a command line."""
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    names = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT"}
    lists = any(get_origin(choice) is tuple for choice in get_args(hint))
    return names.get(bare(hint), "INT|[INT, ..]" if lists else "INT")
