"""``push``: an exported folder to a repository on the Hub, in one commit.

Only what makes the model goes up: weights in safetensors, their configuration, the tokenizer's
files, llamax's prompt record, and a model card.  The folder is not changed.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from llamax.checkpoint.adapter_folders import ADAPTER_SHARDS
from llamax.checkpoint.hf_folder import HfFolder, read_json
from llamax.checkpoint.listing import newest_checkpoint
from llamax.checkpoint.load import check_shapes
from llamax.checkpoint.peft import PeftFolder
from llamax.config.base_model import read_base
from llamax.config.constants import CONFIG_FILE, METRICS_FILE
from llamax.config.load import recorded_config
from llamax.config.step_folders import MANIFEST
from llamax.model.llama import Llama
from llamax.runtime.errors import CheckpointError, ConfigError, HubError
from llamax.runtime.hub import forget_revisions
from llamax.runtime.hub_errors import explained
from llamax.runtime.hub_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_JSON, CONFIG_JSON, MODEL
from llamax.runtime.hub_name import COMMIT, HubName, hub_name
from llamax.runtime.progress import reported
from llamax.runtime.text import in_shell
from llamax.tools.push.model_card import Subject, model_card

CARD = "README.md"


class Pushed(NamedTuple):
    """What went up, or would: sizes in bytes by name; the address of the commit, if there is one.

    ``card`` is the text of README.md; ``own_card``: it lay in the folder; ``run``: the run that it
    describes.
    """

    files: dict[str, int]
    card: str
    own_card: bool
    run: Path | None
    url: str


def push(
    folder: Path | str,
    repository: str,
    *,
    private: bool = False,
    revision: str = "",
    run: Path | str | None = None,
    base_model: str = "",
    license: str = "",
    dry_run: bool = False,
) -> Pushed:
    """Upload an exported folder to the Hub; the repository is made if it does not exist.

    Args:
        folder: Hugging Face folder, or PEFT folder of adapters.
        repository: org/name on the Hub.
        private: Whether a new repository can be read by its owners alone.
        revision: Branch to write to, which is made if it does not exist; by default the main one.
        run: The run that the model card describes; by default the one that the folder lies in.
        base_model: org/name of the base on the Hub; by default the one that the run started from.
        license: The licence's identifier on the Hub, such as apache-2.0.
        dry_run: Whether to upload nothing.

    Raises:
        CheckpointError: For a folder that is not exported, damaged, or whose tensors are not those
            of its config.json.
        ConfigError: For a repository's name that is none, adapters with a base in a local path, or
            a config.json with impossible values.
        HubError: If the Hub cannot be written to.
    """
    folder = Path(folder)
    if not folder.is_dir() and Path(repository).is_dir():
        raise ConfigError(
            f"there is no folder {folder}; the folder comes first: llamax push "
            f"{in_shell(Path(repository))} org/name"
        )
    name = _target(repository, revision)
    _refuse_a_run(folder)
    adapters = (folder / ADAPTER_CONFIG).is_file()
    opened = PeftFolder(folder) if adapters else _model_of(folder)
    where = Path(run) if run is not None else _run_of(folder)
    if run is not None and not (Path(run) / CONFIG_FILE).is_file():
        raise CheckpointError(f"{run} is no run: it has no {CONFIG_FILE}; choose another `run`")
    config = None if where is None else recorded_config(where / CONFIG_FILE)
    named = base_model or ("" if config is None else config.checkpoint.init_from)
    named = named or (opened.info.base if isinstance(opened, PeftFolder) else "")
    base = str(on_hub) if named and (on_hub := hub_name(named)) is not None else ""
    if adapters and not base:
        raise ConfigError(
            f"the adapters name their base {named or 'nowhere'}, which others do not have; give "
            "its name on the Hub with `base_model`"
        )
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    contents: dict[str, bytes | Path] = {each: folder / each for each in MODEL.choose(names)}
    if adapters:
        contents |= _with_base(folder, base, contents)
    own_card = (folder / CARD).is_file()
    if own_card:
        contents[CARD] = folder / CARD
    else:
        parameters = sum(math.prod(opened.shape(each)) for each in opened.names())
        subject = Subject(name, parameters, adapters, base, license)
        contents[CARD] = model_card(subject, where, config).encode()
    files = {
        each: len(data) if isinstance(data, bytes) else data.stat().st_size
        for each, data in contents.items()
    }
    card = contents[CARD]
    text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
    url = "" if dry_run else _upload(name, contents, private)
    return Pushed(files, text, own_card, where, url)


def _target(repository: str, revision: str) -> HubName:
    if re.fullmatch(r"[\w.-]+", repository):
        raise ConfigError(
            f"{repository} is no name of a repository; write its owner too, you or an "
            f"organisation, such as me/{repository}"
        )
    uri = repository if repository.startswith("hf:") else f"hf://{repository}"
    name = hub_name(uri)
    assert name is not None, "hf:// is never a path"
    if revision and name.revision and revision != name.revision:
        raise ConfigError(f"{repository} names another revision than `revision={revision}`")
    chosen = revision or name.revision
    if COMMIT.fullmatch(chosen):
        raise ConfigError(f"{chosen} is a commit, which cannot change; name a branch to write to")
    return name._replace(revision=chosen)


def _refuse_a_run(folder: Path) -> None:
    """Raise CheckpointError for a folder that is not exported, with the command to run first."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; give the folder of an exported model")
    if (folder / ADAPTER_SHARDS).is_dir() and not (folder / ADAPTER_WEIGHTS).is_file():
        out = in_shell(folder.with_name(f"{folder.name}-peft"))
        raise CheckpointError(
            f"{folder} holds adapters in shards; first: llamax import {in_shell(folder)} "
            f"--out {out}, then push that folder"
        )
    if (folder / ADAPTER_CONFIG).is_file() or (folder / CONFIG_JSON).is_file():
        return
    is_checkpoint = (folder / MANIFEST).is_file()
    if is_checkpoint or newest_checkpoint(folder) is not None:
        out = in_shell(folder.with_name(f"{folder.name}-hub") if is_checkpoint else folder / "hub")
        raise CheckpointError(
            f"{folder} is a run or a checkpoint, not an exported model; first: llamax consolidate "
            f"{in_shell(folder)} --out {out}, then push that folder"
        )
    raise CheckpointError(
        f"{folder} holds no exported model: no config.json and no {ADAPTER_CONFIG}; llamax "
        "consolidate makes such a folder of a run"
    )


