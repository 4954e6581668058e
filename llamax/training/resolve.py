"""A configuration resolved for a world and a data set: mesh, steps, warm-up, accumulation.

::

    Config: as written, epochs, ratios ─┐
    ranks of the world                 ─┼─ resolve ──> ResolvedRun: mesh, microsteps, steps, tokens
    samples of the data set            ─┘

Training, the planner, the audit and the doctor all take the second, so none of them computes a mesh
or a number of steps by itself.  A program that does not see the data set gets an assumption, which
it must state.  Nothing here needs torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llamax.config import validate
from llamax.config.rules.pipeline import chunk_layers
from llamax.config.schema import Config, OptimConfig
from llamax.parallel.mesh import Mesh
from llamax.runtime.errors import DataError
from llamax.runtime.units import count


@dataclass(frozen=True)
class ResolvedRun:
    """A run on a given world and data set; ``resolve`` is the only maker.

    ``config`` holds the length of the run and of its warm-up in steps, never in epochs or as a
    ratio: this is what a run folder and a checkpoint keep.  ``epochs`` is run.epochs as written.
    ``training_samples`` is the number of samples in an epoch, None if the data set was not seen;
    ``assumption`` then says what was taken instead, and is empty if nothing was.  ``shortened``
    says that warm-up and decay were cut to the length of the run, and is empty if they were not.
    """

    config: Config
    mesh: Mesh
    accumulation: int
    epochs: int
    training_samples: int | None
    assumption: str
    shortened: str = ""

    @property
    def kv_replicas(self) -> int:
        """The number of neighbouring tensor ranks that hold the same key/value head."""
        return self.mesh.kv

    @property
    def chunk_layers(self) -> tuple[int, ...]:
        """Layers of each chunk of a pipeline's stages, in the order of the model."""
        return chunk_layers(self.config.parallel, self.config.model.num_hidden_layers)

    @property
    def steps(self) -> int:
        """The length of the run in optimizer steps."""
        return self.config.run.steps

    @property
    def warmup_steps(self) -> int:
        """The length of the warm-up in optimizer steps."""
        return self.config.optim.warmup_steps

    @property
    def step_tokens(self) -> int:
        """The tokens of one global batch."""
        return self.config.data.global_batch * self.config.data.sequence_length

    @property
    def total_tokens(self) -> int:
        """The tokens of the whole run."""
        return self.steps * self.step_tokens

    @property
    def epoch_ends(self) -> tuple[int, ...] | None:
        """The steps that take the last sample of an epoch; None if the data set was not seen."""
        if self.training_samples is None:
            return None
        batch = self.config.data.global_batch
        epochs = self.steps * batch // self.training_samples
        ends = (-(-epoch * self.training_samples // batch) for epoch in range(1, epochs + 1))
        return tuple(dict.fromkeys(ends))

    @property
    def most_checkpoints(self) -> int:
        """The largest number of checkpoints that exist at one time: when the last is complete.

        Where it depends on the length of an epoch and the data set was not read, or on the clock,
        a long run is assumed.
        """
        saved = self.config.checkpoint
        if self.assumption:  # epochs of an unknown number of steps
            saves = [*range(1, self.epochs * saved.each_epoch), self.epochs]
            open_ended = saved.every > 0 or saved.every_minutes > 0
        else:
            ends = self.epoch_ends if saved.each_epoch else ()
            every = range(saved.every, self.steps, saved.every) if saved.every else ()
            saves = sorted({*every, *(ends or ()), self.steps})
            open_ended = ends is None or saved.every_minutes > 0
        newest = saved.keep + 1 if saved.keep else len(saves)
        older = saves[:-newest]
        best = saved.keep_best and bool(older or open_ended)
        kept_forever = 0
        if saved.keep_every and not self.assumption:
            kept_forever = sum(step % saved.keep_every == 0 for step in older)
        return (newest if open_ended else min(newest, len(saves))) + best + kept_forever

    def on_trn1(self, cores: int) -> ResolvedRun:
        """The same run with its ranks where trn1 wants them, ``cores`` on each node."""
        return replace(self, mesh=self.mesh.on_trn1(cores))

    def with_layers(self, layers: int) -> ResolvedRun:
        """The same run of a model with ``layers`` layers, equally many on each stage."""
        model = replace(self.config.model, num_hidden_layers=layers)
        parallel = replace(self.config.parallel, layers_per_stage="")
        return replace(self, config=replace(self.config, model=model, parallel=parallel))


def resolve(
    config: Config,
    world_size: int,
    training_samples: int | None = None,
    reason: str = "",
    *,
    node_ranks: int | None = None,
) -> ResolvedRun:
    """The run that ``config`` describes on ``world_size`` ranks.

    ``training_samples`` is the number of samples in an epoch.  Without it, a length in epochs is
    taken as run.steps, and ``reason`` says why the samples were not counted.  The last step of the
    last epoch is whole: it takes what it lacks from the next pass.  Warm-up and the decay of wsd
    are cut in proportion if together they are longer than the run.  ``node_ranks``: the ranks of a
    node, where tensor and context ranks must share one (``config.rules.parallel.node_limit``).

    Raises ConfigError if the configuration does not hold on that world or with that many steps.
    """
    validate.check(config, world_size, node_ranks)
    run, optim, assumption = config.run, config.optim, ""
    if run.epochs and training_samples is None:
        epochs = f"{run.epochs} epochs are" if run.epochs > 1 else "1 epoch is"
        assumption = (
            f"{epochs} taken as run.steps={run.steps:,} because no samples could be counted"
            f"{reason and f': {reason}'}; give the length with --run.steps, or the data set with "
            "--data.path"
        )
        run = replace(run, epochs=0)
    elif run.epochs and training_samples is not None:
        steps = -(-run.epochs * training_samples // config.data.global_batch)
        run = replace(run, steps=steps, epochs=0)
    if optim.warmup_ratio:
        warmup = math.ceil(optim.warmup_ratio * run.steps)
        optim = replace(optim, warmup_steps=warmup, warmup_ratio=0.0)
    optim, shortened = (optim, "") if assumption else _shorten(optim, run.steps)
    changed = run is not config.run or optim is not config.optim
    resolved = replace(config, run=run, optim=optim) if changed else config
    if changed and not assumption:
        validate.check(resolved, world_size, node_ranks)
    parallel = config.parallel
    mesh = Mesh.fill(
        world_size,
        tp=parallel.tensor,
        cp=parallel.context,
        pp=parallel.pipeline,
        kv=config.model.kv_replicas(parallel.tensor),
        ends=parallel.pipeline > 1 and (parallel.chunks > 1 or config.model.tie_word_embeddings),
        shard=parallel.zero_ranks,
    )
    return ResolvedRun(
        resolved,
        mesh,
        validate.accumulation(config, mesh.dp),
        config.run.epochs,
        training_samples,
        assumption,
        shortened,
    )


def _shorten(optim: OptimConfig, steps: int) -> tuple[OptimConfig, str]:
    """The schedule with warm-up and decay cut to ``steps``, and a sentence if they were cut."""
    warmup, decay = optim.warmup_steps, optim.decay_steps
    if warmup + decay <= steps:
        return optim, ""
    falls = max(decay * steps // (warmup + decay), 1) if decay else 0
    cut = replace(optim, warmup_steps=steps - falls, decay_steps=falls)
    changes = [
        f"{name} from {before:,} to {after:,}"
        for name, before, after in (
            ("optim.warmup_steps", warmup, cut.warmup_steps),
            ("optim.decay_steps", decay, cut.decay_steps),
        )
        if before != after
    ]
    return cut, f"the run has only {count(steps, 'step')}: cut {' and '.join(changes)}"


def visible_samples(config: Config, path: str = "") -> tuple[int | None, str]:
    """The number of samples in an epoch, as training counts them, and why there is none.

    The data set at ``path``, by default data.path, is opened if the length of an epoch decides
    anything.  The result goes to ``resolve``: ``resolve(config, world, *visible_samples(config))``.
    """
    saved, run = config.checkpoint, config.run
    if not (run.epochs or saved.each_epoch or run.validate_each_epoch):
        return None, ""
    from llamax.data.dataset import open_dataset  # by which numpy comes, and a plan needs none
    from llamax.data.samples import Samples

    try:
        dataset = open_dataset(path or config.data.path, "off", config.model.vocab_size)
        return len(Samples(dataset.train, config.data, run.seed)), ""
    except DataError as error:
        return None, str(error).partition("; ")[0]
