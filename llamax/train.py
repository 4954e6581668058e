"""The training program: ``torchrun --nproc-per-node 4 -m llamax.train --config demo``.

``train_step`` is one optimizer step, ``train`` the run around it, ``main`` the command line.  The
loop never waits for the device inside a step: what step n - 1 found is fetched while step n runs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llamax import configfile, log, program
from llamax.backends import Backend, choose
from llamax.checkpoint.load import load_owned, load_weights
from llamax.checkpoint.manifest import newest
from llamax.checkpoint.save import Saver
from llamax.collectives import Axes
from llamax.config import Config
from llamax.data.dataset import Dataset
from llamax.data.loader import Batch, Loader
from llamax.data.tokens import TokenFile
from llamax.errors import LlamaxError
from llamax.inputs import Inputs, open_inputs
from llamax.launch.env import Rendezvous, rendezvous
from llamax.mesh import Mesh
from llamax.metrics import (
    ConsoleWriter,
    JsonlWriter,
    TensorBoardWriter,
    Writer,
    flops_per_token,
    show_number,
    show_time,
)
from llamax.model import DTYPES, Llama
from llamax.optim.schedule import lr_at
from llamax.optim.zero1 import Zero1
from llamax.reporter import Measures, Reporter

# --- one step ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What an optimizer step found, 0-d on the device: mean loss in nats, norm, counted tokens."""

    loss: Tensor
    grad_norm: Tensor
    tokens: Tensor


def train_step(
    model: Llama,
    optimizer: Zero1,
    axes: Axes,
    microbatches: Iterable[Batch],
    nominal_tokens: int,
    lr: float,
    step: int,
) -> Step:
    """Accumulate this data rank's microbatches, then update once; ``step`` counts from 1.

    The loss is the mean over all counted tokens of the global batch, the same on every rank:
    microsteps sum ``loss / nominal_tokens``, and the optimizer scales gradients by nominal over
    counted tokens, which is 1 where no label is ignored.
    """
    device = axes.data.rank_index.device
    found = torch.zeros(2, device=device)
    for batch in microbatches:
        total, count = _loss(model, batch)
        (total / nominal_tokens).backward()
        found = found + torch.stack((total.detach(), count))
    total, count = axes.data.all_reduce(found)
    grad_norm = optimizer.step(
        torch.tensor(lr, device=device),
        torch.tensor(float(step), device=device),
        nominal_tokens / count,
    )
    return Step(total / count, grad_norm, count)


@torch.no_grad()
def validation_loss(model: Llama, axes: Axes, loader: Loader, batches: int) -> Tensor:
    """Mean loss in nats over the counted tokens of the first ``batches`` global batches, 0-d."""
    found = torch.zeros(2, device=axes.data.rank_index.device)
    for microbatches, _ in zip(loader.epoch(), range(batches), strict=False):
        for batch in microbatches:
            found = found + torch.stack(_loss(model, batch))
    total, count = axes.data.all_reduce(found)
    mean: Tensor = total / count
    return mean


def _loss(model: Llama, batch: Batch) -> tuple[Tensor, Tensor]:
    device = model.tp.rank_index.device
    ids, labels, positions = (part.to(device, non_blocking=True) for part in batch[:3])
    documents = None if batch.documents is None else batch.documents.to(device, non_blocking=True)
    return model.loss(ids, labels, positions, documents_BS=documents)


# --- one run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """The pieces of a run on one rank, ready to go on after ``step`` steps."""

    config: Config
    mesh: Mesh
    backend: Backend
    axes: Axes
    dataset: Dataset
    model: Llama
    optimizer: Zero1
    saver: Saver
    step: int
    consumed_sequences: int

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)

    @property
    def main(self) -> bool:
        return self.axes.world.rank == 0


