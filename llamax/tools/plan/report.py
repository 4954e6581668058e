"""A plan and a search as text and as JSON.

::

    memory of a rank: 10.6 GiB of 16 GiB, fits; fullest when forward has ended
      weights          1.57 GiB   2 B x 843M elements
      ...
    time of a step: 11s for 4.19M tokens
      matmuls             6.10s   16 microsteps x 20.3 TFLOP / (56% of 95 TFLOP/s)
      ...
    389K tokens/s (760 a rank), MFU 34.3%
    2.01T tokens in 480,000 steps: 59d20h, $494,146 at $344.00 an hour

Each line ends with the formula of its quantity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from llamax.config.neuron_sdk import trn1_sdk
from llamax.config.rules import World
from llamax.config.rules.parallel import within_node
from llamax.config.schema import Config
from llamax.runtime.units import count, show_bytes, show_fine_time, show_number, show_time
from llamax.tools.plan.line import Line
from llamax.tools.plan.memory import MARGIN, by_nki, plain_attention
from llamax.tools.plan.nearest import Nearest, flags
from llamax.tools.plan.nki_loss import loss_by_nki
from llamax.tools.plan.planner import Plan, plan_run
from llamax.tools.plan.search import Refused
from llamax.tools.plan.sizes import Share
from llamax.training.resolve import ResolvedRun

BEST = 10  # rows of a search that are shown
TIGHT = f"tight: it fits, but not if a run needs {MARGIN:.1%} more than planned, as some may"
LARGE = (
    "large: the products of one of its programs are more instructions than neuronx-cc is known to "
    "compile; a larger pipeline or tensor degree, or a smaller micro-batch, makes programs smaller"
)
RISKS = {"tight": TIGHT, "large": LARGE}


def headline(run: ResolvedRun, machines: str) -> str:
    """One line about a run: model, dtype, layout and batch; ``machines``: count and kind."""
    config, mesh, data = run.config, run.mesh, run.config.data
    context = f" x context {_context(config)}" if mesh.cp > 1 else ""
    pipeline = f" x pipeline {mesh.pp}" if mesh.pp > 1 else ""
    over = f", ZeRO-{config.parallel.zero} over {mesh.owners}" if mesh.copies > 1 else ""
    return (
        f"{show_number(config.model.num_parameters())} parameters in {config.run.dtype} on "
        f"{machines}: tensor {mesh.tp}{context}{pipeline} x data {mesh.dp}{over}, "
        f"{count(run.accumulation, 'microstep')} of {data.micro_batch} x "
        f"{data.sequence_length} tokens, recompute {config.run.recompute}"
    )


def show(plan: Plan) -> Iterator[str]:
    """The plan as lines of text."""
    run, machine, memory, time = plan.run, plan.machine, plan.memory, plan.time
    yield headline(run, f"{plan.nodes} x {machine.name}")
    yield ""
    fits = f"fits{', tight' * memory.tight}" if memory.fits else "DOES NOT FIT"
    stage = f" on stage {memory.stage}" if run.mesh.pp > 1 else ""
    yield (
        f"memory of a rank: {show_bytes(memory.peak)} of {show_bytes(memory.available)}, {fits}; "
        f"fullest{stage} when {memory.moment}"
    )
    yield from rows(memory.lines, show_bytes)
    if memory.host.value:
        room = f" of {show_bytes(memory.host_available)}" if memory.host_available else ""
        yield (
            f"  in host memory: {show_bytes(memory.host.value)}{room} a rank, "
            f"{memory.host.formula}{'' if memory.host_fits else '; it DOES NOT FIT'}"
        )
    kept = ", ".join(f"{line.name} {show_bytes(line.value)}" for line in memory.modes)
    yield f"  activations by run.recompute: {kept}"
    yield f"  generating: {show_bytes(memory.cache.value)} of keys and values a sequence, " + (
        memory.cache.formula
    )
    yield ""
    tokens = show_number(time.step_tokens)
    yield f"time of a step: {show_fine_time(time.step_s)} for {tokens} tokens"
    yield from rows(time.lines, show_fine_time)
    yield ""
    yield (
        f"{show_number(time.tokens_per_s)} tokens/s "
        f"({show_number(time.tokens_per_s / run.mesh.world_size)} a rank), MFU {time.mfu:.1%}"
    )
    price = "no price known: set --dollars-per-hour"
    if time.dollars_per_hour:
        price = f"${time.dollars:,.0f} at ${time.dollars_per_hour:,.2f} an hour"
    epochs = ""
    if run.epochs and run.training_samples is not None:
        epochs = f" ({run.epochs} x {run.training_samples:,} samples)"
    yield (
        f"{show_number(run.total_tokens)} tokens in {count(run.steps, 'step')}{epochs}: "
        f"{show_time(time.total_s)}, {price}"
    )
    yield f"length: {plan.length}"
    if most := machine.program_instructions:
        yield (
            f"largest program: {show_number(plan.program)} instructions for products, of "
            f"{show_number(most)} for all{', large' * plan.large}"
        )
    yield from (f"note: {note}" for note in notes(plan))


def notes(plan: Plan) -> Iterator[str]:
    """Assumptions, and settings that slow the run or do not match the machine."""
    config, machine = plan.run.config, plan.machine
    yield from (RISKS[risk] for risk in plan.risks)
    if plan.run.assumption:
        yield plan.run.assumption
    if why := plain_attention(Share(plan.run), machine):
        computed = "every pair of tokens"
        if plan.run.mesh.cp > 1:
            computed += " of the chunks that a rank's tokens can see"
        yield f"attention computes {computed}, because {why}: the flash kernel cannot run"
    elif by_nki(Share(plan.run), machine):
        sdk = trn1_sdk()
        yield (
            f"attention is planned with llamax's NKI kernels (nki {sdk.nki}, Neuron SDK "
            f"{sdk.name}), whose cycles a simulator counts; they have not been compiled for "
            "Trainium or run on it"
        )
    last = Share(plan.run, plan.run.mesh.pp - 1)
    if loss_by_nki(last, machine):
        yield (
            "the loss is planned with llamax's NKI kernels, which hold no logits in memory, by a "
            "simulator's count of their cycles"
        )
    parallel = config.parallel
    group = parallel.tensor * parallel.context
    if group > 1 and machine.ranks % group:
        kinds = "tensor and context" if parallel.context > 1 else "tensor"
        inside = within_node(config, World(node_ranks=machine.ranks))
        yield (
            f"{kinds} ranks span nodes of {count(machine.ranks, 'rank')}, and the network carries "
            f"their messages in every layer; {inside} would not"
        )
    yield from zero_notes(plan)
    if config.run.backend != machine.backend:
        yield (
            f"run.backend={config.run.backend}, but {machine.name} needs "
            f"--run.backend={machine.backend}"
        )


def zero_notes(plan: Plan) -> Iterator[str]:
    """Where ZeRO-2 or ZeRO-3 costs more than it saves."""
    run, zero = plan.run, plan.run.config.parallel.zero
    if zero < 2 or run.mesh.dp * run.mesh.cp == 1 or Share(run).tuned:
        return
    yield from within_nodes(plan)
    parallel = replace(run.config.parallel, zero=1)
    config = replace(run.config, parallel=parallel)
    other = plan_run(replace(run, config=config), plan.machine, plan.nodes)
    saved, lost = other.memory.peak - plan.memory.peak, plan.time.step_s - other.time.step_s
    if lost <= 0.02 * other.time.step_s:
        return
    text = (
        f"parallel.zero={zero} sends after each microstep what parallel.zero=1 sends once a step: "
        f"{show_time(lost)} of each step for {show_bytes(saved)} of memory"
    )
    if other.memory.fits:
        yield f"{text}; parallel.zero=1 fits too{', tight' if other.memory.tight else ''}"
    elif run.accumulation > 1:
        yield f"{text}; a larger data.micro_batch, parallel.tensor or parallel.pipeline sends less"
    else:
        yield text


def within_nodes(plan: Plan) -> Iterator[str]:
    """Where ZeRO over the data ranks of a node is faster than over those of several."""
    run, machine = plan.run, plan.machine
    owners, node = run.mesh.owners, max(machine.ranks // run.mesh.tp, 1)
    if not 1 < node < owners or owners % node or machine.ranks % run.mesh.tp:
        return
    parallel = replace(run.config.parallel, zero_ranks=node)
    config, mesh = replace(run.config, parallel=parallel), replace(run.mesh, shard=node)
    other = plan_run(replace(run, config=config, mesh=mesh), machine, plan.nodes)
    gained, more = plan.time.step_s - other.time.step_s, other.memory.peak - plan.memory.peak
    if other.memory.fits and gained > 0.02 * other.time.step_s:
        yield (
            f"parallel.zero_ranks={node}, ZeRO within each node, would take {show_time(gained)} "
            f"from each step for {show_bytes(more)} of memory"
        )


def rows(lines: Sequence[Line], show_value: Callable[[float], str]) -> Iterator[str]:
    """Aligned lines: name, quantity, formula."""
    for line in lines:
        yield f"  {line.name:<34} {show_value(line.value):>9}   {line.formula}"


def show_search(config: Config, plans: Sequence[Plan], refused: Sequence[Refused]) -> Iterator[str]:
    """The layouts of ``config`` that fit, tight and large ones last; then why others do not."""
    fitting = [each for each in plans if each.memory.fits]
    if not fitting:
        yield f"none of {count(len(plans) + len(refused), 'layout')} fits"
        yield from _reasons(plans, refused)
        return
    if fitting[0].run.assumption:
        yield f"note: {fitting[0].run.assumption}"
    fits = f"{len(fitting)} of {count(len(plans) + len(refused), 'layout')} fit; the fastest"
    kinds = [kind for kind in RISKS if any(kind in each.risks for each in fitting)]
    last = f", {' and '.join(kinds)} ones last" if kinds else ""
    yield f"{fits}{last}:"
    sized = fitting[0].machine.program_instructions > 0
    yield f"  {'tensor':>6} {'context':>7} {'pipeline':>8} {'chunks':>6} {'data':>5} " + (
        f"{'zero':>4} {'micro':>5} {'recompute':<9} {'memory':>9} {' program' * sized} {'MFU':>6} "
        f"{'tokens/s':>9} {'dollars':>10}"
    )
    for each in fitting[:BEST]:
        mesh, there, memory = each.run.mesh, each.run.config, each.memory
        program = f" {show_number(each.program):>7}" if sized else ""
        yield (
            f"  {mesh.tp:>6} {_context(there):>7} {mesh.pp:>8} {there.parallel.chunks:>6} "
            f"{mesh.dp:>5} {_zero(there):>4} {there.data.micro_batch:>5} "
            f"{there.run.recompute:<9} {show_bytes(memory.peak):>9}{program} "
            f"{each.time.mfu:>6.1%} {show_number(each.time.tokens_per_s):>9} "
            f"{each.time.dollars:>10,.0f}  {', '.join(each.risks)}".rstrip()
        )
    if any(each.run.mesh.copies > 1 for each in fitting[:BEST]):
        yield "zero 3/8: ZeRO-3 over 8 data ranks, with the same in every such group"
    run = fitting[0].run
    yield (
        f"dollars of {show_number(run.total_tokens)} tokens in {count(run.steps, 'step')}: "
        f"{fitting[0].length}"
    )
    changes = flags(config, fitting[0].nodes, fitting[0])
    yield f"the fastest is {' '.join(changes) or 'the layout as configured'}"
    shown = fitting[:BEST]
    for kind in kinds:
        risky = next(each for each in fitting if kind in each.risks)
        gain = risky.time.tokens_per_s / fitting[0].time.tokens_per_s - 1
        if gain > 0:
            flagged = " ".join(flags(config, risky.nodes, risky)) or "the layout as configured"
            yield f"{gain:.1%} faster but {' and '.join(risky.risks)} is {flagged}"
            shown = [*shown, risky]
    yield from (RISKS[kind] for kind in kinds if any(kind in each.risks for each in shown))
    yield from _reasons(plans, refused)


def _zero(config: Config) -> str:
    """The ZeRO stage, and the ranks that it cuts over where these are not all data ranks."""
    parallel = config.parallel
    return f"{parallel.zero}{f'/{parallel.zero_ranks}' * (parallel.zero_ranks > 0)}"


def _context(config: Config) -> str:
    """The context degree, and whether keys and values are passed around a ring."""
    parallel = config.parallel
    return f"{parallel.context}{' ring' * (parallel.context_by == 'ring')}"


def _reasons(plans: Sequence[Plan], refused: Sequence[Refused]) -> Iterator[str]:
    """One line for each tensor degree of which no layout fits, or no layout is valid."""
    over: dict[int, list[Plan]] = {}
    for each in plans:
        over.setdefault(each.run.mesh.tp, []).append(each)
    reasons: dict[str, list[int]] = {}
    for refusal in refused:
        tensor = refusal.config.parallel.tensor
        if tensor not in over:
            alike = refusal.reason.replace(f"parallel.tensor={tensor} ", "parallel.tensor=N ")
            degrees = reasons.setdefault(alike, [])
            if all(tensor not in others for others in reasons.values()):
                degrees.append(tensor)
    over = {tensor: each for tensor, each in over.items() if not any(p.memory.fits for p in each)}
    if over or any(reasons.values()):
        yield "the others:"
    for tensor, layouts in sorted(over.items()):
        many = f"{len(layouts)} layouts do" if len(layouts) > 1 else "1 layout does"
        yield f"  tensor {tensor}: {many} not fit; the smallest {needs(layouts)}"
    for reason, degrees in reasons.items():
        if degrees:
            first, names = degrees[0], ", ".join(map(str, degrees))
            yield f"  tensor {names}: " + reason.replace("tensor=N ", f"tensor={first} ")


def needs(plans: Sequence[Plan]) -> str:
    """What the smallest of some layouts that do not fit needs, and its largest part."""
    least = min(plans, key=lambda each: each.memory.peak)
    config, mesh, memory = least.run.config, least.run.mesh, least.memory
    largest = max(memory.lines, key=lambda line: line.value)
    needed = (
        f"{show_bytes(memory.peak)} of {show_bytes(memory.available)}, "
        f"{show_bytes(largest.value)} of it {largest.name}"
    )
    if memory.peak <= memory.available:
        room = show_bytes(memory.host_available)
        needed = f"{show_bytes(memory.host.value)} of {room} in host memory, {memory.host.formula}"
    parts = f"context {_context(config)}, " if mesh.cp > 1 else ""
    parts += f"pipeline {mesh.pp}, " if mesh.pp > 1 else ""
    over = f" over {mesh.owners}" if mesh.copies > 1 else ""
    parts += f"ZeRO-{zero}{over}, " if (zero := config.parallel.zero) > 1 else ""
    return (
        f"({parts}micro-batch {config.data.micro_batch}, recompute {config.run.recompute}) needs "
        f"{needed}"
    )


def show_nearest(near: Nearest | None) -> Iterator[str]:
    """The nearest layout that fits, as options to be pasted."""
    if near is None:
        yield "no layout is valid on any number of such nodes"
    elif near.fits:
        memory, time = near.plan.memory, near.plan.time
        yield f"nearest layout that fits: {' '.join(near.flags)}"
        yield (
            f"  {show_bytes(memory.peak)} of {show_bytes(memory.available)}, "
            f"{show_number(time.tokens_per_s)} tokens/s, "
            f"${time.dollars:,.0f} at ${time.dollars_per_hour:,.2f} an hour"
            f"{', tight' * memory.tight}"
        )
    else:
        mesh, spans = near.plan.run.mesh, near.plan.machine.node_limit is None
        within = " whose tensor ranks share a node" if spans else ""
        yield (
            f"no layout{within} fits on any number of such nodes: the smallest, tensor {mesh.tp} "
            f"on {count(near.plan.nodes, 'node')} {needs([near.plan])}"
        )


def nearest_as_json(near: Nearest | None) -> dict[str, object] | None:
    """The nearest layout for programs; None where no layout fits."""
    if near is None or not near.fits:
        return None
    return {"flags": near.flags, **as_json(near.plan)}


def as_json(plan: Plan) -> dict[str, object]:
    """The plan for programs, in bytes, seconds and dollars."""
    run, memory, time = plan.run, plan.memory, plan.time
    return {
        "instance": plan.machine.name,
        "nodes": plan.nodes,
        "parallel": {
            "tensor": run.mesh.tp,
            "context": run.mesh.cp,
            "pipeline": run.mesh.pp,
            "data": run.mesh.dp,
        },
        "context_by": run.config.parallel.context_by,
        "chunks": run.config.parallel.chunks,
        "layers_per_stage": run.config.parallel.layers_per_stage,
        "zero": run.config.parallel.zero,
        "zero_ranks": run.config.parallel.zero_ranks,
        "micro_batch": run.config.data.micro_batch,
        "recompute": run.config.run.recompute,
        "steps": run.steps,
        "tokens": run.total_tokens,
        "length": plan.length,
        "assumption": run.assumption,
        "fits": memory.fits,
        "tight": memory.tight,
        "program_instructions": plan.program,
        "large": plan.large,
        "memory_bytes": {
            "peak": memory.peak,
            "available": memory.available,
            **{line.name: line.value for line in memory.lines},
        },
        "host_memory_bytes": memory.host.value,
        "step_s": {"total": time.step_s, **{line.name: line.value for line in time.lines}},
        "tokens_per_s": time.tokens_per_s,
        "mfu": time.mfu,
        "run_s": time.total_s,
        "dollars": time.dollars,
    }
