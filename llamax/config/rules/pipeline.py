"""Rules on the stages of a pipeline, and the layers of each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from llamax.config.rules import (
    Rules,
    World,
    divisors,
    fitting,
    multiples_near,
    use,
    ways,
)
from llamax.config.schema import Config, ParallelConfig
from llamax.runtime.errors import join_or

RULES = Rules()


@cache
def evenly(layers: int, stages: int) -> tuple[int, ...]:
    """``layers`` over ``stages``: the first ones take one more where they do not divide."""
    each, more = divmod(layers, stages)
    return tuple(each + (stage < more) for stage in range(stages))


def chunk_layers(parallel: ParallelConfig, layers: int) -> tuple[int, ...]:
    """The number of layers of each chunk: the first of every stage, then the second, and so on.

    Raises ValueError where parallel.layers_per_stage is not a list of numbers.
    """
    if not parallel.layers_per_stage:
        return evenly(layers, parallel.pipeline * parallel.chunks)
    return tuple(map(int, parallel.layers_per_stage.split(",")))


def stage_layers(parallel: ParallelConfig, layers: int) -> tuple[int, ...]:
    """The number of layers of each stage, over its chunks; raises as ``chunk_layers``."""
    counts, stages = chunk_layers(parallel, layers), parallel.pipeline
    return tuple(sum(counts[stage::stages]) for stage in range(stages))


def splits(stages: int, chunks: int, recompute: str, backend: str) -> bool:
    """Whether stages put the gradients of weights off, so that others wait less for them.

    They keep more activations then, which ``run.recompute=full`` is not to do.
    """
    return stages > 1 and chunks == 1 and recompute != "full" and backend in ("cpu", "cuda")


def _written(counts: tuple[int, ...]) -> str:
    return ",".join(map(str, counts))


CUT = (
    "parallel.pipeline",
    "parallel.chunks",
    "parallel.layers_per_stage",
    "model.num_hidden_layers",
)


def _named(parallel: ParallelConfig) -> str:
    chunks = f" x parallel.chunks={parallel.chunks}" if parallel.chunks > 1 else ""
    return f"parallel.pipeline={parallel.pipeline}{chunks}"


@RULES.reading(*CUT)
def stages_hold_layers(c: Config, world: World) -> Iterator[str]:
    stages, layers = c.parallel.pipeline, c.model.num_hidden_layers
    if stages > layers:
        yield (
            f"parallel.pipeline={stages} leaves stages without a layer: "
            f"model.num_hidden_layers={layers}"
            f"{ways(use(c, world, 'parallel.pipeline', divisors(layers)))}"
        )
    elif layers % stages and not c.parallel.layers_per_stage:
        pieces = stages * c.parallel.chunks
        pieces = pieces if pieces <= layers else stages  # then with the chunks of the next rule
        uneven = f"parallel.layers_per_stage={_written(evenly(layers, pieces))}"
        yield (
            f"parallel.pipeline={stages} does not divide model.num_hidden_layers={layers}"
            f"{ways(use(c, world, 'parallel.pipeline', divisors(layers)), uneven)}"
        )


@RULES.reading(*CUT)
def chunks_hold_layers(c: Config, world: World) -> Iterator[str]:
    stages, chunks, layers = c.parallel.pipeline, c.parallel.chunks, c.model.num_hidden_layers
    if chunks == 1 or stages == 1 or stages > layers:
        return
    if stages * chunks > layers:
        yield (
            f"{_named(c.parallel)} leaves chunks without a layer: "
            f"model.num_hidden_layers={layers}{ways(_chunks(c, world))}"
        )
    elif layers % stages == 0 and layers // stages % chunks and not c.parallel.layers_per_stage:
        fewer = use(c, world, "parallel.chunks", divisors(layers // stages))
        uneven = f"parallel.layers_per_stage={_written(evenly(layers, stages * chunks))}"
        yield (
            f"parallel.chunks={chunks} does not divide the {layers // stages} layers of a stage"
            f"{ways(fewer, uneven)}"
        )


def _chunks(c: Config, world: World) -> str:
    """Fewer chunks that may be suggested: equal ones, or the most with the layers of each."""
    stages, layers = c.parallel.pipeline, c.model.num_hidden_layers
    if not c.parallel.layers_per_stage and layers % stages == 0:
        return use(c, world, "parallel.chunks", divisors(layers // stages), named=True)
    fewer = range(layers // stages, 0, -1)
    texts = [_written(evenly(layers, stages * chunks)) for chunks in fewer]
    tried = [
        {"parallel.chunks": chunks, "parallel.layers_per_stage": text}
        for chunks, text in zip(fewer, texts, strict=True)
    ]
    found = fitting(c, world, tried)
    return " and ".join(f"{key}={value}" for key, value in found[0].items()) if found else ""


@RULES.reading("parallel.pipeline", "parallel.chunks", "model.num_hidden_layers")
def chunks_are_of_stages(c: Config, world: World) -> Iterator[str]:
    if c.parallel.chunks > 1 and c.parallel.pipeline == 1:
        several = divisors(c.model.num_hidden_layers)[1:]
        yield (
            f"parallel.chunks={c.parallel.chunks} divides the stages of a pipeline, and "
            "parallel.pipeline=1 has one"
            f"{ways('parallel.chunks=1', use(c, world, 'parallel.pipeline', several, named=True))}"
        )


@RULES.reading(
    "parallel.pipeline",
    "parallel.chunks",
    "parallel.tensor",
    "parallel.context",
    "parallel.data",
    "data.global_batch",
    "data.micro_batch",
    "model.num_hidden_layers",
)
def microsteps_fill_chunks(c: Config, world: World) -> Iterator[str]:
    parallel, stages = c.parallel, c.parallel.pipeline
    if parallel.chunks == 1 or stages == 1 or world.ranks is None:
        return
    if stages * parallel.chunks > c.model.num_hidden_layers:
        return
    left = world.ranks // (parallel.tensor * parallel.context * stages)
    data = parallel.data or left or 1
    microsteps, rest = divmod(c.data.global_batch, c.data.micro_batch * data)
    if not rest and microsteps % stages:
        unit = c.data.micro_batch * data * stages
        yield (
            f"parallel.chunks={parallel.chunks} sends groups of parallel.pipeline={stages} "
            f"microbatches through each chunk, but a step has {microsteps}; use "
            f"data.global_batch={join_or(multiples_near(c.data.global_batch, unit))}, or "
            "parallel.chunks=1"
        )


@RULES.reading(*CUT)
def stages_are_listed(c: Config, world: World) -> Iterator[str]:
    parallel, layers = c.parallel, c.model.num_hidden_layers
    text, pieces = parallel.layers_per_stage, parallel.pipeline * parallel.chunks
    if not text or pieces > layers:
        return
    example = _written(evenly(layers, pieces))
    try:
        counts = chunk_layers(parallel, layers)
    except ValueError:
        counts = (0,)
    if min(counts) < 1:
        yield (
            f"parallel.layers_per_stage={text!r:.60} is not a list of numbers from 1 on; "
            f"use {example} for example"
        )
    elif len(counts) != pieces or sum(counts) != layers:
        yield (
            f"parallel.layers_per_stage={text:.60} gives {sum(counts)} layers to "
            f"{len(counts)} {'chunks' if parallel.chunks > 1 else 'stages'}, but "
            f"model.num_hidden_layers={layers} and {_named(parallel)}; use {example} for example"
        )


@RULES.reading("parallel.pipeline", "run.backend", "run.recompute")
def traced_stages_recompute(c: Config, world: World) -> Iterator[str]:
    if c.parallel.pipeline > 1 and c.run.backend == "xla" and c.run.recompute != "full":
        yield (
            f"run.recompute={c.run.recompute} with parallel.pipeline={c.parallel.pipeline} on "
            "run.backend=xla keeps copies of weights for each microbatch in flight; use "
            "run.recompute=full"
        )


@RULES.reading("parallel.pipeline", "parallel.tensor", "parallel.context", "run.backend")
def traced_stages_pair(c: Config, world: World) -> Iterator[str]:
    ranks, stages = world.ranks, c.parallel.pipeline
    if stages > 1 and c.run.backend == "xla" and ranks is not None and ranks % 2:
        even = multiples_near(ranks, 2 * stages * c.parallel.tensor * c.parallel.context)
        yield (
            f"parallel.pipeline={stages} on run.backend=xla pairs all ranks in its swaps, and the "
            f"world of {ranks} ranks is odd; start an even number of ranks, {join_or(even)}"
        )