def train(config: Config, where: Rendezvous) -> None:
    """Run ``config`` on this rank of the world ``where``; the run folder holds what comes of it."""
    began = time.perf_counter()
    with first_to_speak(where):
        mesh = Mesh.fill(where.world_size, tp=config.parallel.tensor)
        backend = choose(config.run.backend, where, config.run.threads)
        inputs = open_inputs(config)
    inputs.verify(config, where.rank, where.world_size)
    kv = max(1, mesh.tp // config.model.num_key_value_heads)
    with backend.joined(mesh, config.run.timeout_s, kv) as axes:
        job = prepare(config, mesh, backend, axes, inputs)
        if job.main:
            introduce(job)
        loop(job, began)


@contextmanager
def first_to_speak(where: Rendezvous) -> Iterator[None]:
    """All ranks of a machine find the same mistakes here; its first one tells, the others wait."""
    try:
        yield
    except LlamaxError as error:
        if where.local_rank == 0:
            raise
        time.sleep(2)
        raise SystemExit(error.exit_code) from None


def prepare(config: Config, mesh: Mesh, backend: Backend, axes: Axes, inputs: Inputs) -> Job:
    """Model, optimizer and saver, as the checkpoint to resume left them, or new."""
    model = Llama(
        config.model,
        axes.tp,
        sequence_parallel=config.parallel.sequence,
        dtype=DTYPES[config.run.dtype],
        device=backend.device,
        recompute=config.run.recompute,
    )
    parameters = dict(model.named_parameters())
    resumed, shards, tp = inputs.resumed, model.shards, axes.tp
    torch.manual_seed(config.run.seed)
    if inputs.first is not None:
        load_weights(inputs.first, parameters, shards, tp.size, tp.rank, convert=True)
    elif resumed is None:
        model.init(config.run.seed)
    optimizer = Zero1(
        parameters,
        shards,
        config.optim,
        axes,
        sequence_parallel=model.sequence_parallel,
        zero1=config.parallel.zero1,
        bucket_bytes=config.parallel.bucket_bytes,
    )
    step = consumed = 0
    if resumed is not None:
        load_owned(resumed, optimizer.owned(), shards, tp.size, tp.rank)
        optimizer.gather_parameters()
        rng = resumed.rng(tp.rank, axes.data.rank)
        if rng is not None:
            torch.set_rng_state(rng)
        step, consumed = resumed.step, int(resumed.state["consumed_sequences"])
        log.logger.info("resuming from %s", resumed.folder)
    saver = Saver(
        Path(config.run.folder) / "checkpoints",
        axes,
        parameters,
        shards,
        zero1=config.parallel.zero1,
        keep=config.checkpoint.keep,
        background=config.checkpoint.background,
        timeout_s=config.run.timeout_s,
    )
    return Job(config, mesh, backend, axes, inputs.dataset, model, optimizer, saver, step, consumed)


def introduce(job: Job) -> None:
    """Say what will run, and write the resolved configuration into the run folder."""
    config, mesh = job.config, job.mesh
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "config.toml").write_text(configfile.dump(config), encoding="utf-8")
    log.logger.info(
        "%s parameters in %s on %d ranks (%s): tensor %d%s x data %d%s",
        show_number(config.model.num_parameters()),
        config.run.dtype,
        mesh.world_size,
        config.run.backend,
        mesh.tp,
        " with sequence parallelism" if job.model.sequence_parallel else "",
        mesh.dp,
        " with ZeRO-1" if config.parallel.zero1 and mesh.dp > 1 else "",
    )
    log.logger.info(
        "%s: %s tokens, %s a step in %d microsteps, steps %d to %d",
        config.data.path,
        show_number(len(job.dataset.train)),
        show_number(config.data.global_batch * config.data.sequence_length),
        config.accumulation(mesh.dp),
        job.step + 1,
        config.run.steps,
    )
    if job.dataset.train.header.bos_id != config.model.bos_token_id:
        log.logger.warning(
            "documents of %s begin with BOS token %s, but model.bos_token_id is %s: the model will "
            "be prompted with the latter",
            config.data.path,
            job.dataset.train.header.bos_id,
            config.model.bos_token_id,
        )


