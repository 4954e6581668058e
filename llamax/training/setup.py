"""Builds the parts of a run on one rank: new, or from the checkpoint to resume."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from llamax.backends import choose
from llamax.backends.base import Backend
from llamax.backends.random_state import set_random_state
from llamax.checkpoint.atomic import write_durable
from llamax.checkpoint.build_model import build_model, describe_finetune
from llamax.checkpoint.load import Whole, check_shapes, load_owned
from llamax.checkpoint.peft import AdapterInfo
from llamax.checkpoint.plain_llama import MODEL_CLASS
from llamax.checkpoint.reader import Checkpoint
from llamax.checkpoint.save import Saver
from llamax.config.constants import CHECKPOINTS_FOLDER, CONFIG_FILE, METRICS_FILE
from llamax.config.data_path import RANDOM, datasets_in
from llamax.config.flops import flops_per_token
from llamax.config.load import dump_config
from llamax.config.rules.parallel import node_limit
from llamax.config.schema import Config, FinetuneConfig
from llamax.data.dataset import Dataset
from llamax.data.loader import Batches
from llamax.data.samples import Samples
from llamax.data.tokenizer.tokenizer import begin_of_prompts, load_tokenizer
from llamax.model.llama import DTYPES, Llama
from llamax.model.lora import num_parameters
from llamax.optim.loss_scale import LossScaleState
from llamax.parallel.collectives import Axes
from llamax.parallel.placeholder import Placeholder
from llamax.parallel.rendezvous import Rendezvous
from llamax.parallel.sharding import ShardedParameters
from llamax.runtime.errors import CheckpointError, DataError
from llamax.runtime.logging import logger, shows_bars
from llamax.runtime.progress import reported
from llamax.runtime.units import amount, count, show_number
from llamax.training.console import ConsoleWriter
from llamax.training.early_stopping import EarlyStopping
from llamax.training.inputs import Inputs, open_inputs, sample_notes
from llamax.training.metrics import (
    JsonlWriter,
    TensorBoardWriter,
    TrackioWriter,
    WandbWriter,
    Writer,
)
from llamax.training.parts import LLAMAX, Parts
from llamax.training.recorder import Throughput
from llamax.training.resolve import ResolvedRun, resolve
from llamax.training.step import TrainState
from llamax.training.step_check import SKIPPED_IN_A_ROW, SKIPPED_SINCE

OF_QLORA = ("quant", "double_quant", "shard_base")  # settings of finetune
REWINDS, TOKENS = "rewinds", "consumed_tokens"  # in the state of a checkpoint


@dataclass(frozen=True)
class Job:
    """The parts of a run on one rank, ready to continue after ``step`` steps."""

    run: ResolvedRun
    backend: Backend
    state: TrainState
    dataset: Dataset
    saver: Saver
    step: int
    consumed_sequences: int
    adapters: AdapterInfo | None
    training: Samples
    validation: Samples | None
    early_stopping: EarlyStopping
    resumed: Path | None = None
    """The checkpoint that the run continues."""
    rewinds: int = 0
    """How often the run has gone back to a checkpoint."""
    rewound: int = 0
    """How often it has gone back to ``resumed``."""
    skipped_in_a_row: int = 0
    """Steps skipped in a row up to ``step``."""
    skipped_since: int = 0
    """The first of them."""
    more_tokens: int = 0
    """What earlier steps had more than now, where data.sequence_length has changed [tokens]."""

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)

    def consumed_tokens(self, sequences: int) -> int:
        """The tokens of the run's first ``sequences`` samples, those until ``step`` included."""
        return self.more_tokens + sequences * self.config.data.sequence_length

    @property
    def model_class(self) -> dict[str, str]:
        """What checkpoints say of the model's class: its name, if it is not llamax's own."""
        kind = type(self.state.model)
        return {} if kind is Llama else {MODEL_CLASS: f"{kind.__module__}.{kind.__qualname__}"}

    @property
    def main(self) -> bool:
        return self.state.axes.world.rank == 0


def open_run(config: Config, where: Rendezvous) -> tuple[Backend, Inputs, ResolvedRun]:
    """The device and the open inputs of a run on this rank, and its configuration resolved."""
    run = config.run
    backend = choose(run.backend, where, run.threads, run.stochastic_rounding)
    inputs = open_inputs(config)
    node_ranks, samples = node_limit(run.backend, where.local_world_size), len(inputs.training)
    resolved = resolve(inputs.config, where.world_size, samples, node_ranks=node_ranks)
    return backend, inputs, resolved


