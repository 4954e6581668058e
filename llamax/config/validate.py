"""What must hold in a configuration: the range of every field, then the rules between fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

from llamax.config.model import RopeScaling
from llamax.config.rules import either, finetune, model, parallel, training
from llamax.config.rules.parallel import batch_divides
from llamax.config.schema import Config, sections
from llamax.runtime.errors import ConfigError, refuse

RULES = [*model.RULES, *parallel.RULES, *training.RULES, *finetune.RULES]
HINTS = {kind: get_type_hints(kind) for kind in (RopeScaling, *get_type_hints(Config).values())}


def problems(
    config: Config, world_size: int | None = None, unusable: Iterable[str] = ()
) -> list[str]:
    """Everything that is wrong with a configuration, one line each, single fields first.

    ``world_size`` is in ranks, None where it is not known yet.  ``unusable`` names the keys and
    sections that hold no value to judge; no rule that reads one of them runs.
    """
    unusable = set(unusable)
    if unusable & {"model.hidden_size", "model.num_attention_heads"}:
        unusable.add("model.head_dim")  # follows from them

    def usable(key: str) -> bool:
        section, _, _ = key.rpartition(".")
        return key not in unusable and (not section or usable(section))

    broken = {key: line for key, line in _out_of_range(config) if usable(key)}
    found = list(broken.values())
    for keys, holds in RULES:
        if broken.keys().isdisjoint(keys) and all(map(usable, keys)):
            found += holds(config, world_size)
    return found


def check(config: Config, world_size: int | None = None) -> None:
    """Raise one ConfigError that lists all problems of a configuration, if there are any."""
    refuse(problems(config, world_size), "configuration")


def accumulation(config: Config, data_degree: int) -> int:
    """Microsteps in one optimizer step on ``data_degree`` data ranks.

    Raises ConfigError if the global batch is not a whole number of them.
    """
    for problem in batch_divides(config.data, data_degree):
        raise ConfigError(problem)
    return config.data.global_batch // (config.data.micro_batch * data_degree)


def _out_of_range(config: Config) -> Iterator[tuple[str, str]]:
    for prefix, section in sections(config):
        hints = HINTS[type(section)]
        for each in fields(section):
            key, value = f"{prefix}.{each.name}", getattr(section, each.name)
            allowed = each.metadata["range"]
            if get_origin(hints[each.name]) is Literal:
                choices = get_args(hints[each.name])
                if value not in choices:
                    yield key, f"{key}={value!r} is unknown; use {either(choices)}"
            elif allowed and value is not None:
                numbers = value if isinstance(value, tuple) else (value,)
                if not all(allowed.holds(number) for number in numbers):
                    yield key, f"{key}={value} is out of range; use {allowed.words}"
