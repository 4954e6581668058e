"""Draws the pictures of the documentation as SVG files beside this script.

    python docs/drawings/draw.py [RUN]

RUN is a run's folder, such as demo/run; with it the loss curve is drawn too.  Each picture has a
background of its own, so that it is legible on a white and on a dark page.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path

from llamax.parallel.context_parallel import chunks_of
from llamax.parallel.mesh import Mesh
from llamax.tools.monitor import svg
from llamax.training.metrics import read_jsonl

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INK, MUTED, LINE, PAPER = "#1f2933", "#52606d", "#9aa5b1", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE = "#2f6fb3", "#c2601c", "#2f8a5b", "#7a4fb0"
PALE = {BLUE: "#e3eefa", ORANGE: "#fbeadd", GREEN: "#e0f3e8", PURPLE: "#eee6f8", LINE: "#f1f4f7"}
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)


def box(x: float, y: float, w: float, h: float, colour: str = LINE, fill: str = "") -> str:
    """A rounded box in a colour, filled pale unless ``fill`` says otherwise."""
    inside = fill or PALE[colour]
    return (
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{inside}" '
        f'stroke="{colour}" stroke-width="1.5"/>'
    )


def frame(x: float, y: float, w: float, h: float, colour: str) -> str:
    """A dashed outline around a group."""
    return (
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="10" fill="none" stroke="{colour}" '
        'stroke-width="2" stroke-dasharray="6 4"/>'
    )


def text(
    x: float,
    y: float,
    words: str,
    size: int = 14,
    colour: str = INK,
    anchor: str = "middle",
    mono: bool = False,
    bold: bool = False,
) -> str:
    """A line of text whose middle height is ``y``."""
    family = ' font-family="ui-monospace, DejaVu Sans Mono, monospace"' if mono else ""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" dy="0.35em" font-size="{size}" fill="{colour}" '
        f'text-anchor="{anchor}"{family}{weight}>{escape(words)}</text>'
    )


def labelled(
    x: float, y: float, w: float, h: float, words: str, colour: str = LINE, **style: object
) -> str:
    """A box with a line of text in its middle."""
    return box(x, y, w, h, colour) + text(x + w / 2, y + h / 2, words, **style)  # type: ignore


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str = MUTED) -> str:
    """An arrow from one point to another."""
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="1.5" '
        'marker-end="url(#head)"/>'
    )


def picture(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """A whole SVG file."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{escape(title, quote=True)}" '
        'font-family="system-ui, DejaVu Sans, sans-serif">\n'
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" fill="{MUTED}"/></marker>'
        "</defs>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def mesh() -> str:
    """Eight ranks, tensor 4 x data 2, and their groups."""
    grid, parts = Mesh.fill(8, tp=4), []
    left, top, across, down = 150, 92, 125, 100
    for row in range(grid.dp):
        parts.append(frame(left - 16, top + row * down - 14, 4 * across - 5, 78, BLUE))
        y = top + row * down + 25
        parts.append(text(left - 30, y, f"data {row}", anchor="end", colour=BLUE, bold=True))
    for column in range(grid.tp):
        x = left + column * across
        parts.append(frame(x - 7, top - 32, 102, 2 * down + 14, ORANGE))
        parts.append(text(x + 44, top - 48, f"tensor {column}", colour=ORANGE, bold=True))
    for rank in range(grid.world_size):
        at = grid.coordinate(rank)
        x, y = left + at.tp * across, top + at.dp * down
        parts.append(labelled(x, y, 88, 50, f"rank {rank}", LINE, size=15))
    y = top + 2 * down + 18
    words = "a row is a tensor group: its ranks share every layer of one copy of the model"
    parts.append(text(left - 16, y, words, 13, BLUE, "start"))
    words = "a column is a data group: its ranks hold the same share, and sum its gradients"
    parts.append(text(left - 16, y + 22, words, 13, ORANGE, "start"))
    return picture(680, y + 48, "A mesh of eight ranks", parts)


