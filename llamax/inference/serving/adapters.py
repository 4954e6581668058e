"""Adapters of several tuned models beside one base: each row of a batch uses those of its request.

::

    rows      base   base   poet   judge
    W x        *      *      *      *        once, for all rows
    + B A x                 poet   judge     for the rows of an adapter
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from llamax import ops
from llamax.checkpoint.build_model import load_base
from llamax.checkpoint.load import load_weights
from llamax.checkpoint.peft import AdapterInfo, PeftFolder, check_base, open_adapter
from llamax.checkpoint.source import Source
from llamax.config.schema import FinetuneConfig
from llamax.inference.engine import LoadedModel
from llamax.model import lora
from llamax.model.layout import transpose_weights
from llamax.model.llama import Llama
from llamax.model.lora_linear import Adapter, FrozenLinear
from llamax.parallel.collectives import Solo
from llamax.parallel.tensor_parallel import ColumnLinear, RowLinear
from llamax.runtime.errors import CheckpointError, ConfigError
from llamax.runtime.logging import logger

BASE_SETTINGS = ("method", "quant", "double_quant")  # what adapters of one base have in common


class Adapters:
    """The rows of a batch that use an adapter, by its name; the base has the name ""."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.groups: list[tuple[str, Tensor]] = []

    def choose(self, names: Sequence[str]) -> None:
        """Use the adapter ``names[i]`` for row i of the batches that follow."""
        rows: dict[str, list[int]] = defaultdict(list)
        for row, name in enumerate(names):
            rows[name].append(row)
        self.groups = [
            (name, torch.tensor(rows[name], device=self.device)) for name in rows if name
        ]


class ServedLinear(nn.Module):
    """A frozen layer on one rank with the adapters of several models: [B, S, in] -> [B, S, out]."""

    def __init__(
        self,
        layer: ColumnLinear | RowLinear | FrozenLinear,
        beside: Mapping[str, Sequence[Adapter]],
        adapters: Adapters,
    ) -> None:
        super().__init__()
        self.layer, self._beside, self._adapters = layer, beside, adapters

    def forward(self, x: Tensor) -> Tensor:
        y = ops.linear(x, self.layer.dense())
        for name, rows in self._adapters.groups:
            x_rows, y_rows = x[rows], y[rows]
            for adapter in self._beside.get(name, ()):
                narrow = ops.linear(x_rows, adapter.a.weight)
                outputs = y_rows.narrow(-1, adapter.start, adapter.length)
                outputs.add_(ops.linear(narrow, adapter.b.weight), alpha=adapter.scale)
            y[rows] = y_rows
        return y


def build_served(
    loaded: LoadedModel,
    tuned: Mapping[str, LoadedModel],
    device: torch.device,
    dtype: str,
    quantize: str = "",
) -> tuple[Llama, Adapters]:
    """The model of a folder and the adapters of ``tuned``, by name, beside it.

    Raises ConfigError for adapters that cannot share one base, and CheckpointError for those of
    another base or of a kind that has to be merged.
    """
    tp, adapters = Solo("tp", device), Adapters(device)
    if not tuned:
        model = loaded.build(tp, device, dtype, quantize=quantize)
        transpose_weights(model)
        return model.eval(), adapters
    if quantize:
        raise ConfigError(
            f"`quantize={quantize}` is for a model without adapters; merge `adapter` "
            f"{next(iter(tuned))} with llamax merge and serve the result"
        )
    if loaded.adapter is not None:
        raise ConfigError(
            f"{loaded.adapter} holds adapters, and `adapter` needs a whole model beside which all "
            f"are; serve {loaded.source.folder} and give them by name"
        )
    opened = {name: open_adapter(each.adapter) for name, each in tuned.items() if each.adapter}
    first = _settings(opened, loaded.model.num_hidden_layers)
    like = torch.empty(0, dtype=loaded.dtype(device, dtype), device=device)
    if first.method == "lora":
        model = loaded.build(tp, device, dtype)
    else:
        logger.warning(
            "%s is served in %s, in which its adapters were trained, also by its own name",
            loaded.source.folder,
            first.quant,
        )
        model = Llama(loaded.model, tp, dtype=like.dtype, device="meta")
        load_base(model, loaded.source, first, like, Solo("data", device))
    beside: dict[str, dict[str, Sequence[Adapter]]] = defaultdict(dict)
    for name, (source, info) in opened.items():
        check_base(info, source.folder, loaded.source)
        shell = Llama(loaded.model, tp, dtype=like.dtype, device="meta")
        lora.adapt(shell, info.finetune, like)
        load_weights(source, shell.sharded_parameters().trained(), convert=True)
        for path, layer in shell.named_modules():
            if isinstance(layer, FrozenLinear):
                beside[path][name] = layer.adapters
    for path, by_name in beside.items():
        owner, _, own = path.rpartition(".")
        frozen = model.get_submodule(path)
        assert isinstance(frozen, (ColumnLinear, RowLinear, FrozenLinear))
        setattr(model.get_submodule(owner), own, ServedLinear(frozen, by_name, adapters))
    return model.eval(), adapters


def _settings(opened: Mapping[str, tuple[Source, AdapterInfo]], layers: int) -> FinetuneConfig:
    """The settings of the base, which all adapters must share."""
    names = list(opened)
    settings = [info.finetune for _, info in opened.values()]
    for name, (source, _) in opened.items():
        if isinstance(source, PeftFolder) and not source.is_uniform(layers):
            raise CheckpointError(
                f"`adapter`: {name} differs from layer to layer or changes more than projections; "
                f"merge {source.folder} with llamax merge and serve the result"
            )
    for name, other in zip(names, settings, strict=True):
        if any(getattr(other, key) != getattr(settings[0], key) for key in BASE_SETTINGS):
            raise ConfigError(
                f"`adapter`: {names[0]} and {name} were trained on a base in different precision; "
                "serve them by themselves, or merge one of them with llamax merge"
            )
    return settings[0]
