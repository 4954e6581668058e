"""A program's own model classes: tensors that no Llama has, and formats that cannot hold them.

llamax's checkpoints keep any parameter.  Hugging Face's LlamaForCausalLM and the formats of other
trainers know those of Llama alone, so a model with more, or with fewer, is refused there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from typing import TypeVar

from llamax.checkpoint.hf_folder import HfFolder
from llamax.checkpoint.source import Source
from llamax.config.model import ModelConfig
from llamax.model.llama import Llama
from llamax.parallel.sharding import Cut, ShardedParameters
from llamax.runtime.errors import CheckpointError
from llamax.runtime.logging import logger

Value = TypeVar("Value")
MODEL_CLASS = "model_class"  # in a checkpoint's state: the class of a program's own model


@cache
def plain_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each Hub tensor of a Llama without modules of a program's own."""
    return of_all_layers(_one_layer(model).hub_shapes(), model.num_hidden_layers)


@cache
def plain_cuts(model: ModelConfig) -> dict[str, Cut]:
    """How tensor ranks cut each Hub tensor of such a Llama."""
    return of_all_layers(_one_layer(model).hub_cuts(), model.num_hidden_layers)


def _one_layer(model: ModelConfig) -> ShardedParameters:
    return Llama(replace(model, num_hidden_layers=1), device="meta").sharded_parameters()


def of_all_layers(values: Mapping[str, Value], layers: int) -> dict[str, Value]:
    """Values by Hub name of a model of one layer, as those of ``layers`` layers, in their order.

    Layers are alike: a configuration of very many is described without a module for each.
    """
    first = "model.layers.0."
    found: dict[str, Value] = {}
    for name, value in values.items():
        if not name.startswith(first):
            found[name] = value
        elif f"model.layers.{layers - 1}.{name.removeprefix(first)}" not in found:
            inside = {n: v for n, v in values.items() if n.startswith(first)}
            for layer in range(layers):
                home = f"model.layers.{layer}."
                found |= {home + n.removeprefix(first): v for n, v in inside.items()}
    return found


def own_names(names: Collection[str], model: ModelConfig) -> list[str]:
    """Those of ``names`` that are not Hub tensors of a plain Llama, in order."""
    plain = plain_shapes(model)
    return [name for name in names if name not in plain]


def check_plain(source: Source, target: str) -> None:
    """Raise CheckpointError if ``target`` could not hold all tensors of a source, or lacks some.

    A model class without tensors of its own is written, with a warning: the reader computes Llama.
    """
    model = ModelConfig.from_hub(source.model)
    plain, names = plain_shapes(model), source.names()
    trained_as = str(source.state.get(MODEL_CLASS) or "a model class of your own")
    present = {*names}
    wrong = own_names(names, model) or [name for name in plain if name not in present]
    if wrong:
        has = "holds" if wrong[0] in names else "has no"
        if isinstance(source.untrained, HfFolder):
            reason = (
                "its config.json describes another model; use the configuration of exactly these "
                "weights, or copy the folder again"
            )
        else:
            reason = (
                f"{trained_as} was trained, which {target} cannot describe; use it with "
                "llamax.load(folder, model_class=...)"
            )
        raise CheckpointError(f"{source.folder} {has} {wrong[0]}{_more(wrong)}: {reason}")
    for name, shape in plain.items():
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{source.folder}: {name} is {list(source.shape(name))}, and its configuration "
                f"makes it {list(shape)}; {target} cannot describe it"
            )
    if source.state.get(MODEL_CLASS):
        logger.warning(
            "%s was trained as %s; a program that reads %s computes a plain Llama",
            source.folder,
            trained_as,
            target,
        )


def _more(names: Collection[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
