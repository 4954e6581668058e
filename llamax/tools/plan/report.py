"""A plan and a search as text and as JSON.

::

    memory of a rank: 10.6 GiB of 16 GiB, fits; fullest when forward has ended
      weights          1.57 GiB   2 B x 843M elements
      ...
    time of a step: 11s for 4.19M tokens
      matmuls             6.10s   16 microsteps x 20.3TFLOP / (56% of 95TFLOP/s)
      ...
    389K tokens/s (760 a rank), MFU 34.3%
    2.01T tokens in 480,000 steps: 59d20h, $494,146 at $344.00 an hour

Each line ends with the formula of its quantity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from llamax.config.schema import Config
from llamax.config.validate import accumulation
from llamax.parallel.mesh import Mesh
from llamax.runtime.units import show_bytes, show_number, show_time
from llamax.tools.plan.line import Line
from llamax.tools.plan.memory import plain_attention
from llamax.tools.plan.planner import Plan
from llamax.tools.plan.search import Refused
from llamax.tools.plan.sizes import Share

BEST = 10  # rows of a search that are shown


def headline(config: Config, mesh: Mesh, machines: str) -> str:
    """One line about a run: model, dtype, layout and batch; ``machines``: count and kind."""
    data = config.data
    return (
        f"{show_number(config.model.num_parameters())} parameters in {config.run.dtype} on "
        f"{machines}: tensor {mesh.tp} x data {mesh.dp}, "
        f"{accumulation(config, mesh.dp)} microsteps of {data.micro_batch} x "
        f"{data.sequence_length} tokens, recompute {config.run.recompute}"
    )


def show(plan: Plan) -> Iterator[str]:
    """The plan as lines of text."""
    config, mesh, machine = plan.config, plan.mesh, plan.machine
    memory, time = plan.memory, plan.time
    yield headline(config, mesh, f"{plan.nodes} x {machine.name}")
    yield ""
    yield (
        f"memory of a rank: {show_bytes(memory.peak)} of {show_bytes(memory.available)}, "
        f"{'fits' if memory.fits else 'DOES NOT FIT'}; fullest when {memory.moment}"
    )
    yield from rows(memory.lines, show_bytes)
    kept = ", ".join(f"{line.name} {show_bytes(line.value)}" for line in memory.modes)
    yield f"  activations by run.recompute: {kept}"
    yield f"  generating: {show_bytes(memory.cache.value)} of keys and values a sequence, " + (
        memory.cache.formula
    )
    yield ""
    yield f"time of a step: {show_time(time.step_s)} for {show_number(time.step_tokens)} tokens"
    yield from rows(time.lines, show_time)
    yield ""
    yield (
        f"{show_number(time.tokens_per_s)} tokens/s "
        f"({show_number(time.tokens_per_s / mesh.world_size)} a rank), MFU {time.mfu:.1%}"
    )
    budget = time.steps * time.step_tokens
    yield (
        f"{show_number(budget)} tokens in {time.steps:,} steps: {show_time(time.total_s)}, "
        f"${time.dollars:,.0f} at ${time.dollars_per_hour:,.2f} an hour"
    )
    yield from (f"note: {note}" for note in notes(plan))


def notes(plan: Plan) -> Iterator[str]:
    """Settings that slow the run or do not match the machine."""
    config, machine = plan.config, plan.machine
    if why := plain_attention(Share(config, plan.mesh), machine):
        yield f"attention computes every pair of tokens, because {why}: the flash kernel cannot run"
    if config.run.backend != machine.backend:
        yield (
            f"run.backend={config.run.backend}, but {machine.name} needs "
            f"--run.backend={machine.backend}"
        )


def rows(lines: Sequence[Line], show_value: Callable[[float], str]) -> Iterator[str]:
    """Aligned lines: name, quantity, formula."""
    for line in lines:
        yield f"  {line.name:<34} {show_value(line.value):>9}   {line.formula}"


def show_search(plans: Sequence[Plan], refused: Sequence[Refused]) -> Iterator[str]:
    """The layouts that fit, fastest first; then why the others do not."""
    fitting = [each for each in plans if each.memory.fits]
    if not fitting:
        yield f"none of {len(plans) + len(refused)} layouts fits"
        yield from _reasons(plans, refused)
        return
    yield f"{len(fitting)} of {len(plans) + len(refused)} layouts fit; the fastest:"
    yield f"  {'tensor':>6} {'data':>5} {'micro':>5} {'recompute':<9} {'memory':>9} {'MFU':>6} " + (
        f"{'tokens/s':>9} {'dollars':>10}"
    )
    for each in fitting[:BEST]:
        yield (
            f"  {each.mesh.tp:>6} {each.mesh.dp:>5} {each.config.data.micro_batch:>5} "
            f"{each.config.run.recompute:<9} {show_bytes(each.memory.peak):>9} "
            f"{each.time.mfu:>6.1%} {show_number(each.time.tokens_per_s):>9} "
            f"{each.time.dollars:>10,.0f}"
        )
    yield from _reasons(plans, refused)


def _reasons(plans: Sequence[Plan], refused: Sequence[Refused]) -> Iterator[str]:
    """One line for each tensor degree that does not fit, and for each that is refused."""
    over: dict[int, list[Plan]] = {}
    for each in plans:
        if not each.memory.fits:
            over.setdefault(each.mesh.tp, []).append(each)
    if over or refused:
        yield "the others:"
    for tensor, layouts in sorted(over.items()):
        least = min(layouts, key=lambda each: each.memory.peak)
        largest = max(least.memory.lines, key=lambda line: line.value)
        yield (
            f"  tensor {tensor}: {len(layouts)} layouts do not fit; the smallest (micro-batch "
            f"{least.config.data.micro_batch}, recompute {least.config.run.recompute}) needs "
            f"{show_bytes(least.memory.peak)} of {show_bytes(least.memory.available)}, "
            f"{show_bytes(largest.value)} of it {largest.name}"
        )
    first: dict[int, Refused] = {}
    for refusal in refused:
        first.setdefault(refusal.config.parallel.tensor, refusal)
    for tensor, refusal in sorted(first.items()):
        batch = refusal.config.data.micro_batch
        of = f" with micro-batch {batch} and more" if batch > 1 else ""
        yield f"  tensor {tensor}{of}: {refusal.reason}"


def as_json(plan: Plan) -> dict[str, object]:
    """The plan for programs, in bytes, seconds and dollars."""
    memory, time = plan.memory, plan.time
    return {
        "instance": plan.machine.name,
        "nodes": plan.nodes,
        "parallel": {"tensor": plan.mesh.tp, "data": plan.mesh.dp},
        "micro_batch": plan.config.data.micro_batch,
        "recompute": plan.config.run.recompute,
        "fits": memory.fits,
        "memory_bytes": {
            "peak": memory.peak,
            "available": memory.available,
            **{line.name: line.value for line in memory.lines},
        },
        "step_s": {"total": time.step_s, **{line.name: line.value for line in time.lines}},
        "tokens_per_s": time.tokens_per_s,
        "mfu": time.mfu,
        "run_s": time.total_s,
        "dollars": time.dollars,
    }
