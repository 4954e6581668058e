"""The inputs of a run: its data, and the weights or the checkpoint it starts from.

All of them are opened and checked against the configuration before any process group exists, so
that one rank reports a mistake at once, in one line.  Checksums come second: each rank verifies
what it reads of a checkpoint and its share of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

from llamax.checkpoint.build_model import check_resumed, finetune_info
from llamax.checkpoint.hf_folder import open_source
from llamax.checkpoint.hf_writer import check_tokenizer_fits
from llamax.checkpoint.listing import find_checkpoint, newest_checkpoint, newest_intact
from llamax.checkpoint.manifest import CONFIG_TOML
from llamax.checkpoint.peft import AdapterInfo
from llamax.checkpoint.reader import Checkpoint
from llamax.checkpoint.source import Source
from llamax.config.base_model import ROPE
from llamax.config.constants import CHECKPOINTS_FOLDER
from llamax.config.data_path import RANDOM
from llamax.config.load import recorded_config
from llamax.config.model import ModelConfig
from llamax.config.schema import Config, sections
from llamax.config.toml import to_toml
from llamax.data.dataset import Dataset, open_dataset
from llamax.data.samples import Samples
from llamax.data.stream import GoOn
from llamax.data.token_file import Verify
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.optim.schedule import lr_at
from llamax.runtime.errors import CheckpointError, ConfigError
from llamax.runtime.hub_name import hub_name
from llamax.runtime.logging import logger
from llamax.runtime.units import count
from llamax.training.resolve import ResolvedRun

# The sections, and their fields (empty: all), that decide samples, updates and mesh.
COMPARED: dict[str, set[str]] = {
    "parallel": {
        *("tensor", "context", "pipeline", "chunks", "layers_per_stage", "sequence"),
        *("zero", "zero_ranks"),
    },
    "optim": set(),
    "data": set(),
    "finetune": set(),
    "run": {"steps", "seed", "backend", "dtype", "stochastic_rounding", "patience"},
}

# The settings that decide the learning rate of a step.
SCHEDULE = {
    *(f"optim.{name}" for name in ("lr", "min_lr", "schedule", "warmup_steps", "decay_steps")),
    "run.steps",
}


@dataclass(frozen=True)
class Inputs:
    """The open inputs of a run.

    ``config`` is the configuration, with a head of its own where the weights have one.
    ``resumed`` is the checkpoint to continue, ``first`` the source of the first weights if there is
    none.  With ``adapters``, ``first`` is their base, also beside ``resumed``.  ``validation`` is
    None where nothing will be validated.  ``newest`` is the newest checkpoint when this rank
    looked.
    """

    config: Config
    dataset: Dataset
    training: Samples
    validation: Samples | None
    resumed: Checkpoint | None
    first: Source | None
    adapters: AdapterInfo | None = None
    newest: Path | None = None

    def check_newest(self) -> None:
        """Raise CheckpointError if a newer checkpoint appeared since this rank looked.

        Ranks would then differ in what they resume.  Call it with the lock held and all ranks met.
        """
        if self.config.checkpoint.resume in ("auto", "intact"):
            now = newest_checkpoint(Path(self.config.run.folder) / CHECKPOINTS_FOLDER)
            if now != self.newest:
                raise CheckpointError(f"{now} was saved while this job started; start it again")

    def check_base(self, of_rank_0: Callable[[str, int], int]) -> None:
        """Raise ConfigError if rank 0 starts from another commit of a base on the Hub.

        Machines that share no cache ask the Hub each for itself, and a branch may move in between.
        """
        given = self.config.checkpoint.init_from
        if not given:
            return
        name = hub_name(given)
        own = int(name.revision, 16) if name is not None and name.pinned else 0
        first = of_rank_0("commit of the base", own)
        if first != own:
            other = f"{name.repo if name else given}@{first:040x}" if first else "a folder"
            raise ConfigError(
                f"checkpoint.init_from is {given} on this machine and {other} on that of rank 0; "
                "give all machines the same commit, org/name@COMMIT, or the same folder"
            )

    def verify(self, share: int, of: int, go_on: GoOn) -> None:
        """Check the ``share``-th of ``of`` parts of what loading does not check as it reads.

        ``go_on`` is called now and then; once it returns False the check ends.
        Raises DataError or CheckpointError that names the damaged file.
        """
        if self.resumed is not None:
            self.resumed.check_rng(share, of)
        if self.config.data.verify == "start":
            self.dataset.verify(share, of, go_on)

    def changed(self, run: ResolvedRun, own_schedule: bool = False) -> list[str]:
        """The settings of samples, updates and mesh that differ from the resumed checkpoint's.

        If the learning rate of the next step differs, it is the last item; not with a schedule of
        the program's own, whose past is unknown.
        """
        if self.resumed is None or not (self.resumed.folder / CONFIG_TOML).is_file():
            return []
        try:
            then = recorded_config(self.resumed.folder / CONFIG_TOML)
        except ConfigError:  # of another llamax
            return []
        now = dict(sections(run.config))
        changes = [
            f"{section}.{field.name} {to_toml(before)} -> {to_toml(after)}"
            for section, earlier in sections(then)
            if section in COMPARED
            for field in fields(earlier)
            if field.name in (COMPARED[section] or {field.name})
            if (before := getattr(earlier, field.name))
            != (after := getattr(now[section], field.name))
        ]
        if run.config.finetune.method == "full":
            then_from, from_ = then.checkpoint.init_from, run.config.checkpoint.init_from
            if then_from != from_:
                changes.append(
                    f"checkpoint.init_from {to_toml(then_from)} -> {to_toml(from_)} (not read "
                    "by a run that goes on)"
                )
        data = self.resumed.manifest.mesh.get("data", run.mesh.dp)
        if data != run.mesh.dp:  # parallel.data=0 stands for any
            changes.append(f"parallel.data {data} -> {run.mesh.dp}")
        scheduled = any(change.partition(" ")[0] in SCHEDULE for change in changes)
        if scheduled and not own_schedule:
            step = self.resumed.step + 1
            before = f"{lr_at(step, then.optim, then.run.steps):.3e}"
            after = f"{lr_at(step, run.config.optim, run.steps):.3e}"
            if before != after:
                changes.append(f"learning rate of step {step} {before} -> {after}")
        return changes


def open_inputs(config: Config) -> Inputs:
    """Open what ``config`` names.

    Raises DataError, CheckpointError or ConfigError for what is missing or does not fit.
    """
    dataset = open_data(config)
    weights = open_weights(config, dataset)
    training, validation = open_samples(config, dataset)
    return Inputs(
        weights.config,
        dataset,
        training,
        validation,
        weights.resumed,
        weights.first,
        weights.adapters,
        weights.newest,
    )


def open_data(config: Config) -> Dataset:
    """The dataset of a run, with the one of data.validation in it, and a vocabulary that fits.

    Raises DataError, or ConfigError where checkpoint.also_hf could not write its tokenizer.
    """
    data = config.data
    verify: Verify = "off" if data.verify == "off" else "read"
    dataset = open_dataset(data.path, verify, config.model.vocab_size)
    if data.validation:
        held_out = open_dataset(data.validation, verify, config.model.vocab_size)
        held_out.check_tokenizer(dataset.fingerprint, data.path)
        dataset = replace(dataset, validation=held_out.train)
    dataset.check_vocabulary(config.model.vocab_size)
    if config.checkpoint.also_hf and Path(data.path).is_dir():
        # Every save writes it: refused now, not after the first.
        tokenizer, name = load_tokenizer(Path(data.path)), f"the tokenizer of {data.path}"
        remedy = "consolidate with the model's tokenizer afterwards, without checkpoint.also_hf"
        check_tokenizer_fits(tokenizer, name, config.model.vocab_size, remedy)
    return dataset


def open_samples(config: Config, dataset: Dataset) -> tuple[Samples, Samples | None]:
    """The training and validation samples, each with labels; None where nothing is validated.

    Raises DataError for a split without samples or labels.
    """
    data, seed, validation = config.data, config.run.seed, None
    training = Samples(dataset.train, data, seed)
    if dataset.validation is not None and config.run.validates:
        validation = Samples(dataset.validation, data, seed)
        batches = config.run.validate_batches
        validation.check_labels(batches, "run.validate_batches", "data.labels=all")
    training.check_labels(every="data.labels=all")
    return training, validation


def sample_notes(
    config: Config, training: Samples, validation: Samples | None
) -> Iterator[tuple[str, str]]:
    """What is unusual about the samples of a run, but no mistake: (what, remedy)."""
    batch, samples = config.data.global_batch, len(training)
    if batch > samples and config.data.path != RANDOM:
        yield (
            f"every step repeats samples: {config.data.path} has {count(samples, 'sample')}, and "
            f"data.global_batch={batch} is more",
            "",
        )
    if validation is None and config.run.validates:
        yield (
            f"nothing will be validated: {config.data.path} holds no validation text",
            "prepare it with a larger --validation, or name a dataset in data.validation",
        )


@dataclass(frozen=True)
class Weights:
    """Where the weights of a run come from, and its configuration; fields as of ``Inputs``."""

    config: Config
    resumed: Checkpoint | None
    first: Source | None
    adapters: AdapterInfo | None
    newest: Path | None


def open_weights(config: Config, dataset: Dataset) -> Weights:
    """The checkpoint that a run continues, and the weights that it starts from.

    Raises CheckpointError or ConfigError for what is missing or is of another model, DataError for
    a checkpoint of another tokenizer than the dataset's.
    """
    checkpoint = config.checkpoint
    resumed = first = latest = None
    if checkpoint.resume in ("auto", "intact"):
        folder = Path(config.run.folder) / CHECKPOINTS_FOLDER
        found = latest = newest_checkpoint(folder)
        if checkpoint.resume == "intact":
            found = newest_intact(folder)
        resumed = None if found is None else Checkpoint(found)
    elif checkpoint.resume != "never":
        if "/" not in checkpoint.resume and not Path(checkpoint.resume).is_dir():
            raise CheckpointError(
                f"checkpoint.resume={checkpoint.resume} is neither auto, intact, never nor a "
                "folder; write one of these"
            )
        resumed = Checkpoint(find_checkpoint(Path(checkpoint.resume)))
    if resumed is not None:
        _check_position(resumed)
        config = _untied(config, resumed)
        _same_network(config, resumed)
        if fingerprint := resumed.state.get("tokenizer"):  # an imported checkpoint has none
            dataset.check_tokenizer(fingerprint, str(resumed.folder))
    if checkpoint.init_from and (resumed is None or config.finetune.method != "full"):
        first = open_source(checkpoint.init_from)
        config = _untied(config, first)
        _same_network(config, first, ROPE if config.finetune.method == "full" else ())
    adapters = finetune_info(config.finetune, first, checkpoint.init_from)
    if resumed is not None:
        check_resumed(config.finetune, resumed, first)
    return Weights(config, resumed, first, adapters, latest)


def _check_position(resumed: Checkpoint) -> None:
    consumed = resumed.state.get("consumed_sequences")
    if type(consumed) is not int or consumed < 0:
        raise CheckpointError(
            f"{resumed.folder} does not say how much its training has seen; start from its weights "
            f"with --checkpoint.init_from={resumed.folder} --checkpoint.resume=never"
        )


def _untied(config: Config, source: Source) -> Config:
    """The configuration with a head beside the embedding, if a base that says tied has both."""
    if not config.checkpoint.init_from or source.model.get("tie_word_embeddings"):
        return config
    return replace(config, model=replace(config.model, tie_word_embeddings=False))


def _same_network(config: Config, source: Source, free: Sequence[str] = ()) -> None:
    """Raise ConfigError if a source holds another network; fields in ``free`` may differ."""
    theirs = ModelConfig.from_hub(source.model)
    names = config.model.differences(theirs)
    if changed := [name for name in names if name in free]:
        logger.info("not as in %s: %s", source.folder, ", ".join(changed))
    if names := [name for name in names if name not in free]:
        options = " ".join(_options(theirs, names, "--model."))
        raise ConfigError(
            f"model.{names[0]}={getattr(config.model, names[0])} but {source.folder} has "
            f"{getattr(theirs, names[0])}; use the configuration that belongs to these weights"
            + (f", or {options}" if options else "")
        )


def _options(section: object, names: Iterable[str], prefix: str) -> Iterator[str]:
    """The options that set these fields to what a section has."""
    for name in names:
        value = getattr(section, name)
        if is_dataclass(value):
            inside = [field.name for field in fields(value)]
            yield from _options(value, inside, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}={to_toml(value)}"
