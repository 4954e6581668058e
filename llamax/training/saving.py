"""What a checkpoint of a run holds beside its tensors, and what happens where it cannot be written.

``llamax.training.setup.prepare`` reads the state again when a run is resumed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamax.backends.random_state import random_state
from llamax.checkpoint.places import STARTED_IN
from llamax.config.load import dump_config
from llamax.data.chat.record import PROMPT
from llamax.runtime.errors import CheckpointError
from llamax.runtime.logging import logger
from llamax.runtime.units import show_time
from llamax.training.setup import REWINDS, TOKENS, Job
from llamax.training.step_result import Step


def save(job: Job, step: Step, consumed: int, row: Mapping[str, Any]) -> None:
    """Start a checkpoint of everything that a resume needs; files are written in the background.

    ``consumed``: samples so far; ``row``: ``StepCheck.state``.
    """
    with tolerated(job):
        job.saver.wait()
    result, started = step.result, time.perf_counter()
    with tolerated(job):
        job.saver.save(
            step.number,
            job.state.optimizer.owned(),
            state={
                "consumed_sequences": consumed,
                TOKENS: job.consumed_tokens(consumed),
                "seed": job.config.run.seed,
                "tokenizer": job.dataset.fingerprint,
                STARTED_IN: str(Path.cwd()),
                **({PROMPT: prompt.to_json()} if (prompt := job.dataset.prompt) else {}),
                **(job.adapters.state() if job.adapters else {}),
                **job.early_stopping.state(),
                **(result.loss_scale.to_json() if result.loss_scale else {}),
                **(spikes.state() if (spikes := job.state.spikes) else {}),
                **row,
                **({REWINDS: job.rewinds} if job.rewinds else {}),
                **job.model_class,
            },
            model=job.config.model.to_hub(job.config.run.dtype),
            config_text=dump_config(job.config),
            rng=random_state(job.backend.device),
            score=result.validation_loss,
        )
    if job.main:
        stall = show_time(time.perf_counter() - started)
        logger.info("saving step %d; training waited %s", step.number, stall)


@contextmanager
def tolerated(job: Job) -> Iterator[None]:
    """If a checkpoint cannot be written, end or warn, as checkpoint.on_failure says."""
    try:
        yield
    except CheckpointError as error:
        if job.config.checkpoint.on_failure == "stop":
            raise
        logger.warning("%s; training goes on", error)
