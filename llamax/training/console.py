"""The console view of a run: one line per record and, on a terminal, a bar that moves every step.

::

    step  50/1000  loss   4.1027  grad    0.943  lr 3.00e-03   2.06K tokens/s  left 7m41s
    step 57/1000 |██▎                              |   6%  left 7m38s  loss 4.1027

Lines of the log appear above the bar (``llamax.runtime.logging.show_line``).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from llamax.runtime.logging import show_line
from llamax.runtime.units import count, eta, show_bytes, show_number, show_time
from llamax.training.metrics import Record

BAR = "step {n_fmt}/{total_fmt} |{bar}| {percentage:3.0f}%{desc}"
SMOOTHING = 0.3  # weight of the last step in the time of a step from which the bar's rest follows
# Parts that a line too long for the terminal leaves out, in this order.
DROPPED = ("memory", "mfu", "left", "lr", "scale", "grad", "tokens")


def line(record: Record, steps: int, width: int = 0) -> str:
    """The console line of a record, aligned from step to step.

    ``width``: columns that there are, 0 for any number; values at the end of the list above are the
    last to be left out.
    """
    validation = record.validation_loss
    parts = {
        "step": f"step {record.step:>{len(str(steps))}}/{steps}",
        "loss": f"loss {record.loss:8.4f}",
        "validation": "" if validation is None else f"validation {validation:8.4f}",
        "grad": f"grad {record.grad_norm:8.3f}",
        "scale": ""
        if record.loss_scale is None
        else _scale(record.loss_scale, record.overflowed_steps),
        "lr": f"lr {record.lr:.2e}",
        "tokens": f"{show_number(record.tokens_per_s):>6} tokens/s",
        "mfu": f"mfu {record.mfu:6.1%}" if record.mfu else "",
        "memory": f"{show_bytes(record.memory_bytes):>8}" if record.memory_bytes else "",
        "skipped": "" if record.skipped_samples is None else "skipped",
        "left": f"left {show_time(eta(record.step, steps, record.step_s))}",
    }
    for name in DROPPED:
        if not width or len(_joined(parts)) <= width:
            break
        del parts[name]
    return _joined(parts)


def _scale(scale: float, overflowed: int | None) -> str:
    more = f" ({count(overflowed, 'step')} overflowed)" if overflowed else ""
    return f"scale {scale:<8g}{more}"


def _joined(parts: dict[str, str]) -> str:
    return "  ".join(part for part in parts.values() if part)


class ConsoleWriter:
    """One line per record on ``stream``, by default stderr, and below it a bar if ``bar``."""

    def __init__(
        self, steps: int, step: int = 0, bar: bool = False, stream: TextIO | None = None
    ) -> None:
        self.steps, self.stream, self.loss = steps, stream or sys.stderr, ""
        self.step, self.step_s = step, 0.0
        self.bar: Any = None
        if bar:
            from tqdm import tqdm

            self.bar = tqdm(
                total=steps,
                initial=step,
                file=self.stream,
                dynamic_ncols=True,
                leave=False,
                miniters=1,
                bar_format=BAR,
            )

    def write(self, record: Record) -> None:
        if self.bar is None:
            show_line(line(record, self.steps), self.stream)
            return
        self.loss = f"  loss {record.loss:.4f}"
        self._describe(self.loss)
        show_line(line(record, self.steps, shutil.get_terminal_size().columns), self.stream)

    def stepped(self, step_s: float) -> None:
        """Move the bar by one step, which took so many seconds."""
        self.step += 1
        self.step_s += (step_s - self.step_s) * (SMOOTHING if self.step_s else 1.0)
        if self.bar is not None:
            self._describe(self.loss)
            self.bar.update()

    def _describe(self, what: str) -> None:
        """Put the time left and ``what`` behind the bar, which shows them when it is drawn."""
        left = show_time(eta(self.step, self.steps, self.step_s)) if self.step_s else "?"
        self.bar.desc = f"  left {left}{what}"

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show in the bar what happens between two steps."""
        if self.bar is not None:
            self._describe(f"  {what}")
            self.bar.refresh()
        yield
        if self.bar is not None:
            self._describe(self.loss)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
