"""One self-contained HTML page about one or several runs.

It has curves, throughput, configuration (settings that differ are marked), environment and
checkpoints.  Images are inline SVG, styles are inline, and nothing is loaded: the file can be sent
by mail.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from html import escape
from pathlib import Path

import numpy as np

from llamax.config.schema import sections
from llamax.runtime.units import count, perplexity, show_bytes, show_number, show_time
from llamax.tools.monitor.columns import Numbers
from llamax.tools.monitor.run_folder import RunFolder, percentiles
from llamax.tools.monitor.svg import COLOURS, Curve, chart
from llamax.training.metrics import Record

STYLE = Path(__file__).with_name("report.css")
DASH = "–"
GENERATOR = '<meta name="generator" content="llamax report">'
MARK = GENERATOR.encode()  # in every page


def page(runs: Sequence[RunFolder]) -> str:
    """The page as HTML."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = [
        *_header(runs),
        *_figures(runs),
        *_throughput(runs),
        *_configuration(runs),
        *_environment(runs),
        *_checkpoints(runs),
    ]
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(runs[0].now))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"{GENERATOR}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · llamax</title><style>{STYLE.read_text()}</style></head><body>"
        f"<main>{''.join(body)}<footer>llamax report, {made}</footer></main></body></html>\n"
    )


