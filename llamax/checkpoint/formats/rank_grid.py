"""State dicts of a grid of tensor and pipeline ranks, joined to Hub tensors.

::

              tp 0                      tp 1
    pp 0   embed 0, layers 0..15     embed 1, layers 0..15        one state dict per rank, with
    pp 1   layers 16..31, head 0     layers 16..31, head 1        its share of every tensor

Formats differ in the names of tensors, and in how a rank's share of a fused projection is laid out:
``Location`` describes both.  The rest is common: shares are joined along the cut dim, and padding
rows of the vocabulary and replicas of key/value heads are dropped.

Heads: with more tensor ranks than the K key/value heads, these are repeated m times *as a block*,
and the H query heads are ordered like the key/value heads they read (neuronx-distributed on trn1)::

    H 8, K 2, m 2:    k0 k1 | k0 k1        q0 q1  q4 q5 | q2 q3  q6 q7
    tensor 4:         rank r has key/value replica r and the H / (K m) queries that read it

Source: neuronx_distributed, ``modules/qkv_linear.py`` and ``scripts/checkpoint_converter.py``;
optimum-neuron, ``transformations_utils.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llamax.checkpoint.formats.base import ForeignCheckpoint
from llamax.checkpoint.formats.torch_zip import StoredTensor
from llamax.checkpoint.formats.xser import IGNORED_SUFFIXES, LEFT_OUT
from llamax.checkpoint.hf_folder import EMBEDDING, HEAD, OWN_HEAD
from llamax.config.model import ModelConfig
from llamax.parallel.sharding import Replica, Shard
from llamax.runtime.errors import CheckpointError
from llamax.runtime.logging import logger

StateDict = Mapping[str, StoredTensor]


class Location(NamedTuple):
    """A tensor in the files, and the function that selects rows from a rank's share of it.

    ``joined``: it selects them from the shares of all ranks, joined.
    """

    name: str
    rows: Callable[[Tensor], Tensor]
    joined: bool = False


def all_rows(share: Tensor) -> Tensor:
    """The ``Location.rows`` of a tensor that is not fused."""
    return share


class RankGrid(ForeignCheckpoint):
    """A checkpoint with one state dict per rank; ``states[pp][tp]`` is that of a rank."""

    states: list[list[StateDict]]
    repeats_heads: bool = False

    @property
    def tensor_degree(self) -> int:
        return len(self.states[0])

    def set_model(self, model: ModelConfig) -> None:
        """Set the model; one said to be tied, with a head of other values in the files, is not."""
        super().set_model(model)
        if model.tie_word_embeddings and (head := self._stored_head()) is not None:
            super().set_model(replace(model, tie_word_embeddings=False))
            if head.offset != LEFT_OUT and not torch.equal(self.read(HEAD), self.read(EMBEDDING)):
                logger.warning(OWN_HEAD, "the configuration")
            else:
                super().set_model(model)

    def _stored_head(self) -> StoredTensor | None:
        """The first rank's share of the head, if the files have one."""
        names = [location.name for location in self.locations(HEAD)]
        shares = (ranks[0][name] for ranks in self.states for name in names if name in ranks[0])
        return next(shares, None)

    @abstractmethod
    def locations(self, name: str) -> Iterator[Location]:
        """Where a Hub tensor may be found, the most likely location first."""

    def share(self, stage: int, rank: int, name: str, kind: str) -> Tensor:
        """A rank's share of a tensor of the files; ``kind`` is weight without optimizer state."""
        return self.states[stage][rank][name].load()

    def locate(self, name: str) -> tuple[int, Location]:
        """The stage and location of a Hub tensor; CheckpointError if no file has it."""
        for location in self.locations(name):
            for stage, ranks in enumerate(self.states):
                if location.name in ranks[0]:
                    for rank, state in enumerate(ranks):
                        if location.name not in state:
                            raise CheckpointError(
                                f"{self.folder}: rank {rank} of stage {stage} has no "
                                f"{location.name}, rank 0 has; copy the folder again"
                            )
                    return stage, location
        raise self.missing_error(name)

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        stage, location = self.locate(name)
        return self.states[stage][0][location.name].dtype

    def join(self, name: str, kind: str) -> Tensor:
        stage, location = self.locate(name)
        how = self.cuts[name]
        ranks = range(self.tensor_degree)
        shares = [self.share(stage, rank, location.name, kind) for rank in ranks]
        if len({share.shape for share in shares}) > 1:
            raise self.shape_error(location.name)
        dtype = self.dtype(name, kind)
        for other in {share.dtype for share in shares} - {dtype}:
            raise CheckpointError(
                f"{self.folder}: {name} ({kind}) is {other} on some rank and {dtype} on the "
                "first; copy the folder again"
            )
        if isinstance(how, Replica):
            if not all(torch.equal(share, shares[0]) for share in shares[1:]):
                warn_of_other_replicas(self.folder, location.name)
            return location.rows(shares[0])
        (block,) = how.blocks
        try:
            rows = all_rows if location.joined else location.rows
            joined = torch.cat([rows(share) for share in shares], self.cut_dim(name, how))
            if location.joined:
                joined = location.rows(joined)
            if block.pad:
                return joined[: block.size]
            if ".self_attn." in name and (replicas := self.kv_replicas(name)) > 1:
                return self.drop_replicas(joined, name, how.dim, replicas)
        except (RuntimeError, IndexError, TypeError):
            raise self.shape_error(location.name) from None
        return joined

    def cut_dim(self, name: str, how: Shard) -> int:
        """The dim along which the ranks' shares of a Hub tensor are joined."""
        return how.dim

    def drop_replicas(self, joined: Tensor, name: str, dim: int, replicas: int) -> Tensor:
        """The heads of an attention weight in the model's order, each head once."""
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return joined[: len(joined) // replicas]
        query_heads, kv_heads = self.model.num_attention_heads, self.model.num_key_value_heads
        order = torch.tensor(replicated_query_order(query_heads, kv_heads, replicas)).argsort()
        heads: Tensor = joined.unflatten(dim, (len(order), -1))
        return heads.index_select(dim, order).flatten(dim, dim + 1)

    def kv_replicas(self, name: str) -> int:
        """How often the ranks repeat the key/value heads of the layer of an attention weight."""
        layer = name.rpartition(".self_attn.")[0]
        stage, location = self.locate(f"{layer}.self_attn.k_proj.weight")
        first, *others = self.states[stage][0][location.name].shape
        degree = self.tensor_degree
        share = [first * degree if location.joined else first, *others]
        try:
            rows = len(location.rows(torch.empty(share, device="meta")))
            rows *= 1 if location.joined else degree
        except (RuntimeError, IndexError, TypeError):
            raise self.shape_error(location.name) from None
        model = self.model
        replicas, rest = divmod(rows, model.num_key_value_heads * model.head_dim)
        groups = model.num_key_value_heads * replicas
        if rest or not replicas or model.num_attention_heads % groups:
            raise self.shape_error(location.name)
        if replicas > 1 and not self.repeats_heads:
            raise CheckpointError(
                f"{self.folder}: {location.name} repeats key/value heads {replicas} times, in an "
                "order that llamax does not know; save it with fewer tensor ranks"
            )
        return replicas

    def shape_error(self, name: str) -> CheckpointError:
        """The error for a tensor of the files whose shape does not fit the model."""
        shapes = [
            str(list(state[name].shape))
            for ranks in self.states
            for state in ranks
            if name in state
        ]
        return CheckpointError(
            f"{self.folder}: {name} of shape {', '.join(dict.fromkeys(shapes))} on "
            f"{self.tensor_degree} tensor ranks does not fit this model; give the configuration of "
            "exactly this model with `config`"
        )

    def check_all_used(self) -> None:
        """Raise CheckpointError for a tensor in the files that belongs to no Hub tensor."""
        used = {self.locate(name)[1].name for name in self.shapes}
        if self.model.tie_word_embeddings:
            used.update(location.name for location in self.locations("lm_head.weight"))
        for ranks in self.states:
            for name in dict.fromkeys(name for state in ranks for name in state):
                if name not in used and not name.endswith(IGNORED_SUFFIXES):
                    raise CheckpointError(
                        f"{self.folder} has {name[:80]}, which llamax does not know; it reads "
                        "Llamas, and needs the configuration of exactly this one"
                    )


@cache
def warn_of_other_replicas(folder: Path, name: str) -> None:
    """Warn of what every rank should have alike, once for each folder and name."""
    logger.warning(
        "%s: %s has other values on some tensor rank than on the first, whose are taken; are all "
        "files of one step?",
        folder,
        name,
    )


def replicated_query_order(query_heads: int, kv_heads: int, replicas: int) -> list[int]:
    """The order of the query heads when the key/value heads are repeated ``replicas`` times."""
    group = query_heads // kv_heads
    queries = group // replicas
    return [
        kv * group + replica * queries + i
        for replica in range(replicas)
        for kv in range(kv_heads)
        for i in range(queries)
    ]


def stacked_rows(sizes: Callable[[int], list[int]], part: int) -> Callable[[Tensor], Tensor]:
    """A function that selects one of the matrices stacked in a share.

    ``sizes`` returns the row counts of all of them, given the rows of the share.
    """
    return lambda share: share.split(sizes(len(share)))[part]


def two_halves(rows: int) -> list[int]:
    """The row counts of two stacked matrices of the same height."""
    return [rows // 2, rows - rows // 2]
