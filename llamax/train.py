"""The training program: ``torchrun --nproc-per-node 4 -m llamax.train --config demo``.

From Python, ``llamax.train("demo", run={"steps": 100}, ranks=4)`` is the function ``start``.
``loop`` is the run, readable top to bottom; ``llamax.training.step`` does a step, and
``llamax.training.setup`` builds the parts.  The loop never waits for the device inside a step:
the results of step n - 1 are fetched while step n runs.
"""

from __future__ import annotations

import gc
import os
import sys

if __name__ == "__main__":  # the command line imports this module again, after --help
    from importlib import import_module

    from llamax.parallel.rendezvous import is_first_local_rank
    from llamax.runtime import signals
    from llamax.runtime.process import run_main, steady_heap

    steady_heap()
    signals.install(is_first_local_rank(os.environ))  # before torch is imported: that takes seconds
    sys.exit(run_main(import_module("llamax.cli.train").main))

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from llamax.checkpoint import lock
from llamax.checkpoint.listing import newest_checkpoint
from llamax.checkpoint.plain_llama import MODEL_CLASS
from llamax.config.constants import CHECKPOINTS_FOLDER, HEARTBEATS_FOLDER
from llamax.config.rules.pipeline import chunk_layers
from llamax.config.schema import Config
from llamax.model.llama import Llama
from llamax.optim.adamw import Update
from llamax.parallel.rendezvous import Rendezvous, rendezvous, report_errors_once
from llamax.runtime import signals
from llamax.runtime.errors import ConfigError, Stopped
from llamax.runtime.logging import bars_allowed, log_to_file, logger
from llamax.runtime.text import in_shell
from llamax.runtime.units import row, show_time
from llamax.training import run_metadata
from llamax.training.compile_guard import CompileGuard
from llamax.training.folder_checks import check_run_folder
from llamax.training.heartbeat import Heartbeat, beating
from llamax.training.inputs import Inputs, open_inputs
from llamax.training.library import (
    TrainedRun,
    borrowed_process,
    check_ranks,
    config_of,
    run_programs,
)
from llamax.training.local_ranks import STOPPED
from llamax.training.metrics import check_installed
from llamax.training.parts import LLAMAX, Parts
from llamax.training.profiler import Profiler
from llamax.training.recorder import Recorder
from llamax.training.rewind import Rewind, find_rewind, rewound
from llamax.training.room import check_room
from llamax.training.save_timer import SaveTimer
from llamax.training.saving import save, tolerated
from llamax.training.setup import (
    Job,
    loaders,
    log_start,
    open_run,
    prepare,
    throughput,
    writers,
)
from llamax.training.step_check import StepCheck


def train(config: Config, where: Rendezvous, parts: Parts = LLAMAX) -> None:
    """Run ``config`` on this rank of the world ``where``; results go into the run folder."""
    with bars_allowed(config.run.progress != "off"):
        _train(config, where, parts, time.perf_counter())


def _train(config: Config, where: Rendezvous, parts: Parts, began: float) -> None:
    with report_errors_once(where):
        run = config.run
        check_run_folder(Path(run.folder))
        if where.rank == where.local_rank:  # the machine of rank 0, which alone writes records
            check_installed(run)
        backend, inputs, resolved = open_run(config, where)
    config, folder, timeout_s = resolved.config, Path(run.folder), run.timeout_s
    signals.hold()
    over = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pool, ExitStack() as ending:
        ending.callback(over.set)  # a run that fails does not wait for the checksums
        verified = pool.submit(  # while the ranks meet and load
            inputs.verify, where.rank, where.world_size, lambda: not over.is_set()
        )
        place, mesh = folder / HEARTBEATS_FOLDER, resolved.mesh
        heart = Heartbeat(place, where.rank, where.world_size, timeout_s, where.job, mesh)
        with (
            lock.lock_folder(folder) if where.rank == 0 else nullcontext(),
            log_to_file(folder, where.job, where.rank),
            beating(heart),
            backend.joined(mesh, timeout_s) as axes,
        ):
            inputs.check_newest()
            inputs.check_base(backend.of_rank_0)

            back: Rewind | None = None
            while True:
                job = prepare(resolved, backend, axes, inputs, parts=parts)
                with closing(job.saver):
                    if back is None:
                        verified.result()
                        heart.at(job.step)
                        _begin(job, inputs, where, own_schedule=parts.learning_rate is not None)
                    else:
                        job = rewound(job, back)
                    back = loop(job, began, heart)
                if back is None:
                    return
                del job
                gc.collect()  # the model and optimizer before
                again = replace(config.checkpoint, resume=str(back.folder))
                inputs = open_inputs(replace(config, checkpoint=again))


