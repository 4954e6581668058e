"""Every layout of a run on its machines: those that fit, best first, and why others do not.

Tried are all tensor degrees that divide the world, context degrees of powers of two that leave
chunks of ``SHORTEST_CHUNK`` tokens or more, pipelines of equal and of nearly equal stages, equal
stages also in chunks, ZeRO stages, also over the data ranks of a node, where those span several,
all recompute modes and micro-batches of powers of two;
parallel.data is the rest of the world.  Context ranks gather keys and values, and pass them around
a ring, which is slower, where that does not fit or is tight.  Every other setting stays as
configured.  Tensor and context ranks share a node, on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from llamax.config.constants import FLASH_MULTIPLE
from llamax.config.hardware import Machine
from llamax.config.rules import divisors
from llamax.config.rules.pipeline import evenly
from llamax.config.schema import Config, ParallelConfig
from llamax.config.types import ZeroStage
from llamax.config.validate import problems
from llamax.tools.plan.context import keys_at_most
from llamax.tools.plan.length import Length, length_of
from llamax.tools.plan.memory import MARGIN, Recompute
from llamax.tools.plan.planner import Plan, plan_length
from llamax.tools.plan.sizes import Share

SHORTEST_CHUNK = FLASH_MULTIPLE  # tokens; shorter chunks are faster on more data ranks
CHUNKS = 1, 2, 4  # of a stage; more of them hardly shorten the wait of a pipeline
UNEVEN = 1 / 6  # layers that the fullest stage has above the mean, at most


@dataclass(frozen=True)
class Refused:
    """An invalid configuration, and the first reason.

    What the reason suggests holds for the first one of a tensor degree without a valid layout.
    """

    config: Config
    reason: str


def candidates(
    config: Config, machine: Machine, nodes: int, stages: Sequence[ZeroStage]
) -> Iterator[Config]:
    """Every configuration that ``search`` tries on ``nodes`` machines."""
    world = nodes * machine.ranks
    batches = [2**k for k in range(6) if 2**k <= config.data.global_batch]
    for tensor in divisors(world):
        for context in contexts(config, world // tensor):
            for parallel in divisions(config, machine, nodes, tensor, context, stages):
                for micro_batch in batches:
                    data = replace(config.data, micro_batch=micro_batch)
                    for mode in modes(config, parallel, machine):
                        run = replace(config.run, recompute=mode)
                        yield replace(config, parallel=parallel, data=data, run=run)


def divisions(
    config: Config,
    machine: Machine,
    nodes: int,
    tensor: int,
    context: int,
    stages: Sequence[ZeroStage],
) -> Iterator[ParallelConfig]:
    """The pipelines, and the ZeRO ``stages`` tried with a tensor and a context degree.

    Only the configured ones where tensor and context ranks do not share a node: all are refused.
    """
    configured = replace(
        config.parallel, tensor=tensor, context=context, context_by="gather", data=0
    )
    if machine.ranks % (tensor * context):
        yield configured
        return
    rest = nodes * machine.ranks // (tensor * context)
    for pipeline in pipelines(config):
        if pipeline != configured.pipeline and rest % pipeline:
            continue
        tried = stages if rest * context > pipeline else [configured.zero]
        if pipeline > 1:
            tried = [zero for zero in tried if zero < 2] or [1]
        for chunks in chunk_counts(config, pipeline):
            cut = replace(configured, pipeline=pipeline, chunks=chunks)
            for zero in tried:
                for ranks in groups(config, machine, tensor, rest * context // pipeline, zero):
                    yield replace(cut, zero=zero, zero_ranks=ranks)
    zero = configured.zero if configured.zero < 2 else 1
    for counts in uneven(config, rest):
        text = ",".join(map(str, counts))
        cut = replace(configured, pipeline=len(counts), chunks=1, layers_per_stage=text)
        ranks, *_ = groups(config, machine, tensor, rest * context // len(counts), zero)
        yield replace(cut, zero=zero, zero_ranks=ranks)


def groups(config: Config, machine: Machine, tensor: int, data: int, zero: ZeroStage) -> list[int]:
    """The parallel.zero_ranks tried, the configured one first, if it divides the ``data`` ranks.

    Those of a node are tried where weights or gradients of a microstep would cross the network.
    """
    configured, node = config.parallel.zero_ranks, machine.ranks // tensor
    fits = zero > 0 and configured and data % configured == 0
    tried = [configured if fits else 0]
    sharded = config.finetune.method == "qlora" and config.finetune.shard_base
    if (zero > 1 or (zero and sharded)) and 1 < node < data:
        tried += [0, node]
    return [*dict.fromkeys(tried)]


def chunk_counts(config: Config, pipeline: int) -> list[int]:
    """The numbers of chunks tried of each stage of a pipeline, the configured one first."""
    configured, layers = config.parallel.chunks, config.model.num_hidden_layers
    if pipeline == 1:
        return [1]
    if config.parallel.layers_per_stage:
        return [configured]
    fitting = (chunks for chunks in CHUNKS if layers % (pipeline * chunks) == 0)
    return [*dict.fromkeys((configured, *fitting))]


def uneven(config: Config, ranks: int) -> Iterator[tuple[int, ...]]:
    """The layers of each stage, for every pipeline tried whose stages differ by one layer.

    The number of stages divides ``ranks`` and not the number of layers.  The first stages have one
    layer more, because the last one has the output matrix too.
    """
    layers = config.model.num_hidden_layers
    if config.parallel.layers_per_stage:
        return
    for stages in divisors(ranks):
        fullest = -(-layers // stages)
        if layers % stages and fullest * stages <= (1 + UNEVEN) * layers:
            yield evenly(layers, stages)


def pipelines(config: Config) -> list[int]:
    """The pipeline degrees tried, the configured one first: those of equal stages."""
    configured, layers = config.parallel.pipeline, config.model.num_hidden_layers
    if config.parallel.layers_per_stage:
        return [configured]
    return [*dict.fromkeys((configured, *divisors(layers)))]


def zeros(config: Config) -> list[ZeroStage]:
    """The ZeRO stages tried, the configured one first.

    Adapters leave stage 2 nothing to cut, and QLoRA stage 3.
    """
    configured, method = config.parallel.zero, config.finetune.method
    tried: list[ZeroStage] = [configured, 1]
    tried += [2] if method == "full" else []
    tried += [3] if method != "qlora" else []
    return [*dict.fromkeys(tried)]


def modes(config: Config, parallel: ParallelConfig, machine: Machine) -> tuple[Recompute, ...]:
    """The recompute modes tried: full alone on XLA for stages and for weights cut by ZeRO-3."""
    cut = parallel.zero == 3 and config.finetune.method == "full"
    full = traced(config, machine) and (parallel.pipeline > 1 or cut)
    return ("full",) if full else get_args(Recompute)


def traced(config: Config, machine: Machine) -> bool:
    """Whether the run compiles its steps, by its backend or by that of the machine."""
    return "xla" in (config.run.backend, machine.backend)


def contexts(config: Config, ranks: int) -> list[int]:
    """The context degrees tried on ``ranks`` ranks; the configured one always."""
    longest = min(ranks, config.data.sequence_length // (2 * SHORTEST_CHUNK))
    tried = {1, config.parallel.context, *(2**k for k in range(1, longest.bit_length()))}
    return sorted(degree for degree in tried if degree <= max(longest, config.parallel.context))


def ways(config: Config) -> Iterator[Config]:
    """The configuration with gathered keys and values, and, of context ranks, with a ring."""
    yield config
    if config.parallel.context > 1:
        yield replace(config, parallel=replace(config.parallel, context_by="ring"))


def refusals(config: Config, machine: Machine, nodes: int, advises: bool = False) -> list[str]:
    """What the rules refuse of a run on ``nodes`` machines, by its backend and by that of these.

    ``advises``: with suggestions that hold.
    """
    world, there = nodes * machine.ranks, replace(config.run, backend=machine.backend)
    found = problems(config, world, (), machine.ranks, advises=advises)
    if not found and there != config.run:
        found = problems(replace(config, run=there), world, (), machine.ranks, advises=advises)
    return found


def search(
    config: Config,
    machine: Machine,
    nodes: int,
    length: Length | None = None,
    stages: Sequence[ZeroStage] = (),
) -> tuple[list[Plan], list[Refused]]:
    """The plans of all valid candidates, best first, and the refused candidates.

    Those that fit come before those that fit but have ``risks``, and last those that do not fit;
    within these the fastest comes first.  All have the same ``length``, by default that of
    ``config``.  ``stages`` are the ZeRO stages tried, by default all that do something.
    """
    length = length or length_of(config)
    config, stages = replace(config, run=length.config.run), stages or zeros(config)
    plans, refused = [], []
    for candidate in candidates(config, machine, nodes, stages):
        if reasons := refusals(candidate, machine, nodes):
            refused.append(Refused(candidate, reasons[0]))
            continue
        for layout in ways(candidate):
            plans.append(plan_length(replace(length, config=layout), machine, nodes))
            memory = plans[-1].memory
            over = memory.peak * (1 + MARGIN) - memory.available
            if over <= 0 or over > keys_at_most(Share(plans[-1].run, memory.stage), machine):
                break
    reported = {each.run.mesh.tp for each in plans}
    for k, each in enumerate(refused):  # a report has the first reason of each other tensor degree
        if each.config.parallel.tensor not in reported:
            reported.add(each.config.parallel.tensor)
            reason = refusals(each.config, machine, nodes, advises=True)[0]
            refused[k] = replace(each, reason=reason)
    plans.sort(key=rank)
    return plans, refused


def rank(plan: Plan) -> tuple[bool, bool, float]:
    """The key that sorts plans as ``search`` does."""
    fits = plan.memory.fits
    return not fits, fits and bool(plan.risks), -plan.time.tokens_per_s
