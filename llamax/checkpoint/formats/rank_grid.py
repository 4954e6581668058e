"""State dicts of a grid of tensor and pipeline ranks, joined to Hub tensors.

::

              tp 0                      tp 1
    pp 0   embed 0, layers 0..15     embed 1, layers 0..15        one dict of tensors per rank,
    pp 1   layers 16..31, head 0     layers 16..31, head 1        each with its share of every one

What differs between formats is how a tensor is called, and how a rank's share of a fused
projection lies inside one: ``Where`` says both.  The rest is the same everywhere: shares are joined
along the cut dim, rows that pad the vocabulary go, and so do copies of key/value heads.

Heads: where tensor ranks outnumber K key/value heads, these are repeated m times *as a block*, and
the H query heads follow the key/value heads they read (neuronx-distributed on trn1)::

    H 8, K 2, m 2:    k0 k1 | k0 k1        q0 q1  q4 q5 | q2 q3  q6 q7
    tensor 4:         rank r has replica r, whose H / (K m) queries stand beside it

Source: neuronx_distributed, ``modules/qkv_linear.py`` and ``scripts/checkpoint_converter.py``;
optimum-neuron, ``transformations_utils.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from llamax.checkpoint.formats.base import Foreign
from llamax.checkpoint.formats.torch_zip import Stored
from llamax.config.model import ModelConfig
from llamax.parallel.sharding import Replica, Shard
from llamax.runtime.errors import CheckpointError

State = Mapping[str, Stored]
IGNORED = (".inv_freq", "rope.freqs", "._extra_state")


class Where(NamedTuple):
    """The tensor in the files, and the rows of a rank's share of it that are wanted."""

    name: str
    rows: Callable[[Tensor], Tensor]


def all_rows(share: Tensor) -> Tensor:
    return share


class Grid(Foreign):
    """``states[pp][tp]``: the tensors of a rank."""

    states: list[list[State]]
    repeats_heads: bool = False

    @property
    def tensor_degree(self) -> int:
        return len(self.states[0])

    @abstractmethod
    def places(self, name: str) -> Iterator[Where]:
        """Where a Hub tensor may lie: the first place that exists counts."""

    def share(self, stage: int, rank: int, name: str, kind: str) -> Tensor:
        """A rank's share of a tensor of the files; formats with optimizer state know more kinds."""
        return self.states[stage][rank][name].load()

    def find(self, name: str) -> tuple[int, Where]:
        """The stage and place of a Hub tensor; CheckpointError where there is none."""
        for where in self.places(name):
            for stage, ranks in enumerate(self.states):
                if where.name in ranks[0]:
                    for rank, state in enumerate(ranks):
                        if where.name not in state:
                            raise CheckpointError(
                                f"{self.folder}: rank {rank} of stage {stage} has no {where.name}, "
                                "rank 0 has; copy the folder anew"
                            )
                    return stage, where
        raise self.missing(name)

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        stage, where = self.find(name)
        return self.states[stage][0][where.name].dtype

    def join(self, name: str, kind: str) -> Tensor:
        stage, where = self.find(name)
        how = self.cuts[name]
        if isinstance(how, Replica):
            return where.rows(self.share(stage, 0, where.name, kind))
        shares = [self.share(stage, rank, where.name, kind) for rank in range(self.tensor_degree)]
        (block,) = how.blocks
        try:
            joined = torch.cat([where.rows(share) for share in shares], self.cut_dim(name, how))
            if block.pad:
                return joined[: block.size]
            if ".self_attn." in name and (copies := self.copies(name)) > 1:
                return self.without_copies(joined, name, how.dim, copies)
        except (RuntimeError, IndexError, TypeError):
            raise self.unfit(where.name) from None
        return joined

    def cut_dim(self, name: str, how: Shard) -> int:
        """The dim along which the ranks' shares of a Hub tensor are joined."""
        return how.dim

    def without_copies(self, joined: Tensor, name: str, dim: int, copies: int) -> Tensor:
        """Heads in the model's order, each once."""
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            return joined[: len(joined) // copies]
        back = torch.tensor(query_order(self.model, copies)).argsort()
        heads: Tensor = joined.unflatten(dim, (len(back), -1))
        return heads.index_select(dim, back).flatten(dim, dim + 1)

    def copies(self, name: str) -> int:
        """How often the key/value heads of a tensor's layer are repeated over the ranks."""
        layer = name.rpartition(".self_attn.")[0]
        stage, where = self.find(f"{layer}.self_attn.k_proj.weight")
        shape = self.states[stage][0][where.name].shape
        try:
            rows = len(where.rows(torch.empty(shape, device="meta"))) * self.tensor_degree
        except (RuntimeError, IndexError, TypeError):
            raise self.unfit(where.name) from None
        model = self.model
        copies, over = divmod(rows, model.num_key_value_heads * model.head_dim)
        groups = model.num_key_value_heads * copies
        if over or not copies or model.num_attention_heads % groups:
            raise self.unfit(where.name)
        if copies > 1 and not self.repeats_heads:
            raise CheckpointError(
                f"{self.folder}: {where.name} repeats key/value heads {copies} times, in an order "
                "that llamax does not know; save it with fewer tensor ranks"
            )
        return copies

    def unfit(self, name: str) -> CheckpointError:
        shapes = [
            str(list(state[name].shape))
            for ranks in self.states
            for state in ranks
            if name in state
        ]
        return CheckpointError(
            f"{self.folder}: {name} of shape {', '.join(dict.fromkeys(shapes))} on "
            f"{self.tensor_degree} tensor ranks is no part of this model; give the configuration "
            "of this very model with `config`"
        )

    def nothing_left(self) -> None:
        """Raise CheckpointError for a tensor in the files that no Hub tensor is made of."""
        used = {self.find(name)[1].name for name in self.shapes}
        if self.model.tie_word_embeddings:
            used.update(where.name for where in self.places("lm_head.weight"))
        for ranks in self.states:
            for name in ranks[0]:
                if name not in used and not name.endswith(IGNORED):
                    raise CheckpointError(
                        f"{self.folder} has {name[:80]}, which llamax does not know; it reads "
                        "Llamas, and needs the configuration of this very one"
                    )


def query_order(model: ModelConfig, copies: int) -> list[int]:
    """Which query head stands where, when key/value heads are repeated ``copies`` times."""
    kv_heads = model.num_key_value_heads
    group = model.num_attention_heads // kv_heads
    each = group // copies
    return [
        kv * group + copy * each + i
        for copy in range(copies)
        for kv in range(kv_heads)
        for i in range(each)
    ]


def stacked(sizes: Callable[[int], list[int]], part: int) -> Callable[[Tensor], Tensor]:
    """Rows of one of several matrices that a share stacks; ``sizes``: their rows, of so many."""
    return lambda share: share.split(sizes(len(share)))[part]


def halves(rows: int) -> list[int]:
    """Two matrices of the same height."""
    return [rows // 2, rows - rows // 2]