def sharding() -> str:
    """One block on two tensor ranks."""
    parts = []
    columns = (
        (32, 70, "x_BsD", "half the sequence"),
        (165, 70, "x_BSD", "whole sequence"),
        (300, 100, "", "columns of W1"),
        (445, 100, "", "own heads or features"),
        (590, 100, "", "rows of W2"),
        (735, 70, "z_BSD", "a part of the sum"),
        (880, 70, "x_BsD", "half the sequence"),
    )
    for x, w, _, under in columns:
        parts.append(text(x + w / 2, 262, under, 12, MUTED))
    for rank, colour in enumerate((BLUE, ORANGE)):
        y = 50 + rank * 110
        parts.append(text(32, y - 16, f"rank {rank}", 14, colour, "start", bold=True))
        for x, _, name, _ in columns[:2] + columns[5:]:
            short = name == "x_BsD"
            for half in range(2):
                own = not short or half == rank
                if own:
                    tint = colour if short or name == "z_BSD" else (BLUE, ORANGE)[half]
                    parts.append(box(x, y + half * 34, 70, 30, tint))
                else:
                    parts.append(
                        f'<rect x="{x}" y="{y + half * 34}" width="70" height="30" rx="6" '
                        f'fill="none" stroke="{LINE}" stroke-dasharray="3 3"/>'
                    )
            at = y + 15 + rank * 34 if short else y - 11
            parts.append(text(x + 35, at, name, 13, mono=True))
        parts.append(labelled(300, y + 8, 100, 50, "share of W1", colour, size=14))
        parts.append(labelled(445, y + 8, 100, 50, "no other rank", colour, size=13))
        parts.append(labelled(590, y + 8, 100, 50, "share of W2", colour, size=14))
        for x1, x2 in ((240, 298), (402, 443), (547, 588), (692, 733)):
            parts.append(arrow(x1, y + 33, x2, y + 33))
    for x, name in ((133, "all-gather"), (843, "reduce-scatter")):
        parts.append(
            f'<rect x="{x - 13}" y="44" width="26" height="186" rx="6" fill="{PALE[GREEN]}" '
            f'stroke="{GREEN}" stroke-width="1.5"/>'
        )
        parts.append(
            f'<text transform="translate({x} 137) rotate(-90)" dy="0.35em" text-anchor="middle" '
            f'font-size="13" fill="{GREEN}" font-weight="600">{name}</text>'
        )
        for rank in range(2):
            y = 83 + rank * 110
            parts += [arrow(x - 29, y, x - 15, y), arrow(x + 15, y, x + 31, y)]
    return picture(980, 284, "A block on two tensor ranks", parts)


def one_graph() -> str:
    """The rank as a constant of the graph, and as an input."""
    parts = [
        text(220, 28, "rank number inside the graph", 15, ORANGE, bold=True),
        text(690, 28, "rank number as an input tensor", 15, GREEN, bold=True),
        f'<line x1="455" y1="20" x2="455" y2="318" stroke="{LINE}"/>',
    ]
    for rank in range(4):
        y = 56 + rank * 56
        parts.append(labelled(20, y, 90, 38, f"rank {rank}", LINE))
        parts.append(arrow(112, y + 19, 158, y + 19))
        parts.append(labelled(160, y, 120, 38, f"ids - {rank} * v", COLOURS[rank], mono=True))
        parts.append(arrow(282, y + 19, 328, y + 19))
        parts.append(labelled(330, y, 105, 38, f"program {rank}", COLOURS[rank]))
        parts.append(labelled(475, y, 70, 38, f"rank {rank}", LINE))
        parts.append(arrow(547, y + 19, 563, y + 19))
        parts.append(labelled(565, y + 3, 40, 32, f"[{rank}]", GREEN, mono=True))
        parts.append(arrow(607, y + 19, 626, 122 + rank * 28))
    parts.append(box(628, 96, 176, 138, GREEN))
    parts.append(text(716, 152, "ids - rank_index * v", 13, mono=True))
    parts.append(text(716, 180, "the same graph", 13, MUTED))
    parts.append(arrow(806, 165, 824, 165))
    parts.append(labelled(826, 140, 78, 50, "program", GREEN))
    parts.append(text(220, 300, "4 compilations of 25 to 40 minutes", 14, ORANGE))
    parts.append(text(690, 300, "1 compilation, shared by all ranks and steps", 14, GREEN))
    return picture(920, 330, "One graph for every rank", parts)


