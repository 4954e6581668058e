"""Reading checkpoints of optimum-neuron: folders of neuronx-distributed plus metadata files.

::

    OUT/config.json                          the model
    OUT/shards/done, model/, optim/          as neuronx-distributed writes them
    OUT/shards/mp_metadata_pp_rank_P.json    how every parameter of a stage is cut
    OUT/checkpoint-N/...                     the same, as the trainer saves it after step N

The metadata gives the cut dim of each parameter and how often key/value heads are repeated.  llamax
knows both from the model and the shapes, and refuses a folder in which the two disagree.

Source: optimum-neuron 0.4, ``models/training/modeling_utils.py`` (save_pretrained),
``transformations_utils.py`` (create_parameter_metadata), ``checkpointing.py``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llamax.checkpoint.formats.base import read_json_inside
from llamax.checkpoint.formats.nxd import NxdCheckpoint
from llamax.parallel.sharding import Replica
from llamax.runtime.errors import CheckpointError

SHARDS, METADATA = "shards", "mp_metadata_pp_rank_{}.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class OptimumCheckpoint(NxdCheckpoint):
    """A folder that save_pretrained wrote, its ``shards``, or a trainer's folder of several."""

    def __init__(self, folder: Path, config: str, optimizer: bool, step: int | None) -> None:
        super().__init__(shards := find_shards(folder, step), config, optimizer, None)
        if CHECKPOINT.fullmatch(shards.parent.name):
            self.origin = self.origin.replace(f"tag {SHARDS}", shards.parent.name, 1)
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


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The shards of a trainer's checkpoints in its folder, by their steps."""
    found = ((CHECKPOINT.fullmatch(path.parent.name), path) for path in folder.glob(f"*/{SHARDS}"))
    return {int(match[1]): path for match, path in sorted(found, key=str) if match}


def find_shards(folder: Path, step: int | None = None) -> Path:
    """The shards in a folder: of the checkpoint of ``step``, else its own, else of the newest.

    Raises CheckpointError if there is no such checkpoint, or none of several is complete.
    """
    own = folder / SHARDS if (folder / SHARDS).is_dir() else folder
    steps = checkpoints_in(folder)
    if step is not None:
        if own.parent.name == f"checkpoint-{step}":
            return own
        if step not in steps:
            names = ", ".join(f"checkpoint-{number}" for number in sorted(steps)) or "none"
            raise CheckpointError(f"{folder} has no checkpoint-{step}; its checkpoints are {names}")
        return steps[step]
    if own != folder or not steps:
        return own
    complete = [number for number, path in steps.items() if (path / "done").is_file()]
    if not complete and len(steps) > 1:
        raise CheckpointError(
            f"{folder} has no complete checkpoint (with a file {SHARDS}/done); name the folder of "
            "one"
        )
    return steps[max(complete or steps)]


def _dict_at(value: Any, *keys: str) -> dict[str, Any]:
    """The dict at a path of keys, or an empty one."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
