"""What must hold in a configuration: the range of every field, then the rules between fields."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from llamax.config.model import ModelConfig
from llamax.config.rules import World, finetune, model, parallel, pipeline, training, zero
from llamax.config.rules.parallel import batch_divides
from llamax.config.schema import Config, DataConfig, ParallelConfig, RunConfig
from llamax.config.types import out_of_range
from llamax.runtime.errors import ConfigError, refuse

RULES = [
    *model.RULES,
    *parallel.RULES,
    *pipeline.RULES,
    *zero.RULES,
    *training.RULES,
    *finetune.RULES,
]


def problems(
    config: Config,
    world_size: int | None = None,
    unusable: Iterable[str] = (),
    node_ranks: int | None = None,
    *,
    advises: bool = True,
) -> list[str]:
    """Everything that is wrong with a configuration, one line each, single fields first.

    ``world_size`` is in ranks, None where it is not known yet.  ``unusable`` names the keys and
    sections that hold no value to judge; no rule that reads one of them runs.  ``node_ranks``: the
    ranks of a node, where tensor and context ranks must share one.  Without ``advises`` it takes
    less time, and what a line suggests need not hold.
    """
    unusable = set(unusable)
    if unusable & {"model.hidden_size", "model.num_attention_heads"}:
        unusable.add("model.head_dim")  # follows from them

    def usable(key: str) -> bool:
        section, _, _ = key.rpartition(".")
        return key not in unusable and (not section or usable(section))

    broken = {key: line for key, line in out_of_range(config) if usable(key)}
    found = list(broken.values())
    for keys, holds in RULES:
        if broken.keys().isdisjoint(keys) and (not unusable or all(map(usable, keys))):
            found += holds(config, World(world_size, node_ranks, advises))
    return found


def check(config: Config, world_size: int | None = None, node_ranks: int | None = None) -> None:
    """Raise one ConfigError that lists all problems of a configuration, if there are any."""
    refuse(problems(config, world_size, (), node_ranks), "configuration")


def check_model(
    model: ModelConfig, tensor: int, recompute: Literal["none", "selective", "full"]
) -> None:
    """Raise one ConfigError with every reason why ``tensor`` ranks cannot hold such a model."""
    if not isinstance(model, ModelConfig):
        raise ConfigError(
            f"Llama takes a ModelConfig, not {type(model).__name__}; give the section `model` of a "
            "configuration, or ModelConfig(hidden_size=...)"
        )
    parallel, data = ParallelConfig(tensor=tensor, sequence=False), DataConfig(sequence_length=1)
    check(Config(model, parallel, data=data, run=RunConfig(recompute=recompute)))


def accumulation(config: Config, data_degree: int) -> int:
    """Microsteps in one optimizer step on ``data_degree`` data ranks.

    Raises ConfigError if the global batch is not a whole number of them.
    """
    for problem in batch_divides(config.data, data_degree):
        raise ConfigError(problem)
    return config.data.global_batch // (config.data.micro_batch * data_degree)
