"""Reading adapters of optimum-neuron: LoRA factors in files of ranks, joined to PEFT's tensors.

::

    OUT/adapter_NAME/adapter_config.json                     PEFT's settings, of the whole model
    OUT/adapter_NAME/adapter_shards/model/dp_rank_00_...     as neuronx-distributed writes ranks
    OUT/adapter_NAME/adapter_shards/mp_metadata_pp_rank_P.json
    OUT/checkpoint-N/adapter_NAME/...                        the same, after step N of the trainer

The metadata has the cut dim of every parameter of a stage, under its name with the adapter's, and
how projections were made into one:

* FusedLinearsSpec: one A for all of them, a rank's share of B stacks theirs (gate and up; q, k, v);
* GQAQKVColumnParallelLinearSpec: one A for q, k and v; B in three tensors, or stacked; key/value
  heads repeated and query heads reordered as in ``rank_grid``, in A of the output projection too.

A is given to each projection by itself, as PEFT has it.

Source: optimum-neuron 0.4, ``peft/peft_model.py`` (save_pretrained), ``peft/tuners/lora/layer.py``,
``models/training/transformations_utils.py`` and ``checkpointing.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamax.checkpoint.adapter_folders import ADAPTER_SHARDS
from llamax.checkpoint.formats.base import read_json_inside
from llamax.checkpoint.formats.nxd import find_rank_files, load_state_dict
from llamax.checkpoint.formats.optimum import METADATA
from llamax.checkpoint.formats.rank_grid import (
    replicated_query_order,
    warn_of_other_replicas,
)
from llamax.checkpoint.formats.torch_zip import StoredTensor
from llamax.checkpoint.formats.xser import IGNORED_SUFFIXES
from llamax.runtime.errors import CheckpointError

FACTOR = re.compile(r"(.+)\.(\w+)\.(lora_[AB])\.(weight(?:_[qkv]|_qkv)?)")
FUSED, REPEATED = "FusedLinearsSpec", "GQAQKVColumnParallelLinearSpec"

Join = Callable[[Sequence[Tensor]], Tensor]


class Factor(NamedTuple):
    """A whole tensor: the ranks' shares of the tensor in the files that has it, and their join."""

    stored: str
    shares: Sequence[StoredTensor]
    join: Join
    shape: tuple[int, ...]
    is_cut: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.shares[0].dtype