def prepare(
    run: ResolvedRun,
    backend: Backend,
    axes: Axes,
    inputs: Inputs,
    draw: bool = True,
    parts: Parts = LLAMAX,
) -> Job:
    """Build model, optimizer and saver: new, or from the checkpoint to resume.

    Without ``draw`` new weights are not initialised.
    """
    config, resumed = run.config, inputs.resumed
    torch.manual_seed(config.run.seed)
    home = torch.device("cpu") if backend.traces else backend.device
    fresh = draw and resumed is None
    main = axes.world.rank == 0
    with reported("building the model", show=main):
        model = build_model(config, inputs.first, fresh, axes, home, parts.model_class)
        parameters = model.sharded_parameters()
        if config.finetune.method != "full":
            parameters = parameters.trained()
        state = TrainState.build(run, model, axes, backend, parts)
    step = consumed = 0
    if resumed is not None:
        with reported(f"loading {resumed.folder}", show=main):
            _load(resumed, state, parameters, backend)
        _restore_random(resumed, axes, backend.device)
        step, consumed = resumed.step, int(resumed.state["consumed_sequences"])
        logger.info("resuming from %s, after step %d", resumed.folder, step)
    elif config.checkpoint.resume != "never":
        logger.info("starting fresh: %s has no complete checkpoint", config.run.folder)
    if backend.traces:
        state.to(backend.device)
    tokens = consumed * config.data.sequence_length
    saver = Saver(
        Path(config.run.folder) / CHECKPOINTS_FOLDER,
        axes,
        parameters,
        config.checkpoint,
        zero=config.parallel.zero,
        timeout_s=config.run.timeout_s,
        barrier=backend.barrier,
    )
    if draw and not backend.traces and config.optim.state_bits == 32:  # else owned() makes copies
        saver.prepare(state.optimizer.owned())
    return Job(
        run=run,
        backend=backend,
        state=state,
        dataset=inputs.dataset,
        saver=saver,
        step=step,
        consumed_sequences=consumed,
        adapters=inputs.adapters,
        training=inputs.training,
        validation=inputs.validation,
        early_stopping=EarlyStopping(config.run.patience, resumed.state if resumed else {}),
        resumed=resumed.folder if resumed else None,
        rewinds=_count(resumed, REWINDS),
        skipped_in_a_row=_count(resumed, SKIPPED_IN_A_ROW),
        skipped_since=_count(resumed, SKIPPED_SINCE),
        more_tokens=_count(resumed, TOKENS, tokens) - tokens,
    )


def _count(resumed: Checkpoint | None, name: str, unknown: int = 0) -> int:
    """A count in the state of a checkpoint, ``unknown`` without one.

    Raises CheckpointError if it is no number.
    """
    found = resumed.state.get(name, unknown) if resumed else unknown
    if type(found) is not int or not 0 <= found < 2**63:
        raise CheckpointError(
            f"the checkpoint to resume has {name}={found!r:.40}, which is no number; resume "
            "another one"
        )
    return found


def _load(
    resumed: Checkpoint, state: TrainState, parameters: ShardedParameters, backend: Backend
) -> None:
    """Load the weights of a checkpoint, and the state of the optimizer and what steers it."""
    check_shapes(resumed, parameters)
    load_owned(resumed, state.optimizer.owned(), parameters)
    whole = {
        name: tensor.detach().view(-1)
        for name, (tensor, _) in parameters.items()
        if not (isinstance(tensor, Placeholder) or (tensor.requires_grad and not backend.traces))
    }
    load_owned(resumed, [Whole(name, flat) for name, flat in whole.items()], parameters)
    if not backend.traces:  # a device that traces has no program yet to gather with
        state.optimizer.gather_parameters()
    scale = LossScaleState.from_json(resumed.state)
    if state.loss_scale is not None and scale is not None:
        state.loss_scale.load(scale)
    if state.spikes is not None:
        state.spikes.load(resumed.state)


def _restore_random(resumed: Checkpoint, axes: Axes, device: torch.device) -> None:
    """Set torch's random state to that of this rank in a checkpoint, if it holds one.

    Raises CheckpointError for one that this torch cannot read.
    """
    rng = resumed.rng(axes.tp.rank, axes.data.rank, axes.pp)
    if rng is None:
        return
    try:
        set_random_state(rng, device)
    except (RuntimeError, TypeError):
        raise CheckpointError(
            f"{resumed.folder} holds a random state that torch {torch.__version__} cannot read; "
            f"resume it with torch {resumed.manifest.torch!r:.40}"
        ) from None


