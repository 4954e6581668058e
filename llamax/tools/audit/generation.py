"""The programs with which a cluster generates: one for each width of prompts, one for a token.

They are traced as those of training are (``llamax.tools.audit.auditor``): without devices and
without weights, each of them twice on rank 0, for other prompts and at another position, and once
on every rank of the tensor-parallel axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from llamax.backends.tracing import Tracer
from llamax.checkpoint.build_model import build_model
from llamax.config.flops import flops_per_token
from llamax.config.hardware import GIB, Machine, load_machine
from llamax.config.load import load_config
from llamax.config.schema import Config, ParallelConfig
from llamax.inference.static_decoding import StaticDecoder, buckets, programs
from llamax.model.placement import move_model
from llamax.model.qlora import held
from llamax.parallel.mesh import Mesh
from llamax.parallel.placeholder import Placeholder
from llamax.parallel.rendezvous import rendezvous
from llamax.runtime.progress import reported, tracked
from llamax.runtime.units import count, show_number
from llamax.tools.audit import census, hlo
from llamax.tools.audit.auditor import FEW_LAYERS, all_groups, check_machine
from llamax.tools.audit.diff import difference
from llamax.tools.audit.report import AuditReport, Divergence, Kind, Memory, sort_kinds
from llamax.tools.audit.trace import Boundary, Programs
from llamax.tools.plan.generation import check_generation


@dataclass(frozen=True)
class Generation:
    """The programs of generating with ``batch`` prompts at once in a cache of ``length`` places.

    ``config`` gives the model, its dtype, its adapters and the tensor-parallel degree.  Raises
    ConfigError where they do not fit each other.
    """

    config: Config
    batch: int
    length: int
    greedy: bool = False

    def __post_init__(self) -> None:
        check_generation(self.config, self.batch, self.length)

    @property
    def mesh(self) -> Mesh:
        return Mesh(tp=self.config.parallel.tensor)

    def decoder(self, rank: int, tracer: Tracer) -> tuple[StaticDecoder, Programs]:
        """The decoder of a rank, as shapes, and what records its programs."""
        axes, recorder = tracer.axes(self.mesh, rank), Programs(tracer)
        parallel = ParallelConfig(tensor=self.mesh.tp, sequence=False)
        config = replace(self.config, parallel=parallel)
        model = build_model(config, None, False, axes, torch.device("meta"))
        move_model(model, tracer.device)
        decoder = StaticDecoder(model, recorder, self.batch, self.length, self.greedy, memory=False)
        tracer.clear_pending()
        return decoder, recorder

    def traced(self, rank: int, tracer: Tracer, times: int = 1) -> Iterator[Boundary]:
        """Every program of a rank, ``times`` times, each time for another number of prompts."""
        decoder, recorder = self.decoder(rank, tracer)
        for time in range(times):
            prompts = min(time + 1, self.batch)
            when = count(prompts, "prompt")
            recorder.expect([(name, when) for name in programs(self.length)])
            with tracer.forbid_reads():
                decoder.run_all(prompts)
            yield from recorder.recorded

    def hashes(self) -> dict[str, str]:
        """Kind of program -> sha256 of its normal text."""
        tracer = Tracer(rendezvous({}), debug=False)
        return {each.kind: hlo.digest(hlo.normal(each.text)) for each in self.traced(0, tracer)}

    def model_flops(self, kind: str) -> float:
        """2N + attention FLOPs of one rank in a program."""
        model = self.config.model
        widths = dict(zip(programs(self.length), buckets(self.length), strict=False))
        head = 2 * model.vocab_size * model.hidden_size
        context, tokens = widths.get(kind, 2 * self.length), widths.get(kind, 1)
        token = flops_per_token(model, context) / 3 - head
        return self.batch * (tokens * token + head) / self.mesh.tp


def audit_generation(
    config: Config | str,
    batch: int,
    length: int,
    instance: Machine | str = "trn1.32xlarge",
    greedy: bool = False,
    *,
    overrides: Sequence[str] = (),
) -> AuditReport:
    """Trace the programs that ``llamax generate --backend xla`` compiles, and compare them.

    Args:
        config: A configuration, a recipe's name or a TOML file: model, dtype, tensor ranks.
        batch: Number of prompts computed at once.
        length: Tokens of a prompt and its answer.
        instance: A machine, its name, or a TOML file that describes it.
        greedy: Whether the most likely token is taken, which the program then chooses.
        overrides: Changes of the configuration, as "--section.key=value".

    Raises:
        ConfigError: For a parameter out of range, an unknown machine, or a model that does not fit.
        BackendError: If torch-xla is not installed.
    """
    machine = instance if isinstance(instance, Machine) else load_machine(instance)
    check_machine(machine)
    written = config if isinstance(config, Config) else load_config(config, overrides)
    generation = Generation(written, batch, length, greedy)
    tracer, mesh, model = Tracer(rendezvous({})), generation.mesh, written.model
    with reported("tracing every program twice"):
        boundaries = [*generation.traced(0, tracer, 2)]
        found, when, divergences = sort_kinds(
            (each.kind, f"rank 0, {each.when}", each.text) for each in boundaries
        )
        seconds = {each.kind: each.trace_s for each in reversed(boundaries)}
        memory = measure(generation, found, tracer, machine)
    few = replace(model, num_hidden_layers=min(FEW_LAYERS, model.num_hidden_layers))
    if not divergences:
        shallow = replace(generation, config=replace(written, model=few))
        divergences = compare(shallow, tracer)
    kinds = tuple(
        Kind(
            name,
            program,
            tuple(when[name]),
            tuple(census.collectives(program, all_groups(mesh))),
            None,
            generation.model_flops(name),
            seconds[name],
        )
        for name, program in found.items()
    )
    layers = count(few.num_hidden_layers, "layer")
    return AuditReport(
        f"{show_number(model.num_parameters())} parameters in {written.run.dtype} on "
        f"{count(mesh.tp, 'rank')} of {machine.name}: generating {batch} x {length} tokens, "
        f"{'greedily' if greedy else 'sampled'}",
        kinds,
        (f"all {mesh.tp} trace one program of each kind with {layers}",) if mesh.tp > 1 else (),
        model.num_hidden_layers,
        memory,
        tuple(divergences),
        tuple(tracer.fallbacks()),
    )


def compare(generation: Generation, tracer: Tracer) -> list[Divergence]:
    """The first program of a rank that differs from rank 0's, if any."""
    expected: dict[str, str] = {}
    ranks = range(generation.mesh.tp)
    for rank in tracked(ranks, "tracing few layers", len(ranks), "rank"):
        for each in generation.traced(rank, tracer):
            first = expected.setdefault(each.kind, each.text)
            how = difference(hlo.read(first), hlo.read(each.text))
            if how is not None:
                return [Divergence(each.kind, f"rank {rank}", "rank 0", how)]
    return []


def measure(
    generation: Generation, found: dict[str, hlo.Program], tracer: Tracer, machine: Machine
) -> Memory:
    """The memory of one core."""
    decoder, _ = generation.decoder(0, tracer)
    tensors = [each for each in decoder.model.parameters() if not isinstance(each, Placeholder)]
    weights = sum(each.nbytes for each in tensors) + held(decoder.model)[0]
    live = {name: census.live(each) for name, each in found.items()}
    reserve, available = round(machine.reserve_gib * GIB), machine.memory_bytes()
    return Memory(weights, 0, 0, reserve, live, available, cache=decoder.pool.num_bytes)
