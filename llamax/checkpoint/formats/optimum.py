"""Reading checkpoints of optimum-neuron: folders of neuronx-distributed plus metadata files.

::

    OUT/config.json                          the model
    OUT/shards/done, model/, optim/          as neuronx-distributed writes them
    OUT/shards/mp_metadata_pp_rank_P.json    how every parameter of a stage is cut

The metadata gives the cut dim of each parameter and how often key/value heads are repeated.  llamax
knows both from the model and the shapes, and refuses a folder in which the two disagree.

Source: optimum-neuron 0.4, ``models/training/modeling_utils.py`` (save_pretrained),
``transformations_utils.py`` (create_parameter_metadata), ``checkpointing.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamax.checkpoint.formats.base import read_json_inside
from llamax.checkpoint.formats.nxd import NxdCheckpoint
from llamax.parallel.sharding import Replica
from llamax.runtime.errors import CheckpointError

SHARDS, METADATA = "shards", "mp_metadata_pp_rank_{}.json"


class OptimumCheckpoint(NxdCheckpoint):
    """A folder that save_pretrained wrote, or its ``shards``."""

    def __init__(self, folder: Path, config: str, optimizer: bool, step: int | None) -> None:
        shards = folder / SHARDS if (folder / SHARDS).is_dir() else folder
        super().__init__(shards, config, optimizer, step)
        self._metadata = [
            read_json_inside(self.folder, self.folder / METADATA.format(stage))
            for stage in range(len(self.states))
        ]
        for name in self.shapes:
            self._check_metadata(name)

    def _check_metadata(self, name: str) -> None:
        """Raise CheckpointError if the metadata of a Hub tensor disagrees with the model."""
        stage, location = self.locate(name)
        metadata = _dict_at(self._metadata[stage], "parameters", location.name)
        path = self.folder / METADATA.format(stage)
        how = self.cuts[name]
        expected = "no dim" if isinstance(how, Replica) else f"dim {how.dim}"
        is_cut = metadata.get("tensor_model_parallel") is True
        stated = f"dim {metadata.get('partition_dim')}" if is_cut else "no dim"
        if metadata and stated != expected:
            raise CheckpointError(
                f"{path} says that {location.name} is cut along {stated}, the model needs "
                f"{expected}"
            )
        for specs in _as_list(self._metadata[stage].get("model_weight_transformation_specs")):
            layer = _dict_at(specs).get("module_fully_qualified_name")
            if name != f"{layer}.k_proj.weight":
                continue
            for spec in _as_list(_dict_at(specs).get("specs")):
                last = _as_list(spec)[-1:]
                replicas = _dict_at(last and last[0]).get("kv_size_multiplier", 1)
                if replicas != self.kv_replicas(name):
                    raise CheckpointError(
                        f"{path} says that key/value heads are repeated {replicas} times, the "
                        f"shards repeat them {self.kv_replicas(name)} times"
                    )


def _dict_at(value: Any, *keys: str) -> dict[str, Any]:
    """The dict at a path of keys, or an empty one."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
