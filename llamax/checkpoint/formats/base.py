"""A folder that another trainer wrote, as the Hub tensors in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llamax.checkpoint import hf_folder
from llamax.config.load import load_config, recipes
from llamax.config.model import ModelConfig
from llamax.model.llama import Llama
from llamax.parallel.sharding import Cut, parts
from llamax.runtime.errors import CheckpointError, ConfigError


class Foreign(ABC):
    """One model in a folder; tensors are joined and renamed when they are asked for.

    ``step`` is 0 and ``kinds`` is weight alone where no optimizer state was kept.
    """

    folder: Path
    model: ModelConfig
    step: int = 0
    kinds: tuple[str, ...] = ("weight",)

    @abstractmethod
    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        """The dtype in which one kind of a Hub tensor is kept."""

    @abstractmethod
    def join(self, name: str, kind: str) -> Tensor:
        """A Hub tensor from the pieces in the files."""

    def whole(self, name: str, kind: str = "weight") -> Tensor:
        """A Hub tensor, whole; CheckpointError where it is not of the shape the model has."""
        joined, shape = self.join(name, kind), self.shapes[name]
        if tuple(joined.shape) != shape:
            raise CheckpointError(
                f"{self.folder}: {name} ({kind}) is {list(joined.shape)}, the model's is "
                f"{list(shape)}; give the configuration of this very model with `config`"
            )
        if joined.dtype != (dtype := self.dtype(name, kind)):
            raise CheckpointError(
                f"{self.folder}: {name} ({kind}) is {joined.dtype} on some rank and {dtype} on the "
                "first; copy the folder anew"
            )
        return joined.contiguous()

    def lay_out(self, model: ModelConfig) -> None:
        """Fix the model, and with it the names, shapes and cuts of its Hub tensors."""
        self.model, llama = model, Llama(model, device="meta")
        self.shapes: Mapping[str, tuple[int, ...]] = dict(llama.hub_shapes())
        self.cuts: Mapping[str, Cut] = {
            part.name: part.how
            for name, how in llama.shards.items()
            for part in parts(name, how, 1)
        }

    def missing(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder} has no {name}; give the configuration of this very model with `config`"
        )


def inside(folder: Path, path: Path) -> Path:
    """``path``, a file of ``folder``; CheckpointError where it is missing or leads out of it."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy the folder anew")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{path} is a link out of its folder; put the file itself there")
    return path


def model_of(folder: Path, config: str) -> ModelConfig:
    """The model that ``config`` names, or that a config.json in or above ``folder`` describes.

    ``config`` is a recipe, a config.json, a folder with one, or a TOML file.
    """
    if not config:
        for home in (folder, folder.parent):
            if (home / hf_folder.CONFIG).is_file():
                return ModelConfig.from_hub(read_object(home, home / hf_folder.CONFIG))
        raise ConfigError(
            f"{folder} does not say what model it holds; add `config` with its config.json or the "
            "name of a recipe"
        )
    if config in recipes():
        return load_config(config).model
    path = Path(config)
    path = path / hf_folder.CONFIG if path.is_dir() else path
    if path.suffix == ".json":
        return ModelConfig.from_hub(hf_folder.read_json(path))
    return load_config(config).model


def read_object(folder: Path, path: Path) -> dict[str, object]:
    """A JSON object in a file of ``folder``."""
    found: dict[str, object] = hf_folder.read_json(inside(folder, path))
    return found
