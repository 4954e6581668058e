"""``llamax plan --config llama2-7b --nodes 16``: bytes, seconds and dollars before paying for them.

::

    memory of a rank: 10.6 GiB of 16 GiB, fits; fullest when forward has ended
      weights          1.57 GiB   2 B x 843M elements
      ...
    time of a step: 11s for 4.19M tokens
      matmuls             6.10s   16 microsteps x 20.3TFLOP / (56% of 95TFLOP/s)
      ...
    389K tokens/s (760 a rank), MFU 34.3%
    2.01T tokens in 480,000 steps: 59d20h, $494,146 at $344.00 an hour

Each line says where it comes from.  The exit code is 0 if the plan fits into memory and 6 if not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llamax.runtime.units import show_bytes, show_number, show_time
from llamax.tools.plan import Line, headline
from llamax.tools.plan.memory import flash
from llamax.tools.plan.search import Plan, Refused
from llamax.tools.plan.sizes import Share

BEST = 10  # rows of a search


def show(found: Plan) -> Iterator[str]:
    """The plan as lines of text."""
    config, mesh, machine = found.config, found.mesh, found.machine
    memory, time = found.memory, found.time
    yield headline(config, mesh, f"{found.nodes} x {machine.name}")
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
    yield from (f"note: {note}" for note in notes(found))


def notes(found: Plan) -> Iterator[str]:
    """What a user would want to change."""
    config, machine = found.config, found.machine
    if why := flash(Share(config, found.mesh), machine):
        yield f"attention computes every pair of tokens, because {why}: the flash kernel cannot run"
    if config.run.backend != machine.backend:
        yield (
            f"run.backend={config.run.backend}, but {machine.name} wants "
            f"--run.backend={machine.backend}"
        )


def rows(lines: Sequence[Line], words: object) -> Iterator[str]:
    """Aligned lines: name, quantity, formula."""
    assert callable(words)
    for line in lines:
        yield f"  {line.name:<34} {words(line.value):>9}   {line.formula}"


def show_search(plans: Sequence[Plan], refused: Sequence[Refused]) -> Iterator[str]:
    """What fits, best first; then what does not, and why."""
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
    """One line per tensor degree without room, and per rule that refuses layouts."""
    over: dict[int, list[Plan]] = {}
    for each in plans:
        if not each.memory.fits:
            over.setdefault(each.mesh.tp, []).append(each)
    if over or refused:
        yield "not these:"
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


def as_json(found: Plan) -> dict[str, object]:
    """The plan for programs: bytes, seconds, dollars."""
    memory, time = found.memory, found.time
    return {
        "instance": found.machine.name,
        "nodes": found.nodes,
        "parallel": {"tensor": found.mesh.tp, "data": found.mesh.dp},
        "micro_batch": found.config.data.micro_batch,
        "recompute": found.config.run.recompute,
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
