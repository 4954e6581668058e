"""``llamax plot RUN...``: the loss curves of one or several runs as a picture.

The picture shows training and validation loss in nats per token over consumed tokens; a reference
line, such as the unigram entropy of the data, says what a model that learnt nothing but word
frequencies would reach.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llamax.config.constants import METRICS_FILE
from llamax.runtime.errors import BackendError, DataError
from llamax.runtime.process import run_main
from llamax.training.metrics import Record, read_jsonl


def draw(
    runs: dict[str, list[Record]], out: Path, reference: tuple[str, float] | None = None
) -> None:
    """Write the loss curves of named runs to ``out`` (PNG, SVG or PDF by its ending).

    Raises BackendError where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise BackendError(
            "drawing needs the package matplotlib, which is not installed; "
            "pip install 'llamax[watch]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    for name, records in runs.items():
        tokens = [record.consumed_tokens / 1e6 for record in records]
        (train,) = axes.plot(
            tokens, [record.loss for record in records], linewidth=1, alpha=0.6, label=name
        )
        validated = [
            (record.consumed_tokens / 1e6, record.validation_loss)
            for record in records
            if record.validation_loss is not None
        ]
        if validated:
            axes.plot(
                *zip(*validated, strict=True),
                "o-",
                color=train.get_color(),
                markersize=4,
                label=f"{name}, validation",
            )
    if reference is not None:
        name, value = reference
        axes.axhline(value, color="grey", linestyle="--", linewidth=1, label=f"{name} {value:.2f}")
    axes.set_xlabel("consumed tokens, millions")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out)
    pyplot.close(figure)


def read(folders: Sequence[Path]) -> dict[str, list[Record]]:
    """The records of runs, by the names of their folders; whole paths where two are named alike."""
    names = Counter(folder.resolve().name for folder in folders)
    runs = {}
    for folder in folders:
        name = folder.resolve().name
        label = name if names[name] == 1 else str(folder)
        runs[label] = read_jsonl(folder / METRICS_FILE)
        if not runs[label]:
            raise DataError(f"{folder}: has no records in metrics.jsonl; give a run's folder")
    return runs


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="llamax plot", description="Draw the loss curves of one or several runs."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, default=Path("loss.png"), help="picture to write")
    parser.add_argument("--reference", type=float, help="draw a line at this loss, in nats")
    parser.add_argument("--reference-name", default="reference", help="what that line is")
    options = parser.parse_args(argv)
    line = None if options.reference is None else (options.reference_name, options.reference)
    draw(read(options.runs), options.out, line)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
