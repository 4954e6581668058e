"""The state of a run in a few lines of text, for a terminal.

::

    llama2-7b  6.74B bfloat16, tensor 8 x data 16 on xla  running              15:10:52
    ━━━━━━━━━━━━━━━━━━━━━─────────  70%  step 420/600  left 1h57m  $399.26 spent, $168.42 remaining

    loss             2.1051  █▅▄▃▂▂▁▁▁▁  validation 2.1159, perplexity 8.3
    tokens/s           104K  ▆▇█▇▇▇▆▁▆▇  813 a rank
    step time           39s  median of 50 reports, p90 40s, p99 41s
    ranks           128/128  alive, on 4 hosts; steps 420 to 420

The lines depend only on the folder of the run, so they can be made on any machine that sees the
folder, while the run trains and afterwards.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from llamax.runtime.units import (
    count,
    perplexity,
    show_bytes,
    show_fine_time,
    show_number,
    show_time,
)
from llamax.tools.monitor.live_log import LARGEST
from llamax.tools.monitor.run_folder import RunFolder, percentiles

BLOCKS = " ▁▂▃▄▅▆▇█"
COLOURS = {"green": 32, "yellow": 33, "red": 31, "cyan": 36, "bold": 1, "dim": 2}
STATES = {
    "running": "green",
    "finished": "cyan",
    "starting": "yellow",
    "stopped": "yellow",
    "stuck": "red",
    "dead": "red",
}
LEFT, SPARK = 13, 26  # columns of labels and of sparklines
SHORTEST, PERCENT = 10, 7  # columns of the shortest bar, and of the percentage after it
SHOWN = 6  # ranks in trouble, or idle cores, that are named


class Paint:
    """Wraps text in colour codes, or returns it unchanged where colours are off."""

    def __init__(self, on: bool) -> None:
        self.on = on

    def __call__(self, text: str, *names: str) -> str:
        if not self.on or not text:
            return text
        codes = ";".join(str(COLOURS[name]) for name in names)
        return f"\x1b[{codes}m{text}\x1b[0m"


def render(run: RunFolder, width: int = 80, colour: bool = False, price: float = 0.0) -> list[str]:
    """A run as lines of text; ``price`` in dollars an hour replaces that of the run."""
    paint = Paint(colour)
    lines = [
        *_head(run, width, paint, price or run.dollars_per_hour),
        "",
        *_curves(run, paint),
        "",
        *_pace(run, paint),
        *_ranks(run, paint),
        *_cores(run, paint),
        *_saved(run, paint),
    ]
    return [clip(line, width) for line in lines]


def as_json(run: RunFolder, price: float = 0.0) -> dict[str, Any]:
    """A run for programs; times in seconds, ``price`` in dollars an hour replaces that of the run.

    ``last`` is the last record of metrics.jsonl; null: not known.
    """
    price = price or run.dollars_per_hour
    return {
        "name": run.name,
        "folder": str(run.folder),
        "state": run.state,
        "time": run.now,
        "step": run.step,
        "steps": run.steps,
        "remaining_s": run.remaining_s if run.last else None,
        "spent_s": run.spent_s,
        "dollars_per_hour": price or None,
        "dollars_spent": run.spent_s / 3600 * price if price else None,
        "skipped_steps": run.history.skipped,
        "last": asdict(run.last) if run.last else None,
        "last_report_s": max(run.now - run.written, 0) if run.last else None,
        "ranks": [
            {
                "rank": rank.number,
                "state": rank.state,
                "host": rank.beat.host,
                "step": rank.beat.step,
                "silent_s": rank.silent_s,
            }
            for rank in run.ranks
        ],
        "checkpoints": [asdict(saved) for saved in run.saved],
        "cores": run.cores,
        "environment": run.environment,
    }


def clip(line: str, width: int) -> str:
    """A line cut to ``width`` columns, with all colour codes; … replaces the rest."""
    pieces = re.split(r"(\x1b\[[\d;]*m)", line)  # text, code, text, code, ..., text
    if sum(map(len, pieces[::2])) <= width:
        return line
    room = width - 1
    for place in range(0, len(pieces), 2):
        pieces[place], room = pieces[place][:room], max(room - len(pieces[place]), 0)
    return "".join(pieces) + "…"


def _head(run: RunFolder, width: int, paint: Paint, price: float) -> Iterator[str]:
    clock = time.strftime("%H:%M:%S", time.localtime(run.now))
    wordings = [""]
    if run.config:
        size = show_number(run.config.model.num_parameters())
        short = f"{size} {run.config.run.dtype}"
        wordings = [f"{short}, {run.mesh} on {run.config.run.backend}", short, size, ""]
    room = width - len(run.name) - len(run.state) - len(clock) - 6
    description = next((text for text in wordings if len(text) < room), "")
    gap = max(room - len(description), 1)
    yield (
        f"{paint(run.name, 'bold')}  {paint(description, 'dim')}  "
        f"{paint(run.state, 'bold', STATES[run.state])}{' ' * gap}{paint(clock, 'dim')}"
    )
    done = min(run.step / run.steps, 1.0) if run.steps else 0.0
    parts = [f"step {run.step:,}/{run.steps:,}"]
    if run.state == "running" and run.last:
        parts.append(f"  left {show_time(run.remaining_s)}")
    elif run.last:
        parts.append(f"  after {show_time(run.spent_s)}")
    if price and run.last:
        spent, left = (s / 3600 * price for s in (run.spent_s, run.remaining_s))
        parts += [f"  ${spent:,.2f} spent", f", ${left:,.2f} remaining" if left else ""]
    while len(parts) > 1 and len("".join(parts)) > width - SHORTEST - PERCENT:
        parts.pop()
    text = "".join(parts)
    bar = max(min(width - 50, width - len(text) - PERCENT), SHORTEST)
    full = round(done * bar)
    drawn = paint("━" * full, STATES[run.state]) + paint("─" * (bar - full), "dim")
    yield f"{drawn} {done:4.0%}  {text}"


def _curves(run: RunFolder, paint: Paint) -> Iterator[str]:
    last = run.last
    if last is None:
        yield paint(_no_report(run), "dim")
        return
    more, validated = "", run.history.validation_loss
    if validated is not None:
        more = f"validation {validated:.4f}, perplexity {perplexity(validated):.1f}"
    yield _curve(paint, "loss", f"{last.loss:.4f}", run, "loss", more)
    yield _curve(paint, "grad norm", f"{last.grad_norm:.3f}", run, "grad_norm")
    if skipped := run.history.skipped:
        steps = "step" if skipped == 1 else "steps"
        yield _row(paint, "skipped", f"{skipped:,}", f"{steps} without an update")
    if run.ended_early:
        waited = last.validations_waited
        yield _row(paint, "stopped early", waited, "validations in a row were no better")
    if last.rewinds:
        times = "time" if last.rewinds == 1 else "times"
        after = f"{times} to a checkpoint, after skipped steps"
        yield _row(paint, "went back", f"{last.rewinds:,}", after)
    ranks = int(run.environment.get("ranks", 0))
    per_rank = f"{show_number(last.tokens_per_s / ranks)} a rank" if ranks > 1 else ""
    total = show_number(last.tokens_per_s)
    yield _curve(paint, "tokens/s", total, run, "tokens_per_s", per_rank)
    if last.mfu:
        yield _curve(paint, "MFU", f"{last.mfu:.1%}", run, "mfu")
    yield _curve(paint, "learning rate", f"{last.lr:.2e}", run, "lr")


def _no_report(run: RunFolder) -> str:
    """What is known before the first report."""
    parts = ["no step reported yet"]
    if run.config and run.state in ("starting", "running"):
        every = run.config.run.log_every
        first = min((run.step // every + 1) * every, run.steps)
        parts.append(f"the first will be step {first:,}")
    if started := run.environment.get("started"):
        parts.append(f"started {str(started)[11:19]}")
    return "; ".join(parts)


def _row(paint: Paint, name: str, value: object, more: str = "") -> str:
    """A line of the view: a name, its value, and what else there is to say."""
    return f"{paint(f'{name:<{LEFT}}', 'dim')} {value:>9}  {more}".rstrip()


def _curve(paint: Paint, name: str, value: str, run: RunFolder, field: str, more: str = "") -> str:
    """A row with the course of a value."""
    curve = sparkline(run.history.trends[field], SPARK)
    return _row(paint, name, value, f"{paint(curve, 'cyan')}  {more}")


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve of block characters, each the mean of consecutive values; blank where not finite."""
    width = min(width, len(values))
    cells = []
    for cell in range(width):
        part = values[cell * len(values) // width : (cell + 1) * len(values) // width]
        part = [value for value in part if abs(value) < LARGEST]
        cells.append(sum(part) / len(part) if part else None)
    known = [cell for cell in cells if cell is not None]
    if not known:
        return " " * width
    low, high = min(known), max(known)
    scale = (len(BLOCKS) - 2) / (high - low) if high > low else 0.0
    return "".join(
        BLOCKS[0] if cell is None else BLOCKS[1 + round((cell - low) * scale)] for cell in cells
    )


def _pace(run: RunFolder, paint: Paint) -> Iterator[str]:
    if run.last is None:
        return
    recent = [record.step_s for record in run.history.recent]
    half, most, worst = percentiles(recent, (50, 90, 99))
    others = f"p90 {show_fine_time(most)}, p99 {show_fine_time(worst)}"
    reports = f"median of {count(len(recent), 'report')}, {others}"
    yield _row(paint, "step time", show_fine_time(half), reports)
    tokens, memory = show_number(run.last.consumed_tokens), show_bytes(run.last.memory_bytes)
    ago = show_time(max(run.now - run.written, 0))
    yield _row(paint, "tokens", tokens, f"memory {memory}; last report {ago} ago")


def _ranks(run: RunFolder, paint: Paint) -> Iterator[str]:
    if not run.ranks:
        return
    good = [rank for rank in run.ranks if rank.state in ("alive", "done")]
    word = "done" if run.state in ("finished", "stopped") else "alive"
    hosts = count(len({rank.beat.host for rank in run.ranks}), "host")
    steps = [rank.beat.step for rank in run.ranks]
    where = f"{word}, on {hosts}; steps {min(steps)} to {max(steps)}"
    yield _row(paint, "ranks", f"{len(good)}/{len(run.ranks)}", where)
    bad = [rank for rank in run.ranks if rank.state not in ("alive", "done")]
    for rank in bad[:SHOWN]:
        what = (
            f"silent for {show_time(rank.silent_s)}" if rank.state == "silent" else rank.state[:60]
        )
        yield paint(
            f"{'':<{LEFT}} {rank.number:>9}  on {rank.beat.host}, last step {rank.beat.step}: "
            f"{what}",
            "red",
        )
    if len(bad) > SHOWN:
        yield paint(f"{'':<{LEFT}} {'':>9}  and {len(bad) - SHOWN} more", "red")


def _cores(run: RunFolder, paint: Paint) -> Iterator[str]:
    if not run.cores:
        return
    mean = sum(run.cores.values()) / len(run.cores)
    cells = "".join(BLOCKS[round(min(use, 1.0) * (len(BLOCKS) - 1))] for use in run.cores.values())
    cores = count(len(run.cores), "core")
    yield _row(paint, "device use", f"{mean:.0%}", f"{paint(cells[:64], 'cyan')}  {cores}")
    low = sorted(run.cores.items(), key=lambda item: item[1])[:SHOWN]
    idle = [f"{core} {use:.0%}" for core, use in low if use < mean / 2]
    if idle:
        yield paint(
            f"{'':<{LEFT}} {'':>9}  less than half of the others: {', '.join(idle)}", "yellow"
        )


def _saved(run: RunFolder, paint: Paint) -> Iterator[str]:
    if not run.saved:
        yield _row(paint, "checkpoint", "none")
        return
    last = run.saved[-1]
    ago = show_time(max(run.now - last.time, 0))
    size = show_bytes(last.size_bytes)
    yield _row(paint, "checkpoint", f"{last.step:,}", f"{size}, {ago} ago; {len(run.saved)} kept")
