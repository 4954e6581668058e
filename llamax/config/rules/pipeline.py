"""Rules on the stages of a pipeline, and the layers of each."""

from __future__ import annotations

from collections.abc import Iterator

from llamax.config.rules import Rules, World, divisors
from llamax.config.schema import Config, ParallelConfig
from llamax.runtime.errors import join_or

RULES = Rules()


def evenly(layers: int, stages: int) -> tuple[int, ...]:
    """``layers`` over ``stages``: the first ones take one more where they do not divide."""
    each, more = divmod(layers, stages)
    return tuple(each + (stage < more) for stage in range(stages))


def stage_layers(parallel: ParallelConfig, layers: int) -> tuple[int, ...]:
    """The number of layers of each stage.

    Raises ValueError where parallel.layers_per_stage is not a list of numbers.
    """
    if not parallel.layers_per_stage:
        return evenly(layers, parallel.pipeline)
    return tuple(map(int, parallel.layers_per_stage.split(",")))


def _written(counts: tuple[int, ...]) -> str:
    return ",".join(map(str, counts))


@RULES.reading("parallel.pipeline", "parallel.layers_per_stage", "model.num_hidden_layers")
def stages_hold_layers(c: Config, world: World) -> Iterator[str]:
    stages, layers = c.parallel.pipeline, c.model.num_hidden_layers
    if stages > layers:
        yield (
            f"parallel.pipeline={stages} leaves stages without a layer: "
            f"model.num_hidden_layers={layers}; use {layers} or less"
        )
    elif layers % stages and not c.parallel.layers_per_stage:
        yield (
            f"parallel.pipeline={stages} does not divide model.num_hidden_layers={layers}; "
            f"use {join_or(divisors(layers))}, or cut unevenly: "
            f"parallel.layers_per_stage={_written(evenly(layers, stages))}"
        )


@RULES.reading("parallel.pipeline", "parallel.layers_per_stage", "model.num_hidden_layers")
def stages_are_listed(c: Config, world: World) -> Iterator[str]:
    parallel, layers = c.parallel, c.model.num_hidden_layers
    text = parallel.layers_per_stage
    if not text or parallel.pipeline > layers:
        return
    example = _written(evenly(layers, parallel.pipeline))
    try:
        counts = stage_layers(parallel, layers)
    except ValueError:
        counts = (0,)
    if min(counts) < 1:
        yield (
            f"parallel.layers_per_stage={text!r:.60} is not a list of numbers from 1 on; "
            f"use {example} for example"
        )
    elif len(counts) != parallel.pipeline or sum(counts) != layers:
        yield (
            f"parallel.layers_per_stage={text:.60} gives {sum(counts)} layers to "
            f"{len(counts)} stages, but model.num_hidden_layers={layers} and "
            f"parallel.pipeline={parallel.pipeline}; use {example} for example"
        )


@RULES.reading("parallel.pipeline", "model.tie_word_embeddings")
def embeddings_of_stages_are_untied(c: Config, world: World) -> Iterator[str]:
    if c.parallel.pipeline > 1 and c.model.tie_word_embeddings:
        yield (
            f"parallel.pipeline={c.parallel.pipeline} puts the embedding on the first stage and "
            "the output matrix on the last, but model.tie_word_embeddings=true makes them one; "
            "use parallel.pipeline=1"
        )


@RULES.reading("parallel.pipeline", "run.backend", "run.recompute")
def traced_stages_recompute(c: Config, world: World) -> Iterator[str]:
    if c.parallel.pipeline > 1 and c.run.backend == "xla" and c.run.recompute != "full":
        yield (
            f"run.recompute={c.run.recompute} with parallel.pipeline={c.parallel.pipeline} on "
            "run.backend=xla keeps copies of weights for each microbatch in flight; use "
            "run.recompute=full"
        )


@RULES.reading("parallel.pipeline", "run.backend")
def traced_stages_pair(c: Config, world: World) -> Iterator[str]:
    ranks, stages = world.ranks, c.parallel.pipeline
    if stages > 1 and c.run.backend == "xla" and ranks is not None and ranks % 2:
        yield (
            f"parallel.pipeline={stages} on run.backend=xla pairs all ranks in its swaps, and the "
            f"world of {ranks} ranks is odd; use an even number of ranks"
        )
