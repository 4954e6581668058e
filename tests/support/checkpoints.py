"""Ranks of any mesh in one process: their shares of a model, and the runs that each owns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamax.checkpoint import Checkpoint, Saver, load_owned
from llamax.config.model import ModelConfig
from llamax.config.schema import CheckpointConfig
from llamax.model.llama import Llama
from llamax.optim.zero import Owned
from llamax.parallel.collectives import Axes, Solo
from llamax.parallel.sharding import Cut, ShardedParameter, ShardedParameters, cut, parts
from support.models import tiny

Wholes = dict[tuple[str, str], Tensor]  # (Hub name, kind) -> the whole tensor


class Place(Solo):
    """An axis that knows its size and rank; nobody is at its other end."""

    def __init__(self, name: str, size: int, rank: int) -> None:
        super().__init__(name)
        self.size, self.rank = size, rank


def llama(tied: bool = False, kv: int = 2, vocabulary: int = 37, layers: int = 2) -> ModelConfig:
    """A small Llama with a vocabulary size that no degree divides."""
    return tiny(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
        initializer_range=0.02,
        bos_token_id=1,
        eos_token_id=2,
    )


def wholes(model: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Wholes:
    """Random weights and moments (and, below float32, masters) of every Hub tensor."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, shape in Llama(model, device="meta").sharded_parameters().hub_shapes().items():
        for kind in kinds(dtype):
            drawn = torch.randn(shape, generator=generator)
            found[name, kind] = drawn.to(dtype) if kind == "weight" else drawn
    return found


def kinds(dtype: torch.dtype) -> tuple[str, ...]:
    narrow = () if dtype == torch.float32 else ("master",)
    return ("weight", *narrow, "exp_avg", "exp_avg_sq")


@dataclass
class Rank:
    """One rank: its axes, its shares by kind, and the runs that it owns."""

    axes: Axes
    cuts: Mapping[str, Cut]
    shares: dict[str, dict[str, Tensor]]  # kind -> parameter name -> share
    owned: list[Owned]

    @property
    def parameters(self) -> dict[str, Tensor]:
        return self.shares["weight"]

    @property
    def sharded(self) -> ShardedParameters:
        found = {n: ShardedParameter(p, self.cuts[n]) for n, p in self.parameters.items()}
        return ShardedParameters(found, self.axes.tp.size, self.axes.tp.rank)


def world(
    model: ModelConfig,
    tp: int,
    dp: int,
    zero: int,
    values: Wholes | None,
    dtype: torch.dtype = torch.float32,
) -> list[Rank]:
    """All ranks, data rank by data rank; without values they hold NaN."""
    return [
        _rank(model, Place("tp", tp, t), Place("data", dp, d), zero, values, dtype)
        for d in range(dp)
        for t in range(tp)
    ]


def _rank(
    model: ModelConfig,
    tp: Place,
    data: Place,
    zero: int,
    values: Wholes | None,
    dtype: torch.dtype,
) -> Rank:
    llama = Llama(model, tp, device="meta")
    cuts, shares = llama.sharded_parameters().cuts, {}
    for kind in kinds(dtype):
        shares[kind] = {}
        for name, parameter in llama.named_parameters():
            if values is None:
                type_ = dtype if kind == "weight" else torch.float32
                shares[kind][name] = torch.full(parameter.shape, float("nan"), dtype=type_)
            else:
                pieces = [
                    cut(values[part.name, kind], part.how, tp.size, tp.rank)
                    for part in parts(name, cuts[name], tp.size)
                ]
                shares[kind][name] = torch.cat(pieces)
    axes = Axes(tp=tp, data=data, kv=Solo("kv"), world=Solo("world"))
    owned = [run for kind in kinds(dtype) for run in _dealt(kind, shares[kind], data, zero)]
    return Rank(axes, cuts, shares, owned)


def _dealt(kind: Any, shares: dict[str, Tensor], data: Place, zero: int) -> Iterator[Owned]:
    """As ZeRO deals a flat vector of all shares: runs end where they happen to."""
    total = sum(share.numel() for share in shares.values())
    first, last = (total * (data.rank + i) // data.size for i in (0, 1)) if zero else (0, total)
    at = 0
    for name, share in shares.items():
        start, stop = max(first - at, 0), min(last - at, share.numel())
        for low, high in ((start, (start + stop) // 2), ((start + stop) // 2, stop)):
            if low < high:
                yield Owned(name, kind, low, share.view(-1)[low:high])
        at += share.numel()


def save(
    folder: Path, model: ModelConfig, ranks: list[Rank], step: int = 1, **options: Any
) -> Path:
    """Save from all ranks into ``folder``; the new checkpoint."""
    zero, config_text = options.pop("zero", True), options.pop("config_text", "[run]\n")
    savers = [
        Saver(
            folder,
            rank.axes,
            rank.sharded,
            CheckpointConfig(**options),
            zero=zero,
            timeout_s=300,
        )
        for rank in ranks
    ]
    dtype = next(iter(ranks[0].parameters.values())).dtype
    hub = model.to_hub("float32" if dtype == torch.float32 else "bfloat16")
    for index, (saver, rank) in reversed([*enumerate(zip(savers, ranks, strict=True))]):
        rng = torch.full((8,), index, dtype=torch.uint8)
        saver.save(step, rank.owned, {"consumed_sequences": 8 * step}, hub, config_text, rng)
    for saver in savers:
        saver.wait()
    return folder / f"step-{step:08d}"


def load(checkpoint: Checkpoint, ranks: list[Rank]) -> None:
    """Load the owned runs of every rank."""
    for rank in ranks:
        load_owned(checkpoint, rank.owned, rank.sharded)