def with_distinct_names(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """The runs; those that share a name are named by the paths of their folders."""
    names = Counter(run.name for run in runs)
    return [replace(run, label=str(run.folder)) if names[run.name] > 1 else run for run in runs]


def _header(runs: Sequence[RunFolder]) -> Iterator[str]:
    first = runs[0]
    if len(runs) > 1:
        yield "<h1>Comparison of runs</h1>"
        rows = [
            [_key(k, run.name), _pill(run), *(_text(show, run) for show in SUMMARY.values())]
            for k, run in enumerate(runs)
        ]
        yield _table(["run", "state", *SUMMARY], rows)
        return
    description = ""
    if first.config:
        size = show_number(first.config.model.num_parameters())
        dtype, backend = first.config.run.dtype, first.config.run.backend
        description = f"{size} parameters in {dtype}, {first.mesh}, {backend}"
        description += (
            f", {count(int(first.environment['ranks']), 'rank')}"
            if "ranks" in first.environment
            else ""
        )
    yield f"<h1>{escape(first.name)} {_pill(first)}</h1><p class=about>{escape(description)}</p>"
    cards = (
        f"<div class=card><b>{_text(show, first)}</b><span>{escape(name)}</span></div>"
        for name, show in SUMMARY.items()
        if _text(show, first) != DASH
    )
    yield f"<div class=cards>{''.join(cards)}</div>"


def _pill(run: RunFolder) -> str:
    return f'<span class="pill {run.state}">{run.state}</span>'


def _key(number: int, name: str) -> str:
    return f'<i class=key style="background:var(--c{number % COLOURS})"></i>{escape(name)}'


def _text(show: Callable[[RunFolder], str], run: RunFolder) -> str:
    return escape(show(run)) if run.last else DASH


def _median_rate(run: RunFolder) -> float:
    return _percentiles(run, "tokens_per_s", (50,))[0]


def _validation(run: RunFolder) -> str:
    losses = run.columns["validation_loss"]
    known = losses[~np.isnan(losses)]
    return f"{known.min():.4f}" if known.size else DASH


def _percentiles(run: RunFolder, field: str, of: Sequence[int]) -> list[float]:
    return percentiles(np.sort(run.columns[field]).tolist(), of)


def _last(run: RunFolder) -> Record:
    assert run.last is not None
    return run.last


def _dollars(run: RunFolder) -> str:
    price = run.dollars_per_hour
    return f"${run.spent_s / 3600 * price:,.2f}" if price else DASH


SUMMARY: dict[str, Callable[[RunFolder], str]] = {
    "step": lambda run: f"{_last(run).step:,} of {run.steps:,}",
    "tokens": lambda run: show_number(_last(run).consumed_tokens),
    "loss": lambda run: f"{_last(run).loss:.4f}",
    "best validation": _validation,
    "tokens/s, median": lambda run: show_number(_median_rate(run)),
    "MFU, median": lambda run: (
        f"{_percentiles(run, 'mfu', (50,))[0]:.1%}" if _last(run).mfu else DASH
    ),
    "skipped steps": lambda run: f"{run.history.skipped:,}" if run.history.skipped else DASH,
    "went back": lambda run: count(_last(run).rewinds or 0, "time") if _last(run).rewinds else DASH,
    "training time": lambda run: show_time(run.spent_s),
    "cost": _dollars,
}


# --- figures -------------------------------------------------------------------------------------


def _figures(runs: Sequence[RunFolder]) -> Iterator[str]:
    def points(run: RunFolder, field: str, scale: float = 1.0) -> Numbers:
        return np.column_stack((run.columns["consumed_tokens"], run.columns[field] * scale))

    def over_tokens(
        title: str, field: str, show: Callable[[float], str], smooth: bool, zero: bool
    ) -> str:
        curves = [
            Curve(run.name, points(run, field), k, smooth=smooth) for k, run in enumerate(runs)
        ]
        return chart(title, curves, "tokens", show_number, show, zero)

    loss = [
        Curve(f"{run.name}, training", points(run, "loss"), k, smooth=True)
        for k, run in enumerate(runs)
    ]
    held_out = [
        Curve(
            f"{run.name}, validation",
            points(run, "validation_loss"),
            k + (1 if len(runs) == 1 else 0),
            marked=True,
        )
        for k, run in enumerate(runs)
    ]
    validated = any(run.history.validation_loss is not None for run in runs)
    digits: Callable[[float], str] = lambda value: f"{value:.4g}"
    figures = [
        chart(
            "loss, nats per token" + (" (dots: validation)" if validated else ""),
            [*loss, *held_out],
            "tokens",
            show_number,
            digits,
        ),
        over_tokens("gradient norm before clipping", "grad_norm", digits, True, True),
        over_tokens("tokens per second", "tokens_per_s", show_number, True, True),
        over_tokens("seconds per step", "step_s", lambda value: show_time(value), True, True),
        over_tokens(
            "learning rate", "lr", lambda value: f"{value:.1e}" if value else "0", False, True
        ),
        chart(
            "peak memory of rank 0",
            [
                Curve(run.name, points(run, "memory_bytes", 2.0**-30), k)
                for k, run in enumerate(runs)
            ],
            "tokens",
            show_number,
            lambda value: f"{value:.3g} GiB",
            zero=True,
        ),
    ]
    if len(runs) > 1:
        legend = "".join(f"<span>{_key(k, run.name)}</span>" for k, run in enumerate(runs))
        yield f"<p class=legend>{legend}</p>"
    yield f"<section class=figures>{''.join(figures)}</section>"


# --- tables --------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[int] = ()) -> str:
    """A table of cells in HTML; the rows with numbers in ``marked`` are highlighted."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = (
        f"<tr{' class=marked' if number in marked else ''}>"
        + "".join(f"<td>{cell}</td>" for cell in row)
        + "</tr>"
        for number, row in enumerate(rows)
    )
    tight = " class=tight" if len(head) > 5 else ""
    return (
        f"<div class=wide><table{tight}><thead><tr>{top}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _throughput(runs: Sequence[RunFolder]) -> Iterator[str]:
    percents = (1, 10, 50, 90, 99)
    rows = []
    for k, run in enumerate(runs):
        if run.last:
            times = _percentiles(run, "step_s", percents)
            peak = int(run.columns["memory_bytes"].max())
            ppl = perplexity(_last(run).loss)
            cells = [*map(show_time, times), show_bytes(peak), f"{ppl:.2f}"]
            rows.append([_key(k, run.name), *map(escape, cells)])
    if rows:
        head = ["run", *(f"step time p{p}" for p in percents), "peak memory", "perplexity, last"]
        yield f"<h2>Throughput</h2>{_table(head, rows)}"


def _configuration(runs: Sequence[RunFolder]) -> Iterator[str]:
    known = [run for run in runs if run.config is not None]
    values = [dict(_settings(run)) for run in known]
    if not values:
        return
    names = list(dict.fromkeys(name for each in values for name in each))
    rows = [[escape(name), *(escape(each.get(name, DASH)) for each in values)] for name in names]
    differ = [
        n
        for n, name in enumerate(names)
        if name != "run.folder" and len({each.get(name) for each in values}) > 1
    ]
    if len(known) > 1:
        yield "<h2>What differs</h2>"
        head = ["setting", *(run.name for run in known)]
        yield _table(head, [rows[n] for n in differ]) if differ else "<p>no setting</p>"
    yield "<h2>Configuration</h2><details><summary>all settings</summary>"
    yield _table(["setting", *(run.name for run in known)], rows, differ) + "</details>"


def _settings(run: RunFolder) -> Iterator[tuple[str, str]]:
    assert run.config is not None
    for prefix, section in sections(run.config):
        for each in fields(section):
            value = getattr(section, each.name)
            if not hasattr(value, "__dataclass_fields__"):
                yield f"{prefix}.{each.name}", DASH if value is None else str(value)


def _environment(runs: Sequence[RunFolder]) -> Iterator[str]:
    known = [run for run in runs if run.environment]
    if known:
        names = list(dict.fromkeys(name for run in known for name in run.environment))
        rows = [
            [escape(name), *(escape(str(run.environment.get(name, DASH))) for run in known)]
            for name in names
            if any(run.environment.get(name) for run in known)
        ]
        yield f"<h2>Environment</h2>{_table(['', *(run.name for run in known)], rows)}"


def _checkpoints(runs: Sequence[RunFolder]) -> Iterator[str]:
    rows = [
        [
            _key(k, run.name),
            f"{each.step:,}",
            show_bytes(each.size_bytes),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.time)),
        ]
        for k, run in enumerate(runs)
        for each in run.saved
    ]
    if rows:
        yield f"<h2>Checkpoints</h2>{_table(['run', 'step', 'size', 'finished'], rows)}"
