"""Going back: after so many skipped steps in a row the run resumes from an earlier checkpoint.

Skipped steps change nothing, so the weights are those that met the spike.  The run goes back to the
last checkpoint before it, and on with the samples after it, as PaLM's training did (Chowdhery et
al. 2022, section 5.1)::

    steps      ... 40 (saved)  41  42  43  44  45       41  42  ...
    samples                    a   b  [c] [d] [e]       f   g   ...       [ ] skipped, rewind 3

All samples since the checkpoint, a to e, are passed over.  When to go back follows from numbers
that all ranks have; which checkpoint is the last depends on files, so rank 0 looks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llamax.config.constants import CHECKPOINTS_FOLDER
from llamax.config.step_folders import list_checkpoints, step_name, step_of
from llamax.runtime.errors import NotFinite
from llamax.runtime.logging import logger
from llamax.runtime.units import row
from llamax.training.setup import Job
from llamax.training.step_check import StepCheck

MOST_REWINDS = 3  # to one checkpoint


@dataclass(frozen=True)
class Rewind:
    """Where a run goes on: after the checkpoint ``folder``, with the samples after ``consumed``.

    ``count``: how often the run has gone back, ``same``: how often to this checkpoint.
    """

    folder: Path
    consumed: int
    count: int
    same: int


def find_rewind(job: Job, check: StepCheck, saved: list[int]) -> Rewind | None:
    """Where to go back to; None, with a warning, where no checkpoint is old enough.

    ``saved``: the steps that ``job`` has saved.  Called by all ranks, with no save in flight.
    Raises NotFinite where the run went back to the same checkpoint too often.
    """
    first = check.first  # overflows of float16 inside the row are not counted
    step = job.backend.of_rank_0(
        f"rewind {job.rewinds} {check.last}", _last_before(job, first, saved) if job.main else 0
    )
    if step < 0:
        if job.main:
            logger.warning("no checkpoint from before step %d: the run cannot go back", first)
        return None
    folder = Path(job.config.run.folder) / CHECKPOINTS_FOLDER
    resumed = job.resumed
    if resumed is None or step != job.step:
        resumed = folder / step_name(step)
    same = job.rewound + 1 if step == job.step else 1
    if same > MOST_REWINDS:
        raise NotFinite(
            f"step {check.last}: {row(check.skipped, 'step')} skipped again after the run "
            f"went back to {resumed} {MOST_REWINDS} times; lower optim.lr, raise "
            "optim.spike_sigma, or resume an earlier checkpoint"
        )
    consumed = job.consumed_sequences + (check.last - job.step) * job.config.data.global_batch
    if job.main:
        logger.warning(
            "%s skipped: back to %s, and on with the samples after step %d",
            row(check.skipped, "step"),
            resumed,
            check.last,
        )
    return Rewind(resumed, consumed, job.rewinds + 1, same)


def rewound(job: Job, back: Rewind) -> Job:
    """A job that resumes ``back.folder``, with the samples after ``back.consumed`` to come."""
    return replace(job, consumed_sequences=back.consumed, rewinds=back.count, rewound=back.same)


def _last_before(job: Job, first: int, saved: list[int]) -> int:
    """The step of the last checkpoint before step ``first`` in this run's history; -1: none."""
    folder = Path(job.config.run.folder) / CHECKPOINTS_FOLDER
    steps = [step_of(path) for path in list_checkpoints(folder)]
    known = [step for step in steps if step < job.step or step in saved]
    if job.resumed is not None:
        known.append(job.step)
    return max((step for step in known if step < first), default=-1)