def _begin(job: Job, inputs: Inputs, where: Rendezvous, own_schedule: bool) -> None:
    """Log and write down what begins; raise NoRoom where the disk has none for its checkpoint."""
    if changed := inputs.changed(job.run, own_schedule):
        logger.info("changed since then: %s", ", ".join(changed))
    if job.main:
        log_start(job)
        run_metadata.write(job.folder, where, job.step)
    check_room(job.saver, job.state.optimizer, job.run, job.step, job.main)


def start(
    config: str | Path | Config | Mapping[str, Any],
    overrides: Mapping[str, Any] = MappingProxyType({}),
    *,
    ranks: int = 0,
    model_class: type[Llama] = Llama,
    learning_rate: Callable[[int], float] | None = None,
    lr_scale: Callable[[str], float] | None = None,
    update: Update | None = None,
    model: Mapping[str, Any] | None = None,
    parallel: Mapping[str, Any] | None = None,
    optim: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    finetune: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
) -> TrainedRun:
    """Train a model from a program or notebook; ``llamax.train(...)`` is this function.

    It trains in this process, a world of one, or a rank of torchrun, mpirun or srun if the program
    was started by one.  Afterwards the process is as it was.

    Args:
        config: Recipe name, path of a TOML file, a Config, or a dict of sections.
        overrides: Settings on top: {"run.steps": 100}, or {"run": {"steps": 100}}.
        ranks: Number of ranks to start on this machine, in programs of their own; 0: none.
        model_class: Subclass of Llama to train instead.
        learning_rate: Learning rate of a step, counted from 1, instead of that of ``optim``.
        lr_scale: Factor on the learning rate of a parameter, from its name.
        update: Rule of the optimizer instead of AdamW's, as ``llamax.optim.adamw.update`` is.
        model: Settings of this section on top, as of the others: ``run={"steps": 100}``.
        parallel: Settings of the ranks.
        optim: Settings of the optimizer.
        data: Settings of the data.
        checkpoint: Settings of checkpoints.
        finetune: Settings of adapters.
        run: Settings of the run.

    Returns:
        The run: its folder, metrics and losses.  After Ctrl-C it was saved, and ``stopped`` is
        true; before the first step Ctrl-C raises KeyboardInterrupt.

    Raises:
        LlamaxError: For a mistake that can be corrected, such as a ConfigError, in one line.
    """
    sections = {
        "model": model,
        "parallel": parallel,
        "optim": optim,
        "data": data,
        "checkpoint": checkpoint,
        "finetune": finetune,
        "run": run,
    }
    changes = {**overrides}
    for name, settings in sections.items():
        if settings is not None and not isinstance(settings, Mapping):
            raise ConfigError(
                f"`{name}={settings!r:.40}` is no section; give {name}={{SETTING: VALUE}}"
            )
        changes |= {f"{name}.{key}": value for key, value in (settings or {}).items()}
    where, parts = rendezvous(os.environ), Parts(model_class, learning_rate, lr_scale, update)
    check_ranks(ranks, where, own_parts=parts != Parts())
    chosen = config_of(config, changes, ranks or where.world_size)
    if ranks:
        return TrainedRun.of(chosen, run_programs(chosen, ranks, os.environ))
    stopped = False
    with borrowed_process(where, os.environ):
        try:
            train(chosen, where, parts)
        except Stopped as stop:
            logger.info("%s", stop)
            stopped = True
        except SystemExit as end:  # of a rank that is not the first
            if end.code not in STOPPED:
                raise
            stopped = True
    return TrainedRun.of(chosen, stopped)


class _Function(ModuleType):
    """This module as ``llamax.train``, which can be called."""

    __call__ = staticmethod(start)


sys.modules[__name__].__class__ = _Function