def context() -> str:
    """A sequence of eight chunks over four ranks, and the pairs of chunks that each computes."""
    ranks, parts = 4, [text(20, 28, "one sequence", 15, anchor="start", bold=True)]
    owner = {chunk: rank for rank in range(ranks) for chunk in chunks_of(rank, ranks)}
    for chunk, rank in owner.items():
        x = 20 + chunk * 46
        parts.append(labelled(x, 48, 40, 34, str(chunk), COLOURS[rank]))
    for rank, colour in enumerate(COLOURS):
        y = 112 + rank * 46
        low, high = chunks_of(rank, ranks)
        parts.append(labelled(20, y, 40, 34, str(low), colour))
        parts.append(labelled(66, y, 40, 34, str(high), colour))
        words = f"rank {rank} computes {low + 1} + {high + 1} of 16 pairs"
        parts.append(text(122, y + 17, words, 14, colour, "start"))
    parts.append(text(604, 28, "keys, gathered from all ranks", 15, bold=True))
    for chunk, rank in owner.items():
        parts.append(text(454 + chunk * 34 + 15, 52, str(chunk), 13, MUTED))
        parts.append(text(440, 83 + chunk * 30, str(chunk), 13, COLOURS[rank], "end"))
        for key in range(2 * ranks):
            x, y = 454 + key * 34, 70 + chunk * 30
            if key < chunk:
                parts.append(box(x, y, 30, 26, COLOURS[rank]))
            elif key == chunk:
                parts.append(
                    f'<path d="M{x} {y}V{y + 26}H{x + 30}Z" fill="{PALE[COLOURS[rank]]}" '
                    f'stroke="{COLOURS[rank]}" stroke-width="1.5"/>'
                )
            else:
                parts.append(
                    f'<rect x="{x}" y="{y}" width="30" height="26" rx="6" fill="none" '
                    f'stroke="{LINE}" stroke-dasharray="3 3"/>'
                )
    parts.append(
        f'<text transform="translate(412 190) rotate(-90)" dy="0.35em" text-anchor="middle" '
        f'font-size="15" fill="{INK}" font-weight="600">queries</text>'
    )
    return picture(746, 326, "A sequence over four context ranks", parts)


def checkpoints() -> str:
    """Saved by one mesh, loaded by another."""
    parts = [
        text(90, 28, "tensor 2 x data 2", 15, bold=True),
        text(390, 28, "step-00000100/", 15, bold=True, mono=True),
        text(760, 28, "tensor 1 x data 2", 15, bold=True),
    ]
    for rank, colour in enumerate(COLOURS):
        y = 58 + rank * 54
        tensor, data = rank % 2, rank // 2
        parts.append(labelled(20, y, 140, 40, f"rank {rank}", colour))
        parts.append(arrow(162, y + 20, 226, y + 20))
        name = f"weights-tp{tensor:02}-dp{data:02}"
        parts.append(labelled(228, y, 240, 40, f"{name}, optimizer-...", colour, size=12))
        for reader in range(2):
            parts.append(arrow(470, y + 20, 628, 106 + reader * 112))
    for rank in range(2):
        y = 76 + rank * 112
        parts.append(box(630, y, 260, 60, LINE))
        parts.append(text(690, y + 30, f"rank {rank}", 14))
        for number, colour in enumerate(COLOURS):
            parts.append(box(745 + number * 34, y + 14, 30, 32, colour))
    parts.append(labelled(228, 278, 240, 36, "manifest.json", LINE, mono=True))
    parts.append(labelled(228, 324, 240, 36, "done", GREEN, mono=True))
    parts.append(text(20, 296, "which elements are", 13, MUTED, "start"))
    parts.append(text(20, 314, "in which file", 13, MUTED, "start"))
    parts.append(text(20, 342, "written last", 13, MUTED, "start"))
    parts.append(text(630, 296, "a rank reads the elements it needs,", 13, MUTED, "start"))
    parts.append(text(630, 314, "and checks them while it reads", 13, MUTED, "start"))
    return picture(920, 384, "A checkpoint, saved by one mesh and loaded by another", parts)


