"""What training opens before its ranks meet: the dataset, the base, the checkpoint to continue.

They are opened by the functions of training, so that what is refused here is what would end the
run, and nothing else.  Paths are those of the job, relative to its working folder.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

from llamax.checkpoint.hf_folder import open_source
from llamax.config.base_model import read_base
from llamax.config.data_path import RANDOM, blend_words
from llamax.config.model import ModelConfig
from llamax.config.schema import Config
from llamax.config.step_folders import list_checkpoints
from llamax.data.dataset import Dataset, open_dataset
from llamax.runtime.errors import BackendError, CheckpointError, ConfigError, DataError, LlamaxError
from llamax.runtime.hub import download
from llamax.runtime.hub_files import CONFIG
from llamax.runtime.hub_name import HubName, hub_name
from llamax.runtime.units import count, show_number
from llamax.tools.doctor.finding import Finding, passed, unknown
from llamax.training.folder_checks import check_run_folder
from llamax.training.inputs import open_data, open_samples, open_weights, sample_notes
from llamax.training.metrics import check_installed

PREPARE = "llamax launch --phase prepare"
FIRST = "training reads it first"


def placed(folder: Path, config: Config) -> Config:
    """A configuration with the paths of its inputs below ``folder``."""
    data, start, run = config.data, config.checkpoint, config.run
    validation = _below(folder, data.validation) if data.validation else ""
    init_from, resume = start.init_from, start.resume
    if init_from and hub_name(init_from, within=folder) is None:
        init_from = str(folder / init_from)
    if resume == "intact":  # hashing every file is for training
        resume = "auto"
    elif "/" in resume or (folder / resume).is_dir():
        resume = str(folder / resume)
    return replace(
        config,
        data=replace(data, path=_below(folder, data.path), validation=validation),
        checkpoint=replace(start, init_from=init_from, resume=resume),
        run=replace(run, folder=str(folder / run.folder)),
    )


def _below(folder: Path, path: str) -> str:
    """``data.path``, or every dataset of a blend, relative to a folder."""
    words = blend_words(path)
    for i in range(1, len(words), 2):
        words[i] = _below(folder, words[i])
    return " ".join(words) or (path if path == RANDOM else str(folder / path))


def check(folder: Path, config: Config, own_packages: bool) -> Iterator[Finding]:
    """The findings about all inputs of the run of ``config`` in ``folder``.

    ``own_packages``: whether the run would have the packages of this Python.
    """
    run = placed(folder, config)
    dataset = yield from data(run, folder.is_dir())
    found = list(base(folder, config))
    yield from found
    if folder.is_dir() and all(finding.level == "ok" for finding in found):
        yield from _start(run, dataset)
    yield from _reports(run, own_packages)


def data(config: Config, has_storage: bool) -> Generator[Finding, None, Dataset | None]:
    """Yield the findings about the data, and return it; None if it cannot be opened."""
    path = config.data.path
    if not has_storage and path != RANDOM:
        yield unknown("dataset", f"{path} is not here", "run doctor where it is")
        return None
    try:
        open_dataset(path, "off", config.model.vocab_size)
    except DataError as error:
        yield Finding("error", "dataset", str(error), FIRST, PREPARE)
        return None
    try:
        dataset = open_data(config)
        training, validation = open_samples(config, dataset)
    except (DataError, ConfigError) as error:
        yield _refused("dataset", error)
        return None
    yield passed("dataset", f"{count(len(dataset.train), 'token')} in {path}; {training}")
    for what, remedy in sample_notes(config, training, validation):
        yield Finding("warning", "dataset", what, "training would go on, with a warning", remedy)
    return dataset


def base(folder: Path, config: Config) -> Iterator[Finding]:
    """The finding about checkpoint.init_from, if the run would read it."""
    start, full = config.checkpoint, config.finetune.method == "full"
    if not start.init_from:
        return
    path = folder / start.init_from
    if (name := hub_name(start.init_from, within=folder)) is not None:
        yield on_hub(name)
    elif not folder.is_dir():
        yield unknown("base", f"{path} is not here", "run doctor where it is")
    elif full and start.resume != "never" and list_checkpoints(folder / config.run.folder):
        yield passed("base", f"{path} is not read: the run goes on from its newest checkpoint")
    else:
        try:
            model = ModelConfig.from_hub(open_source(path).model)
        except (CheckpointError, ConfigError) as error:
            yield Finding("error", "base", str(error), "training starts from its weights")
        else:
            size = show_number(model.num_parameters())
            yield passed("base", f"a Llama of {size} parameters in {path}")


def on_hub(name: HubName) -> Finding:
    """The finding about a base on the Hub, of which only config.json is downloaded."""
    try:
        base = read_base(download(name, CONFIG))
    except LlamaxError as error:
        return Finding("error", "base", str(error), "training starts from its weights")
    if base is None:
        return Finding("error", "base", f"{name} has no config.json", "it is no model")
    size = show_number(base.model.num_parameters())
    return passed("base", f"a Llama of {size} parameters in {name} on the Hub")


def _start(config: Config, dataset: Dataset | None) -> Iterator[Finding]:
    """The findings about the run folder, and about the checkpoint that the run goes on from.

    A base on the Hub is not read: it would be downloaded.
    """
    run, start, full = config.run, config.checkpoint, config.finetune.method == "full"
    try:
        check_run_folder(Path(run.folder))
        if dataset is None:
            return
        goes_on = start.resume != "never" and list_checkpoints(Path(run.folder))
        if start.init_from and hub_name(start.init_from) is not None and not (full and goes_on):
            return
        weights = open_weights(config, dataset)
    except LlamaxError as error:
        yield _refused("start", error)
        return
    if weights.resumed is None:
        yield passed("start", f"{run.folder} has no complete checkpoint: the run starts afresh")
    else:
        yield passed("start", f"after step {weights.resumed.step}, from {weights.resumed.folder}")


def _reports(config: Config, own_packages: bool) -> Iterator[Finding]:
    """The finding about the packages of TensorBoard, W&B and trackio, if the run writes to them."""
    try:
        check_installed(config.run)
    except BackendError as error:
        if own_packages:
            yield _refused("reports", error)
        else:
            what, _, remedy = str(error).partition("; ")
            yield unknown("reports", f"{what} here", f"run doctor on a node, or {remedy}")


def _refused(name: str, error: LlamaxError) -> Finding:
    """An error of training as a finding: its remedy is what stands after the last semicolon."""
    what, _, fix = str(error).rpartition("; ")
    return Finding(
        "error", name, what or fix, "training would end at its start", fix if what else ""
    )