class AdapterShards:
    """The tensors of an adapter in a folder adapter_NAME, under PEFT's names.

    Raises CheckpointError for files that are missing or damaged, for metadata that is not known,
    and for tensors that it does not describe.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / ADAPTER_SHARDS
        found = find_rank_files(self.folder / "model")
        self._adapter, self.tensor_degree = folder.name.removeprefix("adapter_"), found.tensor
        self.factors: dict[str, Factor] = {}
        stages = [self._metadata(stage) for stage in range(found.stages)]
        known = set[str]().union(*(cuts for cuts, _ in stages))
        for stage, (cuts, specs) in enumerate(stages):
            files = [found[0, rank, stage] for rank in range(found.tensor)]
            states = [load_state_dict(self.folder, file) for file in files]
            for name in dict.fromkeys(name for state in states for name in state):
                if name in cuts:
                    self._add(name, cuts[name], specs, states, stage)
                elif name not in known and not name.endswith(IGNORED_SUFFIXES):
                    raise CheckpointError(
                        f"{self.folder} has {name[:80]}, which its metadata does not describe; "
                        f"{self._other_way()}"
                    )

    def read(self, factor: Factor) -> Tensor:
        """A whole tensor; CheckpointError if a file is damaged."""
        shares = [share.load() for share in factor.shares]
        if not factor.is_cut and not all(torch.equal(each, shares[0]) for each in shares[1:]):
            warn_of_other_replicas(self.folder, factor.stored)
        return factor.join(shares).contiguous()

    def _metadata(self, stage: int) -> tuple[dict[str, int | None], dict[str, list[Any]]]:
        """The cut dim (None: not cut) of each tensor of a stage, and the specs of each module."""
        path = self.folder / METADATA.format(stage)
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing: older versions of optimum-neuron have none; "
                f"{self._other_way()}"
            )
        values = read_json_inside(self.folder, path)
        named = re.compile(rf"(\.lora_(?:embedding_)?[AB])\.{re.escape(self._adapter)}(?=\.|$)")
        cuts: dict[str, int | None] = {}
        specs: dict[str, list[Any]] = {}
        try:
            for parameter, about in values["parameters"].items():  # type: ignore[attr-defined]
                name, own = named.subn(r"\1", parameter)
                if own:
                    # A fused B of repeated heads has no attributes, though it is cut.
                    is_cut = about["tensor_model_parallel"] is True or name.endswith(".weight_qkv")
                    cuts[name] = int(about.get("partition_dim", 0)) if is_cut else None
            for each in values["model_weight_transformation_specs"]:  # type: ignore[attr-defined]
                module = specs.setdefault(each["module_fully_qualified_name"], [])
                module += [(kind, dict(about)) for kind, about in each["specs"]]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._unknown(stage) from None
        return cuts, specs

    def _add(
        self,
        name: str,
        dim: int | None,
        specs: Mapping[str, list[Any]],
        states: Sequence[Mapping[str, StoredTensor]],
        stage: int,
    ) -> None:
        """Add the tensors that a tensor of the files holds."""
        if not all(name in state for state in states):
            raise CheckpointError(
                f"{self.folder}: some rank of stage {stage} has no {name[:80]}, another has; copy "
                "the folder again"
            )
        shares = [state[name] for state in states]
        if len({(share.shape, share.dtype) for share in shares}) > 1:
            raise CheckpointError(
                f"{self.folder}: {name[:80]} has other shapes or types on some rank of stage "
                f"{stage} than on the first; copy the folder again"
            )
        try:
            for whole, join in self._parts(name, dim, specs):
                like = [torch.empty(share.shape, device="meta") for share in shares]
                shape = tuple(join(like).shape)
                self.factors[whole] = Factor(name, shares, join, shape, dim is not None)
        except (RuntimeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError):
            raise self._unknown(stage) from None

    def _parts(
        self, name: str, dim: int | None, specs: Mapping[str, list[Any]]
    ) -> Iterator[tuple[str, Join]]:
        """The names of the whole tensors in a tensor of the files, and how each is joined."""
        match = FACTOR.fullmatch(name)
        module, projection, factor, weight = match.groups() if match else ("", "", "", "")
        for kind, about in specs.get(module, ()):
            if about["tp_size"] != self.tensor_degree:
                raise ValueError
            if kind == FUSED and about["fused_linear_name"] == projection:
                if about["fuse_axis"] != 0:
                    raise ValueError
                rows = [size // self.tensor_degree for size in about["original_dims"]]
                for number, linear in enumerate(about["linear_names"]):
                    join = _joined(dim) if factor == "lora_A" else _joined(dim, rows, number)
                    yield f"{module}.{linear}.{factor}.weight", join
                return
            if kind == REPEATED and about["gqa_qkv_projection_name"] == projection:
                yield from _repeated(f"{module}.{{}}.{factor}.weight", factor, weight, dim, about)
                return
            if kind == REPEATED and about["output_projection_name"] == projection:
                join = _joined(dim)
                yield name, _in_order(join, about, 1) if factor == "lora_A" else join
                return
        yield name, _joined(dim)

    def _unknown(self, stage: int) -> CheckpointError:
        path = self.folder / METADATA.format(stage)
        return CheckpointError(
            f"{path} does not fit the tensors beside it, or describes them in a way that llamax "
            f"does not know; {self._other_way()}"
        )

    def _other_way(self) -> str:
        home = self.folder.parent
        return (
            f"join them with `optimum-cli neuron consolidate {home.parent} PEFT`, and copy "
            f"{home.name}/adapter_config.json to PEFT"
        )


def _joined(dim: int | None, rows: Sequence[int] = (), number: int = 0) -> Join:
    """Joins shares along ``dim``, or takes the first; ``rows``: of them only part ``number``."""

    def join(shares: Sequence[Tensor]) -> Tensor:
        if rows:
            shares = [share.split([*rows])[number] for share in shares]
        return shares[0] if dim is None else torch.cat([*shares], dim)

    return join


def _repeated(
    name: str, factor: str, weight: str, dim: int | None, about: Mapping[str, Any]
) -> Iterator[tuple[str, Join]]:
    """The tensors of q, k and v; ``name`` has a place for that of the projection."""
    sizes = [about["q_output_size_per_partition"], *[about["kv_output_size_per_partition"]] * 2]
    for number, part in enumerate(("query", "key", "value")):
        whole = name.format(about[f"{part}_projection_name"])
        if factor == "lora_A":
            yield whole, _joined(dim)
        elif weight in ("weight_qkv", f"weight_{part[0]}"):
            join = _joined(dim, sizes if weight == "weight_qkv" else (), number)
            yield whole, _in_order(join, about, 0) if part == "query" else _once(join, about)
        elif weight == "weight":
            raise ValueError


def _in_order(join: Join, about: Mapping[str, Any], dim: int) -> Join:
    """Puts the query heads along ``dim`` in the model's order."""
    heads, kv_heads = about["num_attention_heads"], about["num_key_value_heads"]
    order = replicated_query_order(heads, kv_heads, about["kv_size_multiplier"])
    places = torch.tensor(order).argsort()

    def ordered(shares: Sequence[Tensor]) -> Tensor:
        whole = join(shares)
        grid: Tensor = whole.unflatten(dim, (heads, -1))
        return grid.index_select(dim, places.to(whole.device)).flatten(dim, dim + 1)

    return ordered


def _once(join: Join, about: Mapping[str, Any]) -> Join:
    """Takes repeated key/value heads once."""
    return lambda shares: join(shares).chunk(about["kv_size_multiplier"])[0]