def rooms() -> str:
    """The packages in rows, as tests/test_architecture.py checks them."""
    source = (ROOT / "tests" / "test_architecture.py").read_text()
    assigned = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROWS"
    )
    rows = ast.literal_eval(assigned.value)
    words = {
        "cli": "commands",
        "train": "the training loop",
        "tools.doctor": "checks before a launch",
        "tools.audit": "what a cluster compiles",
        "tools.monitor": "watch, report",
        "tools.plan": "memory, time, cost",
        "training": "the pieces of a run",
        "inference": "generate, evaluate",
        "checkpoint": "save, load, other formats",
        "optim": "AdamW, ZeRO",
        "model": "Llama, LoRA, QLoRA",
        "backends": "devices",
        "data": "text to batches",
        "parallel": "mesh, sharding, layers",
        "ops": "operations; kernels",
        "launch": "launchers",
        "config": "settings, recipes, machines",
        "runtime": "errors, logs, files",
    }
    parts, left, width, y = [], 24, 672, 20
    for row in rows:
        names = [name for name in row.split() if name in words]
        each = (width - 12 * (len(names) - 1)) / len(names)
        for place, name in enumerate(names):
            x = left + place * (each + 12)
            parts.append(box(x, y, each, 44, BLUE))
            parts.append(text(x + each / 2, y + 15, name, 14, bold=True, mono=True))
            parts.append(text(x + each / 2, y + 32, words[name], 12, MUTED))
        y += 54
    parts.append(arrow(712, 30, 712, y - 20))
    parts.append(
        f'<text transform="translate(728 {y / 2}) rotate(-90)" dy="0.35em" text-anchor="middle" '
        f'font-size="13" fill="{MUTED}">imports only rows below</text>'
    )
    return picture(746, y + 8, "The packages of llamax", parts)


def loss(run: Path) -> str:
    """The loss of a run as llamax's own report draws it."""
    records = list(read_jsonl(run / "metrics.jsonl"))
    curves = [
        svg.Curve("training", [(r.step, r.loss) for r in records], 0),
        svg.Curve(
            "validation",
            [(r.step, r.validation_loss) for r in records if r.validation_loss is not None],
            1,
            marked=True,
        ),
    ]
    chart = svg.chart("loss", curves, "step", "{:g}".format, "{:.1f}".format)
    found = re.search(r"<svg[^>]*>(.*)</svg>", chart, re.DOTALL)
    assert found is not None
    style = (
        "<style>.grid { stroke: #dde3e9; }"
        f".tick {{ font-size: 11px; fill: {MUTED}; }}"
        ".line { fill: none; stroke-width: 2; }</style>"
    )
    legend = text(svg.WIDTH - 20, 22, "training loss, nats a token", 12, BLUE, "end")
    legend += text(svg.WIDTH - 20, 40, "validation loss", 12, ORANGE, "end")
    drawn = found[1].replace("var(--c0)", BLUE).replace("var(--c1)", ORANGE)
    return picture(svg.WIDTH, svg.HEIGHT, "The loss of the demo", [style, drawn, legend])


def main(arguments: list[str]) -> None:
    pictures = {
        "mesh": mesh(),
        "sharding": sharding(),
        "context": context(),
        "one-graph": one_graph(),
        "checkpoints": checkpoints(),
        "rooms": rooms(),
    }
    if arguments:
        pictures["demo-loss"] = loss(Path(arguments[0]))
    for name, drawn in pictures.items():
        (HERE / f"{name}.svg").write_text(drawn)


if __name__ == "__main__":
    main(sys.argv[1:])
