"""Whether runs tile a tensor, strip by strip and run by run: what arrays of runs are held to."""

from __future__ import annotations

from collections.abc import Sequence

from llamax.checkpoint.runs import Run, row_width


def is_tiling(shape: Sequence[int], runs: Sequence[Run]) -> bool:
    """Whether runs cover every element of a tensor exactly once."""
    strips: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        strips.setdefault((run.left, run.width), []).append(run)
    right, rows = 0, shape[0] if shape else 1
    for (left, width), strip in sorted(strips.items()):
        at = 0
        for run in sorted(strip):
            if run.start != at or run.length < 1:
                return False
            at = run.stop
        if left != right or width < 1 or at != rows * width:
            return False
        right += width
    return right == row_width(shape)
