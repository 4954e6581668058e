"""The interface of all formats: a folder that another trainer wrote, as a set of Hub tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llamax.checkpoint.hf_folder import read_json
from llamax.checkpoint.plain_llama import plain_cuts, plain_shapes
from llamax.config.load import load_config, recipes
from llamax.config.model import ModelConfig
from llamax.parallel.sharding import Cut
from llamax.runtime.errors import CheckpointError, ConfigError
from llamax.runtime.hub_files import CONFIG_JSON


class ForeignCheckpoint(ABC):
    """The model in a folder of another trainer; a tensor is joined and renamed when it is read.

    Without optimizer state ``step`` is 0 and ``kinds`` is weight alone.  ``origin`` names what was
    taken of a folder with several checkpoints, such as "step 1000 (mp_rank_00/x.ckpt)".
    """

    folder: Path
    model: ModelConfig
    step: int = 0
    origin: str = ""
    kinds: tuple[str, ...] = ("weight",)

    @abstractmethod
    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        """The dtype of one kind of a Hub tensor in the files."""

    @abstractmethod
    def join(self, name: str, kind: str) -> Tensor:
        """One kind of a Hub tensor, joined from the files of all ranks."""

    def read(self, name: str, kind: str = "weight") -> Tensor:
        """One kind of a whole Hub tensor; CheckpointError if it has not the model's shape."""
        joined, shape = self.join(name, kind), self.shapes[name]
        if tuple(joined.shape) != shape:
            raise CheckpointError(
                f"{self.folder}: {name} ({kind}) is {list(joined.shape)}, the model's is "
                f"{list(shape)}; give the configuration of exactly this model with `config`"
            )
        return joined.contiguous()

    def set_model(self, model: ModelConfig) -> None:
        """Set the model, and with it the names, shapes and cuts of the Hub tensors."""
        self.model = model
        self.shapes: Mapping[str, tuple[int, ...]] = plain_shapes(model)
        self.cuts: Mapping[str, Cut] = plain_cuts(model)

    def missing_error(self, name: str) -> CheckpointError:
        """The error for a Hub tensor that the files do not hold."""
        return CheckpointError(
            f"{self.folder} has no {name}; give the configuration of exactly this model with "
            "`config`"
        )


def check_inside(folder: Path, path: Path) -> Path:
    """Return ``path``, a file of ``folder``; CheckpointError if it is missing or links outside."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy the folder again")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{path} is a link out of its folder; put the file itself there")
    return path


def find_model_config(folder: Path, config: str) -> ModelConfig:
    """The model that ``config`` names, or else the config.json in or above ``folder``.

    ``config`` is a recipe, a config.json, a folder with one, or a TOML file.  Raises ConfigError if
    there is neither.
    """
    if not config:
        for candidate in (folder, folder.parent):
            if (candidate / CONFIG_JSON).is_file():
                path = candidate / CONFIG_JSON
                return ModelConfig.from_hub(read_json_inside(candidate, path))
        raise ConfigError(
            f"{folder} does not describe its model; add `config` with its config.json or the name "
            "of a recipe"
        )
    if config in recipes():
        return load_config(config).model
    path = Path(config)
    path = path / CONFIG_JSON if path.is_dir() else path
    if path.suffix == ".json":
        return ModelConfig.from_hub(read_json(path))
    return load_config(config).model


def read_json_inside(folder: Path, path: Path) -> dict[str, object]:
    """The JSON object in a file of ``folder``; CheckpointError if the file links outside."""
    value: dict[str, object] = read_json(check_inside(folder, path))
    return value
