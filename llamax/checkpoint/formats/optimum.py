"""Reading optimum-neuron: neuronx-distributed's folders with a description beside them.

::

    OUT/config.json                          the model
    OUT/shards/done, model/, optim/          as neuronx-distributed writes them
    OUT/shards/mp_metadata_pp_rank_P.json    how every parameter of a stage is cut

The description says along which dim each parameter lies and how often key/value heads are repeated.
llamax knows both from the model and the shapes; where the two disagree, the folder is not what it
seems and is refused.

Source: optimum-neuron 0.4, ``models/training/modeling_utils.py`` (save_pretrained),
``transformations_utils.py`` (create_parameter_metadata), ``checkpointing.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamax.checkpoint.formats.base import read_object
from llamax.checkpoint.formats.nxd import Nxd
from llamax.parallel.sharding import Replica
from llamax.runtime.errors import CheckpointError

SHARDS, METADATA = "shards", "mp_metadata_pp_rank_{}.json"


class Optimum(Nxd):
    """The folder that save_pretrained filled, or its ``shards``."""

    def __init__(self, folder: Path, config: str, optimizer: bool = True) -> None:
        super().__init__(
            folder / SHARDS if (folder / SHARDS).is_dir() else folder, config, optimizer
        )
        self._told = [
            read_object(self.folder, self.folder / METADATA.format(stage))
            for stage in range(len(self.states))
        ]
        for name in self.shapes:
            self._agree(name)

    def _agree(self, name: str) -> None:
        stage, where = self.find(name)
        about = _inner(self._told[stage], "parameters", where.name)
        path = self.folder / METADATA.format(stage)
        how = self.cuts[name]
        ours = "no dim" if isinstance(how, Replica) else f"dim {how.dim}"
        told = f"dim {about.get('partition_dim')}"
        told = told if about.get("tensor_model_parallel") is True else "no dim"
        if about and told != ours:
            raise CheckpointError(
                f"{path} says that {where.name} is cut along {told}, llamax knows it along {ours}"
            )
        for specs in _list(self._told[stage].get("model_weight_transformation_specs")):
            layer = _inner(specs).get("module_fully_qualified_name")
            if name != f"{layer}.k_proj.weight":
                continue
            for spec in _list(_inner(specs).get("specs")):
                told = _inner(_list(spec)[-1:] and _list(spec)[-1]).get("kv_size_multiplier", 1)
                if told != self.copies(name):
                    raise CheckpointError(
                        f"{path} says that key/value heads are repeated {told} times, the shards "
                        f"hold {self.copies(name)}"
                    )


def _inner(held: Any, *keys: str) -> dict[str, Any]:
    for key in keys:
        held = held.get(key) if isinstance(held, dict) else None
    return held if isinstance(held, dict) else {}


def _list(held: Any) -> list[Any]:
    return held if isinstance(held, list) else []
