"""Traces and compares the programs that a cluster would compile, on any machine with torch-xla.

The run is traced without devices and without weights, one rank after the other in one process:
every kind of step on rank 0, each program on the ranks at the corners of the mesh and, with few
layers, each program on every rank of the world that could differ from those before it
(``rank_numbers``).  On Trainium a rank whose program differs compiles for 25 to 40 minutes while
all others wait; the audit names the Python line that makes it differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from llamax.backends.tracing import Tracer
from llamax.config.constants import GRADIENT_BYTES, loss_chunk_tokens
from llamax.config.flops import flops_per_token
from llamax.config.hardware import GIB, Machine, load_machine
from llamax.config.load import load_config
from llamax.config.neuron_sdk import Match, installed_sdk, trn1_sdk
from llamax.config.schema import Config
from llamax.model.lora import num_parameters
from llamax.model.qlora import held
from llamax.parallel.fsdp import fsdp_weights
from llamax.parallel.mesh import EDGES, Coordinate, Groups, Mesh
from llamax.parallel.pipeline import in_flight
from llamax.parallel.placeholder import Placeholder
from llamax.parallel.rendezvous import rendezvous
from llamax.runtime.errors import ConfigError
from llamax.runtime.progress import reported
from llamax.runtime.units import count, show_number
from llamax.runtime.versions import installed
from llamax.tools.audit import census, flash, formulas, hlo, on_chip_loss
from llamax.tools.audit.census import Traffic
from llamax.tools.audit.compare_ranks import compare
from llamax.tools.audit.diff import difference
from llamax.tools.audit.formulas import group_shapes
from llamax.tools.audit.rank_numbers import Watch
from llamax.tools.audit.report import (
    AuditReport,
    Divergence,
    Kind,
    Memory,
    sort_kinds,
)
from llamax.tools.audit.trace import (
    MICROSTEP,
    SWAP,
    VALIDATION,
    TracedRun,
    first_ranks,
    made_up_tokens,
)
from llamax.tools.plan.nki_loss import kernels_fit
from llamax.tools.plan.planner import check_count
from llamax.tools.plan.program import largest_program
from llamax.tools.plan.report import headline
from llamax.tools.plan.sizes import Share
from llamax.training.resolve import ResolvedRun, resolve, visible_samples

Ranks = Literal["all", "corners", "deep"]
DIFFERS = 7  # exit code of ``llamax audit``
FEW_LAYERS, FEW_BUCKETS = 2, 4  # of the programs that every rank traces
HLO_DTYPES = {torch.bfloat16: "bf16", torch.float32: "f32"}


def audit(
    config: Config | str,
    instance: Machine | str = "trn1.32xlarge",
    nodes: int = 1,
    ranks: Ranks = "all",
    *,
    overrides: Sequence[str] = (),
) -> AuditReport:
    """Trace the programs that a run compiles, compare them between ranks, and count their work.

    Args:
        config: A configuration, a recipe's name or a TOML file.
        instance: A machine, its name, or a TOML file that describes it.
        nodes: Number of machines.
        ranks: Ranks to trace besides those at the corners of the mesh: with few layers every rank
            that could differ ("all"), none ("corners"), or every rank with all layers ("deep").
        overrides: Changes of the configuration, as "--section.key=value".

    Raises:
        ConfigError: For a parameter out of range, an unknown machine, or a layout that does not fit
            the machine.
        BackendError: If torch-xla is not installed.
    """
    check_count("nodes", nodes)
    if ranks not in get_args(Ranks):
        raise ConfigError(f"`ranks={ranks}` is not known; use {', '.join(get_args(Ranks))}")
    machine = instance if isinstance(instance, Machine) else load_machine(instance)
    written = config if isinstance(config, Config) else load_config(config, overrides)
    check_machine(machine)
    world_size, limit = nodes * machine.ranks, machine.node_limit
    if not isinstance(config, Config):
        written = load_config(config, overrides, world_size, node_ranks=limit)
    run = resolve(written, world_size, *visible_samples(written), node_ranks=limit)
    return audit_run(run.on_trn1(machine.ranks), machine, ranks, f"{nodes} x {machine.name}")


def audit_run(
    run: ResolvedRun, machine: Machine, ranks: Ranks = "all", machines: str = ""
) -> AuditReport:
    """The audit of a run; ``machines`` describes them in the headline."""
    mesh, layers = run.mesh, run.config.model.num_hidden_layers
    tracer = Tracer(rendezvous({}))
    with made_up_tokens(run) as data:
        with reported("tracing every kind of step"):
            kinds, memory, divergences = first_of_stages(run, machine, tracer, data)
        normal = {kind.name: kind.program.normal for kind in kinds}
        compared = []
        if not divergences and ranks == "deep":
            others = range(1, mesh.world_size)
            divergences += compare(run, tracer, data, others, normal)
            compared.append(f"{_all(mesh.world_size, 'trace')} one program of each kind")
        elif not divergences:
            corners = [rank for rank in corner_ranks(mesh) if rank not in first_ranks(run)]
            divergences += compare(run, tracer, data, corners, normal)
            compared.append(
                f"{_at_corners(len({*first_ranks(run), *corners}))} one program of each kind "
                f"({', '.join(map(str, [*first_ranks(run), *corners]))})"
            )
        if not divergences and ranks == "all":
            few = min(max(FEW_LAYERS, len(run.chunk_layers)), layers)
            watch = Watch(mesh, all_groups(mesh))
            world = range(mesh.world_size)
            divergences += compare(shortened(run, few), tracer, data, world, {}, watch)
            compared.append(
                f"{_all(mesh.world_size, 'do')} so with {count(few, 'layer')}"
                + _by_argument(mesh.world_size, watch)
            )
    sdk, unknown = installed_sdk(installed) or Match(trn1_sdk())
    return AuditReport(
        headline(run, machines),
        kinds,
        tuple(compared),
        layers,
        memory,
        tuple(divergences),
        tuple(tracer.fallbacks()),
        (*notes(run.config), *large(run, machine), *([unknown] if unknown else ())),
        sdk,
    )


def shortened(run: ResolvedRun, layers: int) -> ResolvedRun:
    """The run with few layers, and gradients in few buckets: every kind of each is left."""
    run = run.with_layers(layers)
    parallel, elements = run.config.parallel, run.config.model.num_parameters() // run.mesh.tp
    whole_bytes = GRADIENT_BYTES * elements // FEW_BUCKETS
    parallel = replace(parallel, bucket_bytes=max(parallel.bucket_bytes, whole_bytes))
    return replace(run, config=replace(run.config, parallel=parallel))


def _all(ranks: int, verb: str) -> str:
    one = {"trace": "traces", "do": "does"}[verb]
    return f"all {ranks} {verb}" if ranks > 1 else f"the only one {one}"


def _by_argument(ranks: int, watch: Watch) -> str:
    """Which of the ranks were not traced, and why they need not be; empty where all were."""
    if watch.traced == ranks:
        return ""
    used = " and ".join(watch.used) or "nothing"
    return (
        f": {watch.traced} are traced, and their traces use {used} of a rank's places in the mesh; "
        "the others agree with one of them there"
    )


def _at_corners(ranks: int) -> str:
    return f"{ranks} at the corners of the mesh trace" if ranks > 1 else "the only one traces"


def first_of_stages(
    run: ResolvedRun, machine: Machine, tracer: Tracer, data: Path
) -> tuple[tuple[Kind, ...], Memory, list[Divergence]]:
    """The programs by kind, the memory of the fullest stage, and kinds with several programs."""
    kinds: dict[str, Kind] = {}
    memories, divergences = [], list[Divergence]()
    for rank in first_ranks(run):
        found, memory, more = programs_of(run, rank, machine, tracer, data)
        for kind in found:
            known = kinds.setdefault(kind.name, kind)
            if how := difference(known.program, kind.program):
                divergences.append(Divergence(kind.name, kind.traced[0], known.traced[0], how))
        memories.append(memory)
        divergences += more
    return tuple(kinds.values()), max(memories, key=lambda memory: memory.peak), divergences


def programs_of(
    run: ResolvedRun, rank: int, machine: Machine, tracer: Tracer, data: Path
) -> tuple[tuple[Kind, ...], Memory, list[Divergence]]:
    """The programs of a rank by kind, its memory, and the kinds with more than one program."""
    first = TracedRun(run, rank, tracer, data)
    seconds: dict[str, float] = {}

    def traced() -> Iterator[tuple[str, str, str]]:
        for boundary in first.whole():
            seconds.setdefault(boundary.kind, boundary.trace_s)
            yield boundary.kind, f"rank {rank}, {boundary.when}", boundary.text

    programs, when, divergences = sort_kinds(traced())
    kinds = tuple(
        Kind(
            name,
            program,
            tuple(when[name]),
            tuple(census.collectives(program, all_groups(run.mesh))),
            by_formula(first, name),
            model_flops(first, name),
            seconds[name],
        )
        for name, program in programs.items()
    )
    return kinds, measure(first, {**programs, **with_kernels(first)}, machine), divergences


def with_kernels(traced: TracedRun) -> dict[str, hlo.Program]:
    """The programs of a step with the tensors of the kernels that can run; none where none can."""
    attends = not flash.refusal(traced.run.config)
    if not attends and not kernels_fit(traced.run.config):
        return {}
    with flash.kernels_stand_in(attends), traced.tracer.without_debug():
        return {each.kind: hlo.read(each.text) for each in traced.brief()}


def corner_ranks(mesh: Mesh) -> list[int]:
    """The first and last tensor ranks of the first and last context, data ranks and stages."""
    degrees = (mesh.pp, mesh.dp, mesh.cp, mesh.tp)
    corners = itertools.product(*((0, degree - 1) for degree in degrees))
    return sorted({mesh.rank(Coordinate(*corner)) for corner in corners})


def all_groups(mesh: Mesh) -> dict[str, Groups]:
    """The groups of every axis as programs name them: with all ranks."""
    return {
        name: mesh.completed(groups) if name in EDGES else groups
        for name, groups in mesh.axes().items()
    }


def by_formula(traced: TracedRun, kind: str) -> tuple[Traffic, ...] | None:
    """The collectives of a kind of program by formula; None for adapters, which have no formula.

    Of a pipeline only swaps have one.
    """
    config, mesh = traced.run.config, traced.run.mesh
    if kind.startswith(SWAP):
        return tuple(formulas.swap(config, mesh, kind.removeprefix(SWAP)))
    if config.finetune.method != "full" or mesh.pp > 1:
        return None
    rows = traced.state.model.head.weight.shape[0]
    tokens = config.data.micro_batch * config.data.sequence_length // mesh.cp
    chunks = -(-tokens // loss_chunk_tokens(rows))
    shapes = group_shapes(traced.state.optimizer)
    if kind == MICROSTEP:
        found = formulas.microstep(config, mesh, chunks, shapes)
    elif kind == VALIDATION:
        found = formulas.forward(config, mesh, chunks, shapes)
    else:
        found = formulas.update(
            mesh, shapes, config.parallel.zero, mesh.kv, config.optim.skip_spikes != "off"
        )
    names, groups = {}, all_groups(mesh)
    for axis, known in groups.items():  # axes with the same groups share one name
        names[axis] = next(name for name, each in groups.items() if set(each) == set(known))
    total: dict[tuple[str, str], Traffic] = {}
    for each in found:
        key = names[each.axis], each.kind
        before = total.get(key, Traffic(each.kind, key[0], 0, 0))
        total[key] = replace(
            before,
            count=before.count + each.count,
            sent_bytes=before.sent_bytes + each.sent_bytes,
        )
    return tuple(total.values())


def model_flops(traced: TracedRun, kind: str) -> float:
    """6N + attention FLOPs of one rank in a program, by the layers that it passes through.

    A third of it in forward alone; after the last layer backward's program has both.
    """
    run, config = traced.run, traced.run.config
    length, whole, found = config.data.sequence_length, config.model, dict[str, float]()
    for number, layers in enumerate(traced.state.model.stage):
        model = replace(whole, num_hidden_layers=len(layers))
        ends = layers.stop == whole.num_hidden_layers
        tuned = config.finetune.method != "full"
        adapters = num_parameters(model, config.finetune) if tuned else 0
        head = 0 if ends else model.vocab_size * model.hidden_size
        forward = flops_per_token(model, length) / 3 - 2 * head
        both = flops_per_token(model, length, adapters) - (4 if tuned else 6) * head
        name = traced.chunk(number)
        found[f"forward, {name}"] = forward + 2 * adapters
        found[f"backward, {name}"] = both if ends else both - forward - 2 * adapters
        found[f"validation, {name}"] = forward
        if run.mesh.pp == 1:
            found = {MICROSTEP: both, VALIDATION: forward}
    tokens = config.data.micro_batch * length
    return found.get(kind, 0.0) * tokens / (run.mesh.tp * run.mesh.cp)


def measure(traced: TracedRun, programs: dict[str, hlo.Program], machine: Machine) -> Memory:
    """The memory of one core."""
    optimizer, model = traced.state.optimizer, traced.state.model
    ranks = optimizer.shard.size
    tensors = [store.local for store in fsdp_weights(model)]
    tensors += [each for each in model.parameters() if not isinstance(each, Placeholder)]
    weights = sum(each.nbytes for each in tensors) + held(model)[0]
    gradients, state = 0, optimizer.state_bytes()
    for group in optimizer.groups:
        run = group.length // ranks
        gradients += GRADIENT_BYTES * (run if group.key.zero > 1 else sum(group.lengths))
        state -= GRADIENT_BYTES * (run if group.key.zero > 1 else group.length)
        state -= group.key.dtype.itemsize * (run if group.key.zero == 3 else group.length)
    old = [hlo.Shape(HLO_DTYPES[each.dtype], tuple(each.shape), False) for each in tensors]
    live = {name: census.live(each, old) for name, each in programs.items()}
    reserve, available = round(machine.reserve_gib * GIB), machine.memory_bytes()
    return Memory(weights, gradients, state, reserve, live, available, in_flight_bytes(traced))


def in_flight_bytes(traced: TracedRun) -> int:
    """Bytes that the microbatches in flight keep on a stage: inputs of its layers, and its output.

    Stages of a pipeline recompute their layers (``config.rules.pipeline``).
    """
    seat, model, share = traced.state.axes.pp, traced.state.model, Share(traced.run)
    if seat.size == 1:
        return 0
    chunks = len(model.stage)
    flying = in_flight(*seat, share.accumulation, chunks)
    kept = share.tokens_between * share.model.hidden_size * share.width
    return flying * (sum(map(len, model.stage)) + chunks) * kept // chunks


def notes(config: Config) -> Iterator[str]:
    """Notes on the kernels of the loss and of attention."""
    yield from on_chip_loss.notes(config)
    yield from flash.notes(config)


def large(run: ResolvedRun, machine: Machine) -> Iterator[str]:
    """A note where the largest program is more than the compiler is known to take."""
    products = largest_program(run, machine)
    if not machine.compiles(products):
        yield (
            f"the largest program has {show_number(products)} instructions for products at least, "
            f"and neuronx-cc is known to compile {show_number(machine.program_instructions)}; "
            "llamax plan --search lists layouts with smaller programs"
        )


def check_machine(machine: Machine) -> None:
    """Raise ConfigError if the machine does not trace programs."""
    if machine.backend != "xla":
        raise ConfigError(
            f"`instance` {machine.name} trains with run.backend={machine.backend}, which compiles "
            "no XLA programs; use trn1.32xlarge, trn1n.32xlarge or trn1.2xlarge"
        )