def loop(job: Job, began: float, heart: Heartbeat) -> Rewind | None:
    """Train from ``job.step`` to the end, or until no validation improves or a rank wants to stop.

    After too many skipped steps it ends where the run should go back, and returns the place.

    While the device works on a step, the results of the step before are fetched, once: ``check``
    and ``recorder`` keep each step until then.
    """
    config, run, number, stop = job.config, job.config.run, job.step, False
    saves, timer = [job.step], SaveTimer(job.config.checkpoint.every_minutes if job.main else 0.0)
    training, validation = loaders(job)

    def samples(number: int) -> list[int]:
        before = (number - job.step - 1) * config.data.global_batch
        return training.sample_ids(job.consumed_sequences + before)

    counters = job.backend if job.backend.traces else None
    counts = chunk_layers(config.parallel, config.model.num_hidden_layers)
    stage, tied = job.state.axes.pp, job.state.optimizer.tied
    guard = CompileGuard(counters, run.compile_guard, stage, counts, tied)
    check = StepCheck(
        config.optim.most_skipped,
        samples,
        logs=job.main,
        skipped=job.skipped_in_a_row,
        first=job.skipped_since,
        rewind=config.optim.rewind,
        last=job.step,
    )
    back: Rewind | None = None
    profiler = Profiler(run, job.folder, job.state.axes.world.rank)
    with Recorder(writers(job), throughput(job), began, samples, job.rewinds) as recorder:
        while number < run.steps and not stop and not job.early_stopping.over:
            number += 1
            heart.at(number)
            profiler.at(number)
            with tolerated(job):
                job.saver.check()

            started = time.perf_counter()
            with guard.watch("training", number):
                batches = guard.note_shapes(training.step())
                step = job.state.step(batches, number, bool(signals.requested()), timer.due())
            stop = check.add(step)
            recorder.took(time.perf_counter() - started)
            signals.stepped()
            if check.rewind_due and not stop:
                with tolerated(job):
                    job.saver.wait()
                if back := find_rewind(job, check, saves[1:]):
                    break
                check.stays = check.first
            last, epoch = number == run.steps, training.ended_epoch

            waited = None
            due = _due(number, run.validate_every, last) or (epoch and run.validate_each_epoch)
            if validation is not None and due:
                with guard.watch("validation", number), recorder.doing("validating"):
                    held_out = islice(validation.epoch(), run.validate_batches)
                    step.validation_loss = job.state.validate(held_out)
                waited = job.early_stopping.add(step)

            reported = step.validation_loss is not None or _due(number, run.log_every, last)
            tokens = job.consumed_tokens(training.consumed)
            recorder.add(step, tokens, job.state.learning_rate(number), reported, waited)

            due = _due(number, config.checkpoint.every) or (epoch and config.checkpoint.each_epoch)
            due = due or check.save_requested > saves[-1]
            if due or last or stop or job.early_stopping.over:
                recorder.flush()
                save(job, step, training.consumed, check.state(step.result))
                saves.append(number)
                timer.restart()
        profiler.stop()
        if back is None:
            check.check()
        job.saver.wait()
    if back is None:
        _finish(job, number, stop, began)
    return back


def _finish(job: Job, step: int, stopped: bool, began: float) -> None:
    """Log how the run ended after ``step``.

    Raises Stopped if it was ``stopped`` before its last step, on other ranks than the first
    SystemExit with the same exit code.
    """
    if stopped and step < job.config.run.steps:
        reason = signals.reason()
        if not job.main:
            raise SystemExit(reason.exit_code)
        raise reason(
            f"stopped after step {step} by {signals.requested() or 'a signal to another rank'}: "
            f"{newest_checkpoint(job.folder / CHECKPOINTS_FOLDER)} is saved; start again to go on"
            f"{signals.aftermath()}"
        )
    if job.main and job.early_stopping.over:
        logger.info(
            "stopped early after step %d: %s not below %.4f",
            step,
            row(job.early_stopping.waited, "validation"),
            job.early_stopping.best,
        )
    if job.main:
        kind = "PEFT" if job.adapters else "Hugging Face"
        hub = f"llamax consolidate {in_shell(job.folder)} --out {in_shell(job.folder / 'hub')}"
        own = job.model_class.get(MODEL_CLASS, "").rpartition(".")[2]
        logger.info(
            "done in %s: %s holds the newest checkpoint; %s",
            show_time(time.perf_counter() - began),
            newest_checkpoint(job.folder / CHECKPOINTS_FOLDER),
            f"llamax.load({str(job.folder)!r}, model_class={own}) loads it"
            if own
            else f"{hub} makes a {kind} folder of it",
        )


def _due(step: int, every: int, last: bool = False) -> bool:
    return every > 0 and (step % every == 0 or last)