def _model_of(folder: Path) -> HfFolder:
    """The model in a folder; ConfigError or CheckpointError if its config.json does not fit it."""
    opened, base = HfFolder(folder), read_base(folder)
    assert base is not None, "it has a config.json"
    try:
        check_shapes(opened, Llama(base.model, device="meta").sharded_parameters())
    except CheckpointError as error:
        raise CheckpointError(
            f"{str(error).partition('; ')[0]} by its config.json; export the folder again"
        ) from None
    return opened


def _run_of(folder: Path) -> Path | None:
    """The run that a folder lies in, as train proposes it; None if it lies in none."""
    parents = folder.resolve().parents
    parts = (CONFIG_FILE, METRICS_FILE)
    return next((p for p in parents if all((p / part).is_file() for part in parts)), None)


def _with_base(folder: Path, base: str, contents: dict[str, bytes | Path]) -> dict[str, bytes]:
    """The files of adapters that name their base, with its name on the Hub."""
    repo, _, revision = base.partition("@")
    config = read_json(folder / ADAPTER_CONFIG) | {"base_model_name_or_path": repo}
    config |= {"revision": revision} if revision else {}
    changed = {ADAPTER_CONFIG: config}
    if BASE_JSON in contents:
        changed[BASE_JSON] = read_json(folder / BASE_JSON) | {"folder": base}
    return {each: f"{json.dumps(value, indent=2)}\n".encode() for each, value in changed.items()}


def _upload(name: HubName, contents: dict[str, bytes | Path], private: bool) -> str:
    """Commit the files; the address of the commit."""
    with explained(name, writing=True):
        from huggingface_hub import CommitOperationAdd, HfApi, get_token, utils

        if not get_token():
            raise HubError(f"to write to {name.repo} log in here first: hf auth login, or HF_TOKEN")
        api = HfApi()
        bars: Any = utils
        bars.disable_progress_bars()
        try:
            with reported(f"uploading to {name.repo}"):
                api.create_repo(name.repo, private=private, exist_ok=True)
                if name.revision:
                    api.create_branch(name.repo, branch=name.revision, exist_ok=True)
                done = api.create_commit(
                    name.repo,
                    [CommitOperationAdd(each, data) for each, data in contents.items()],
                    commit_message="Upload a model trained with llamax",
                    revision=name.revision or None,
                )
        finally:
            bars.enable_progress_bars()
    forget_revisions(name)
    return str(done.commit_url)