def log_start(job: Job) -> None:
    """Log what will run, and write the resolved configuration into the run folder."""
    run, config, mesh = job.run, job.config, job.run.mesh
    stage, over = config.parallel.zero, f" over groups of {mesh.owners}" if mesh.copies > 1 else ""
    job.folder.mkdir(parents=True, exist_ok=True)
    write_durable(job.folder / CONFIG_FILE, dump_config(config).encode())
    logger.info(
        "%s parameters in %s on %s (%s): tensor %d%s%s%s x data %d%s",
        show_number(config.model.num_parameters()),
        config.run.dtype,
        count(mesh.world_size, "rank"),
        config.run.backend,
        mesh.tp,
        " with sequence parallelism" if job.state.model.sequence_parallel else "",
        f" x context {mesh.cp}" if mesh.cp > 1 else "",
        f" x pipeline {mesh.pp}" if mesh.pp > 1 else "",
        mesh.dp,
        f" with ZeRO-{stage}{over}" if stage and mesh.dp * mesh.cp > 1 else "",
    )
    logger.info(
        "%s: %s, %s a step in %s, %s",
        config.data.path,
        amount(len(job.dataset.train), "token"),
        show_number(run.step_tokens),
        count(run.accumulation, "microstep"),
        f"steps {job.step + 1:,} to {run.steps:,}"
        if job.step < run.steps
        else f"nothing left of run.steps={run.steps}",
    )
    if config.checkpoint.init_from and not (job.step or job.adapters):
        logger.info("model and first weights: %s", config.checkpoint.init_from)
    if run.shortened and job.step < run.steps:
        logger.info("%s", run.shortened)
    if job.step >= run.steps:
        logger.info(
            "this run is finished; to go on, give --run.steps=N with N above %d%s; to start anew, "
            "another --run.folder or --checkpoint.resume=never",
            job.step,
            f", or --run.epochs above {run.epochs}" if run.epochs else "",
        )
    logger.info("samples: %s", job.training)
    for what, remedy in sample_notes(config, job.training, job.validation):
        logger.warning("%s", f"{what}; {remedy}" if remedy else what)
    if job.adapters is not None:
        logger.info("%s", describe_finetune(config, mesh.tp, mesh.owners))
    for line in (*not_applied(config), *_begins_otherwise(job)):
        logger.warning("%s", line)


def not_applied(config: Config) -> Iterator[str]:
    """The settings of adapters that are not the usual ones, and have no effect."""
    method, usual = config.finetune.method, FinetuneConfig()
    if method == "qlora":
        return
    names = [field.name for field in fields(usual) if field.name != "method"]
    for name in names if method == "full" else OF_QLORA:
        value = getattr(config.finetune, name)
        if value != getattr(usual, name):
            use = "qlora" if name in OF_QLORA else "lora or qlora"
            yield (
                f"finetune.{name}={value} has no effect with finetune.method={method}; it is of "
                f"finetune.method={use}"
            )


def _begins_otherwise(job: Job) -> Iterator[str]:
    """A line where prompts will not begin as the documents of training do."""
    config, dataset = job.config, job.dataset
    begins, prompted = dataset.train.header.bos_id, config.model.bos_token_id
    if RANDOM in datasets_in(config.data.path):
        return
    use = f"set model.bos_token_id={'none' if begins is None else begins}"
    if dataset.tokenizer_path is not None:
        with suppress(DataError):  # one that cannot be opened here decides nothing
            prompted = begin_of_prompts(load_tokenizer(dataset.tokenizer_path), prompted)
            no = "no-" if begins is None else ""
            use = f"generate and evaluate with --{no}bos, or prepare the data with the other"
    if begins != prompted:
        names = ["no BOS token" if b is None else f"BOS token {b}" for b in (begins, prompted)]
        yield (
            f"documents of {config.data.path} begin with {names[0]}, but the model will be "
            f"prompted with {names[1]}; {use}"
        )


def loaders(job: Job) -> tuple[Batches, Batches | None]:
    """Training samples from where the run stands, and validation samples in their fixed order."""
    axes, validation = job.state.axes, job.validation
    return (
        job.training.loader(axes.dp, job.consumed_sequences, shuffle=True, cp=axes.part),
        None if validation is None else validation.loader(axes.dp, 0, shuffle=False, cp=axes.part),
    )


def writers(job: Job) -> list[Writer]:
    """The views of the run's records; rank 0 alone writes."""
    run = job.config.run
    if not job.main:
        return []
    bar = run.progress == "on" or (run.progress == "auto" and shows_bars(sys.stderr))
    log = JsonlWriter(job.folder / METRICS_FILE, job.step)
    views: list[Writer] = [log, ConsoleWriter(run.steps, job.step, bar)]
    if run.tensorboard:
        views.append(TensorBoardWriter(job.folder / "tensorboard", job.step))
    settings, earlier = asdict(job.config), (log.kept, log.went_back)
    if run.wandb != "off":
        views.append(WandbWriter(job.folder, run.wandb_project, run.wandb, settings, *earlier))
    if run.trackio:
        views.append(TrackioWriter(job.folder, run.trackio, settings, *earlier))
    return views


def throughput(job: Job) -> Throughput:
    """What the records' throughput and memory are computed from."""
    config = job.config
    peak = job.backend.peak_flops(DTYPES[config.run.dtype])
    adapters = num_parameters(config.model, config.finetune) if job.adapters else 0
    return Throughput(
        memory=job.backend.memory,
        step_tokens=job.run.step_tokens,
        flops_per_token=flops_per_token(config.model, config.data.sequence_length, adapters),
        peak_flops=(peak or 0.0) * job.run.mesh.world_size,
    )