def loop(job: Job, began: float) -> None:
    """Train from ``job.step`` to the end."""
    config, step = job.config, job.step
    training, validation = loaders(job)
    nominal_tokens = config.data.global_batch * config.data.sequence_length
    with Reporter(writers(job), measures(job), began) as reporter:
        while step < config.run.steps:
            step += 1
            job.saver.check()
            started = time.perf_counter()
            lr = lr_at(step, config.optim, config.run.steps)
            found = train_step(
                job.model, job.optimizer, job.axes, training.step(), nominal_tokens, lr, step
            )
            job.backend.step_boundary()
            reporter.took(time.perf_counter() - started)
            last = step == config.run.steps
            validated = None
            if validation is not None and _due(step, config.run.validate_every, last):
                batches = config.run.validate_batches
                validated = validation_loss(job.model, job.axes, validation, batches)
                job.backend.step_boundary()
            if validated is not None or _due(step, config.run.log_every, last):
                tokens = training.consumed * config.data.sequence_length
                reporter.add(step, tokens, lr, [found.loss, found.grad_norm], validated)
            if last or _due(step, config.checkpoint.every):
                reporter.flush()
                save(job, step, training.consumed)
        job.saver.wait()
    if job.main:
        log.logger.info(
            "done in %s: %s holds the newest checkpoint; llamax consolidate %s makes a Hugging "
            "Face folder of it",
            show_time(time.perf_counter() - began),
            newest(job.folder / "checkpoints"),
            job.folder,
        )


def _due(step: int, every: int, last: bool = False) -> bool:
    return every > 0 and (step % every == 0 or last)


def loaders(job: Job) -> tuple[Loader, Loader | None]:
    """Training samples from where the run stands, and validation samples in their fixed order."""
    data, axis = job.config.data, job.axes.data

    def loader(file: TokenFile, consumed: int, shuffle: bool) -> Loader:
        return Loader(
            file,
            job.config.run.seed,
            data.sequence_length,
            data.global_batch,
            data.micro_batch,
            axis.rank,
            axis.size,
            consumed,
            separate_documents=data.separate_documents,
            shuffle=shuffle,
        )

    validation = job.dataset.validation
    return (
        loader(job.dataset.train, job.consumed_sequences, shuffle=True),
        None if validation is None else loader(validation, 0, shuffle=False),
    )


def save(job: Job, step: int, consumed: int) -> None:
    """Begin a checkpoint of everything that a resume needs; its files are written meanwhile."""
    started = time.perf_counter()
    job.saver.save(
        step,
        job.optimizer.owned(),
        state={
            "consumed_sequences": consumed,
            "seed": job.config.run.seed,
            "tokenizer": job.dataset.fingerprint,
        },
        model=job.config.model.to_hub(job.config.run.dtype),
        config_text=configfile.dump(job.config),
        rng=torch.get_rng_state(),
    )
    if job.main:
        stall = show_time(time.perf_counter() - started)
        log.logger.info("saving step %d; training waited %s", step, stall)


def writers(job: Job) -> list[Writer]:
    """The views of the run's records; rank 0 alone writes."""
    run = job.config.run
    if not job.main:
        return []
    bar = run.progress == "on" or (run.progress == "auto" and sys.stderr.isatty())
    views: list[Writer] = [
        JsonlWriter(job.folder / "metrics.jsonl", job.step),
        ConsoleWriter(run.steps, job.step, bar),
    ]
    return [*views, TensorBoardWriter(job.folder / "tensorboard")] if run.tensorboard else views


def measures(job: Job) -> Measures:
    """What throughput is counted in."""
    data, peak = job.config.data, job.backend.peak_flops(DTYPES[job.config.run.dtype])
    return Measures(
        fetch=job.backend.fetch,
        memory=job.backend.memory,
        step_tokens=data.global_batch * data.sequence_length,
        flops_per_token=flops_per_token(job.config.model, data.sequence_length),
        peak_flops=(peak or 0.0) * job.mesh.world_size,
    )


# --- the program ---------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """``--config NAME_OR_PATH [--section.key=value ...]``; ``--help`` lists every key."""
    parser = argparse.ArgumentParser(
        prog="llamax train",
        usage="%(prog)s --config NAME_OR_PATH [--section.key=value ...]",
        description="Train a Llama. Under torchrun, mpirun or srun every rank runs this program; "
        "alone it is a world of one.",
        epilog=configfile.help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a recipe's name or a TOML file")
    options, overrides = parser.parse_known_args(list(argv))
    where = rendezvous(os.environ)
    log.setup(f"rank {where.rank}", main=where.rank == 0)
    with first_to_speak(where):
        config = configfile.load(options.config, overrides, where.world_size)
    train(config, where)
    return 0


if __name__ == "__main__":
    sys.exit(program.run(main))
