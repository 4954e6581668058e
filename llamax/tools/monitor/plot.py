"""Loss curves of runs as a picture: training and validation loss over consumed tokens.

A reference line, such as the unigram entropy of the data, shows the loss of a model that has learnt
only how frequent each token is.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from llamax.config.constants import METRICS_FILE
from llamax.runtime.errors import BackendError, DataError
from llamax.runtime.files import replace_output
from llamax.runtime.text import printable_line
from llamax.tools.monitor.columns import Numbers, read_columns
from llamax.tools.monitor.run_folder import check_is_run

COLUMNS = ("consumed_tokens", "loss", "validation_loss")
ENDINGS = (".png", ".svg", ".pdf")
UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
MARK = "llamax plot"  # the maker of a picture, in its metadata


def check_matplotlib() -> None:
    """Raise BackendError if the package that draws is not installed."""
    if find_spec("matplotlib") is None:
        raise BackendError(
            "drawing needs the package matplotlib, which is not installed; "
            "pip install 'llamax[plot]'"
        )


def draw(
    runs: dict[str, dict[str, Numbers]], out: Path, reference: tuple[str, float] | None = None
) -> None:
    """Draw the loss curves of named runs into ``out`` (PNG, SVG or PDF by its ending).

    ``runs``: consumed_tokens, loss and validation_loss of every record (``read_runs``).

    ``reference``: name and loss (nats per token) of a horizontal line.  Raises BackendError if
    matplotlib is not installed, and DataError for another ending, a file that cannot be written, or
    one in its place that is no picture of this kind.
    """
    ending = out.suffix.lower()
    if ending not in ENDINGS:
        raise DataError(f"{out}: a picture ends with {', '.join(ENDINGS)}; choose another `out`")
    check_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    labels: list[str] = []
    scale, unit = unit_of(max(columns["consumed_tokens"].max() for columns in runs.values()))
    for name, columns in runs.items():
        tokens, validation = columns["consumed_tokens"] / scale, columns["validation_loss"]
        (train,) = axes.plot(tokens, columns["loss"], linewidth=1, alpha=0.6, label=".")
        labels.append(name)
        validated = ~np.isnan(validation)
        if validated.any():
            axes.plot(
                tokens[validated],
                validation[validated],
                "o-",
                color=train.get_color(),
                markersize=4,
                label=".",
            )
            labels.append(f"{name}, validation")
    if reference is not None:
        name, value = reference
        axes.axhline(value, color="grey", linestyle="--", linewidth=1, label=".")
        labels.append(f"{name} {value:.2f}")
    axes.set_xlabel(f"consumed tokens, {unit}" if unit else "consumed tokens")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    # matplotlib leaves out labels that begin with "_", and reads "$" as mathematics
    for text, label in zip(axes.legend(frameon=False).get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(printable_line(label))
    picture = io.BytesIO()
    with warnings.catch_warnings():  # of signs that the font lacks, and of losses out of range
        warnings.simplefilter("ignore")
        maker = {"Software" if ending == ".png" else "Creator": MARK}
        figure.savefig(picture, format=ending[1:], metadata=maker)
    pyplot.close(figure)
    try:
        replace_output(out, picture.getvalue(), lambda before: MARK.encode() in before)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); check `out`") from None


def unit_of(tokens: float) -> tuple[float, str]:
    """The unit of an axis that ends at so many tokens, and its name; none below a thousand."""
    return next((unit for unit in UNITS if tokens >= unit[0]), (1.0, ""))


def read_runs(folders: Sequence[Path]) -> dict[str, dict[str, Numbers]]:
    """The losses of runs by the names of their folders; by whole paths if names are equal.

    Raises DataError for a folder that is not of a run, or has no records.
    """
    names = Counter(folder.resolve().name for folder in folders)
    runs = {}
    for folder in folders:
        check_is_run(folder)
        name = folder.resolve().name
        label = name if names[name] == 1 else str(folder)
        runs[label] = read_columns(folder / METRICS_FILE, COLUMNS)
        if not len(runs[label]["loss"]):
            raise DataError(f"{folder}: has no records yet in {METRICS_FILE}; plot it later")
    return runs
