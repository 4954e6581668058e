"""The model section that ``checkpoint.init_from`` supplies: that of the folder with the weights.

::

    org/name of the Hub ──> its folder in the cache ─┐
    config.json, or the newest checkpoint ───────────┴─> ModelConfig ──┐
    [model] of a recipe: left out                                      ├─> [model] of the run
    [model] of the user's own file, --model.* ─────────────────────────┘

A run that has checkpoints keeps its model in them, so that it goes on where the folder is no more.
What the weights fix cannot be changed; ``FREE`` fields can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from llamax.config.constants import CONFIG_FILE
from llamax.config.model import ModelConfig
from llamax.config.schema import Config
from llamax.config.step_folders import MANIFEST, list_checkpoints
from llamax.config.toml import Problems, build, read_toml
from llamax.runtime import json_reader
from llamax.runtime.errors import ConfigError
from llamax.runtime.hub import local_folder, resolve
from llamax.runtime.hub_files import CONFIG
from llamax.runtime.hub_name import HubName, hub_name
from llamax.runtime.json_reader import JsonError
from llamax.runtime.warn import warn_once_per_run

ROPE = ("rope_theta", "rope_scaling")
FREE = (
    "max_position_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    *ROPE,
)
MAX_BYTES = 1 << 30  # of a manifest, which lists the runs of every tensor on every rank


class Base(NamedTuple):
    """The model of the weights that a run starts from, and the folder that describes it."""

    model: ModelConfig
    folder: Path


def base_of(tables: Mapping[str, Any], within: Path = Path()) -> Base | None:
    """The base that the tables of a configuration name; None without one that can be read.

    Relative paths count from ``within``.  Raises ConfigError if the folder describes no Llama.
    """
    init_from = _init_from(tables)
    if not init_from:
        return None
    if (base := read_base(local_folder(init_from, CONFIG, within=within))) is not None:
        return base
    earlier = _earlier(tables, within)
    return None if earlier is None else read_base(earlier)


def _earlier(tables: Mapping[str, Any], within: Path) -> Path | None:
    """The run or checkpoint that a run goes on from, if there is one; None if it starts anew."""
    start, run = (tables.get(name) for name in ("checkpoint", "run"))
    start, run = (table if isinstance(table, dict) else {} for table in (start, run))
    folder, resume = run.get("folder", "run"), start.get("resume", "auto")
    if resume == "never" or not isinstance(resume, str) or not isinstance(folder, str):
        return None
    return within / (folder if resume in ("auto", "intact") else resume)


def pin_base(settings: dict[str, Any], within: Path = Path()) -> str:
    """Pin ``checkpoint.init_from`` to a commit, if it names the Hub; return it, or nothing.

    A run that goes on keeps the commit that it started from, unless another revision is given.
    """
    name = hub_name(_init_from(settings), within=within) if _init_from(settings) else None
    if name is None:
        return ""
    earlier = _earlier(settings, within)
    known = None if earlier is None or name.revision else _pinned_in(earlier / CONFIG_FILE)
    name = known if known and known.repo == name.repo else resolve(name)
    settings["checkpoint"]["init_from"] = str(name)
    return str(name)


def _pinned_in(path: Path) -> HubName | None:
    """The commit of the base in the configuration of a run or checkpoint; None without one."""
    try:
        name = hub_name(_init_from(read_toml(path))) if path.is_file() else None
    except ConfigError:
        return None
    return name if name is not None and name.pinned else None


def read_base(folder: Path) -> Base | None:
    """The base in a Hugging Face folder, a checkpoint or a run; None if it is none of them.

    Raises ConfigError if the folder describes no Llama.
    """
    path = folder / "config.json"
    try:
        if path.is_file():
            hub = json_reader.read_object(path, strict=False)
            hub.pop("quantization_config", None)  # reading makes weights dense
            generation = folder / "generation_config.json"
            if generation.is_file():
                ends = json_reader.read_object(generation, strict=False).get("eos_token_id")
                hub |= {} if ends is None else {"eos_token_id": ends}
        else:
            if not (folder / MANIFEST).is_file():
                if not (saved := list_checkpoints(folder)):
                    return None
                folder = saved[-1]
            if (model := _recorded(folder / CONFIG_FILE)) is not None:
                return Base(model, folder)
            path = folder / MANIFEST
            hub = json_reader.read_object(path, MAX_BYTES).get("model", {})
            if not isinstance(hub, dict):
                raise ConfigError(f"{path} describes no model; copy the folder again")
        return Base(ModelConfig.from_hub(hub), folder)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except JsonError as error:
        raise ConfigError(f"{path} {error}; download or copy it again") from None
    except ConfigError as error:
        raise ConfigError(str(error).replace("config.json", str(path), 1)) from None


def _recorded(path: Path) -> ModelConfig | None:
    """The model in the configuration of a checkpoint, which is small; None without one."""
    if not path.is_file():
        return None
    problems = Problems()
    try:
        model = build(ModelConfig, read_toml(path).get("model", {}), problems, "model")
    except ConfigError:
        return None
    return None if problems.lines(model, "model") else model


def supply_model(
    tables: dict[str, Any], settings: Mapping[str, Any], recipe: bool, within: Path = Path()
) -> None:
    """Put the model of the base into ``tables``, below what they give of it themselves.

    ``settings`` are the tables with everything on top, which say where the base is.  A ``recipe``
    holds settings of training: its model gives way to that of a base, whatever its size.
    """
    base, given = base_of(settings, within), tables.get("model", {})
    if base is not None and isinstance(given, dict):
        tables["model"] = _over(_table(base.model), {} if recipe else given)
        return
    named = _init_from(settings)
    if base is None and named and "model" not in tables:
        raise ConfigError(
            f"{_missing(local_folder(named, CONFIG, within=within))}, or write a section [model]"
        )
    if base is None and recipe and named and named != _init_from(tables):
        place = local_folder(named, CONFIG, within=within)
        warn_once_per_run(f"{_missing(place)}; until then the model is that of the recipe")


def contradictions(config: Config, within: Path = Path()) -> Iterator[str]:
    """A line if the configuration gives a model that the weights of its base cannot have."""
    settings = {name: asdict(getattr(config, name)) for name in ("checkpoint", "run")}
    base = base_of(settings, within)
    if base is None:
        return
    adapters = config.finetune.method != "full"
    names = [
        each.name
        for each in fields(ModelConfig)
        if getattr(config.model, each.name) != getattr(base.model, each.name)
        and (each.name not in FREE or (adapters and each.name in ROPE))
    ]
    if names == ["tie_word_embeddings"] and base.model.tie_word_embeddings:
        return  # config.json says tied; whether the files hold a head is seen where they are opened
    if names:
        first, *others = (
            f"model.{name}={_show(getattr(config.model, name))} but {base.folder} has "
            f"{_show(getattr(base.model, name))}"
            for name in names
        )
        also = f" (also {', '.join(others)})" if others else ""
        yield f"{first}{also}; " + (
            "leave it out: checkpoint.init_from supplies the model"
            if names[0] not in FREE
            else f"finetune.method={config.finetune.method} leaves the base as its folder "
            "describes it: leave it out, or use finetune.method=full"
        )


def _init_from(tables: Mapping[str, Any]) -> str:
    table = tables.get("checkpoint")
    value = table.get("init_from", "") if isinstance(table, dict) else ""
    return value if isinstance(value, str) else ""


def _missing(folder: Path) -> str:
    """Why a folder is no base, and what to do about it."""
    if (folder / "params.json").is_file():
        return f"checkpoint.init_from={folder} is in Meta's format; convert it with llamax import"
    remedy = ""
    if (folder / "adapter_config.json").is_file():
        return f"checkpoint.init_from={folder} holds adapters; merge them with llamax merge first"
    if folder.is_dir():
        found = "has no config.json and no complete checkpoint"
    else:
        found = "is not a folder on this machine"
        if folder.parts[:1] == ("models",):
            remedy = (
                f", or download the model: hf download OWNER/{folder.name} --local-dir {folder}"
            )
    return f"checkpoint.init_from={folder} {found}; check the path{remedy}"


def _table(model: ModelConfig) -> dict[str, Any]:
    """A model as the table that TOML has of it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if item is not None}
        return list(value) if isinstance(value, tuple) else value

    table: dict[str, Any] = plain(asdict(model))
    return table


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two tables as one, ``above`` on top at any depth."""
    merged = {**below}
    for key, value in above.items():
        inside = merged.get(key)
        both = isinstance(value, dict) and isinstance(inside, dict)
        merged[key] = _over(inside, value) if both else value  # type: ignore[arg-type]
    return merged


def _show(value: Any) -> str:
    if hasattr(value, "__dataclass_fields__"):
        return ", ".join(f"{name} {item}" for name, item in asdict(value).items())
    return "none" if value is None else str(value)
