"""The frozen base of QLoRA: quantised as it is loaded, cut by tp, sharded over the data ranks.

::

    file ── one tensor at a time ──> scales of the whole ──> the tensor rank's share, quantised
                                                              │ its bytes in flat order
                                     data rank 0  [ run ]<────┼────>[ run ]  data rank 1
                                                              │
    used  <── dense share, for one product ── gather ─────────┘

Blocks and scales are those of the whole tensor, so every mesh computes with the same weights.
Where a rank's columns begin or end inside a block of nf4, both neighbours keep its scale: scales
are kept per ``gcd(columns, 64)`` columns.  A layer is gathered and made dense when it is used, in
forward and again in backward, and never kept, so no rank holds more than one dense layer.

Bytes a rank holds for a projection of R x C weights, over t tensor and d data ranks::

    nf4    R C / (2 t d)   levels          R C s / (g t d)   scales, g = gcd(C / t, 64) or 64
           R C / 4096      scales of scales, in fp32, where s is 1 byte (double) and not 4
    int8   R C / (t d)     integers        4 R               scales

Embeddings, norms and the output projection are not quantised, as in Dettmers et al. 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, gcd
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llamax.backends.transfer import moved
from llamax.config.constants import NF4_BLOCK_SCALES, NF4_BLOCK_WEIGHTS
from llamax.config.model import ModelConfig
from llamax.config.schema import FinetuneConfig
from llamax.model import quantize
from llamax.model.llama import Llama
from llamax.model.lora import Linear
from llamax.model.lora_linear import FrozenLinear
from llamax.parallel.collectives import Axis, Solo
from llamax.parallel.fsdp import FsdpTensor
from llamax.parallel.sharding import Part, Shard, ShardedParameters, parts, span

AT_ONCE = 4 * 2**20  # weights quantised at once: bounds the float32 copies


class Weights(Protocol):
    """Whole tensors by their Hub names."""

    def read(self, name: str) -> Tensor: ...


class Shapes:
    """The shapes of a model's weights, as tensors on the meta device."""

    def __init__(self, parameters: ShardedParameters) -> None:
        self.whole = parameters.hub_shapes()

    def read(self, name: str) -> Tensor:
        return torch.empty(self.whole[name], device="meta")


class Share(NamedTuple):
    """This tensor rank's rows and columns of a projection, counted in the whole."""

    row: int
    rows: int
    column: int
    columns: int

    @property
    def grain(self) -> int:
        """Columns that share a scale on every rank."""
        return gcd(self.columns, NF4_BLOCK_WEIGHTS)


def share_of(part: Part, shape: tuple[int, ...], degree: int, rank: int) -> Share:
    """The share of a projection of ``shape`` that tensor rank ``rank`` of ``degree`` holds."""
    assert isinstance(part.how, Shard)
    start, length, _ = span(part.how.blocks[0], degree, rank)
    if part.how.dim == 0:
        return Share(start, length, 0, shape[1])
    return Share(0, shape[0], start, length)


class Nf4:
    """The projections of a layer in 4 bits; a ``Store`` of ``llamax.model.lora_linear``."""

    def __init__(
        self,
        layer: Linear,
        hub_parts: list[Part],
        source: Weights,
        like: Tensor,
        data: Axis,
        nested: bool,
    ) -> None:
        self.tp, self.dtype, self.nested = layer.tp, like.dtype, nested
        self.parts, self.shares, self.blocks_in_row = hub_parts, [], []
        self.scale_of_scales: list[tuple[Tensor, Tensor]] = []
        codes, scales = [], []
        for part in hub_parts:
            weight = source.read(part.name).to(like.dtype)
            share = share_of(part, tuple(weight.shape), self.tp.size, self.tp.rank)
            whole = torch.cat([quantize.block_scales(rows) for rows in weight.split(_rows(weight))])
            codes.append(_packed(weight, whole, share))
            kept = whole
            if nested:
                kept, above, mean = quantize.nest(whole)
                mean = mean.view(1)  # tracing devices make a constant of a scalar that is 0 or 1
                self.scale_of_scales.append((above.to(like.device), mean.to(like.device)))
            block = torch.arange(share.column, share.column + share.columns, share.grain)
            scales.append(kept[share.row : share.row + share.rows][:, block // NF4_BLOCK_WEIGHTS])
            self.shares.append(share)
            self.blocks_in_row.append(whole.shape[1])
        self.codes = FsdpTensor.joined(codes, data, like.device)
        self.scales = FsdpTensor.joined(scales, data, like.device)

    def weight(self) -> Tensor:
        """The layer's weight on this tensor rank, dense: [f, D]."""
        codes, scales, dense = self.codes.gather(), self.scales.gather(), []
        for number, share in enumerate(self.shares):
            count = share.rows * share.columns
            packed, codes = codes[: count // 2], codes[count // 2 :]
            part_scales, scales = scales[: count // share.grain], scales[count // share.grain :]
            part_scales = part_scales.view(share.rows, -1)
            if self.nested:
                above, mean = self.scale_of_scales[number]
                part_scales = quantize.unnest(part_scales, above[self._places(number)], mean)
            levels = packed.view(share.rows, -1)
            dense.append(quantize.from_levels(levels, part_scales, self.dtype))
        return torch.cat(dense)

    def _places(self, number: int) -> Tensor:
        """Which scale of scales belongs to each scale: [rows, n].

        The rank enters as a tensor, so that every rank traces the same graph.
        """
        share, how, tp = self.shares[number], self.parts[number].how, self.tp
        assert isinstance(how, Shard)
        index = tp.rank_index.to(torch.int32)
        row, column = index * 0, index * share.columns
        if how.dim == 0:
            (block,) = how.blocks
            row, column = index * (block.size // block.unit) // tp.size * block.unit, index * 0
        rows = row + torch.arange(share.rows, dtype=torch.int32, device=index.device)
        within = torch.arange(0, share.columns, share.grain, dtype=torch.int32, device=index.device)
        blocks = (
            rows.unsqueeze(1) * self.blocks_in_row[number] + (column + within) // NF4_BLOCK_WEIGHTS
        )
        return blocks // NF4_BLOCK_SCALES

    def to(self, device: torch.device) -> None:
        """Move the tensors of this rank to ``device``."""
        self.codes.local, self.scales.local = (
            moved(tensor.local, device) for tensor in (self.codes, self.scales)
        )
        self.scale_of_scales = [
            (moved(above, device), moved(mean, device)) for above, mean in self.scale_of_scales
        ]

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that this rank holds."""
        yield from (self.codes.local, self.scales.local)
        for pair in self.scale_of_scales:
            yield from pair


class Int8:
    """The projections of a layer in 8 bits; a ``Store`` of ``llamax.model.lora_linear``."""

    def __init__(
        self, layer: Linear, hub_parts: list[Part], source: Weights, like: Tensor, data: Axis
    ) -> None:
        self.dtype, self.columns = like.dtype, 0
        codes, scales = [], []
        for part in hub_parts:
            weight = source.read(part.name).to(like.dtype)
            share = share_of(part, tuple(weight.shape), layer.tp.size, layer.tp.rank)
            rows = slice(share.row, share.row + share.rows)
            scales.append(quantize.row_scales(weight)[rows])
            cut = weight[rows, share.column : share.column + share.columns]
            codes.append(quantize.to_int8(cut, scales[-1]))
            self.columns = share.columns
        self.codes = FsdpTensor.joined(codes, data, like.device)
        self.scales = torch.cat(scales).to(like.device)

    def weight(self) -> Tensor:
        """The layer's weight on this tensor rank, dense: [f, D]."""
        codes = self.codes.gather().view(-1, self.columns)
        return quantize.from_int8(codes, self.scales, self.dtype)

    def to(self, device: torch.device) -> None:
        """Move the tensors of this rank to ``device``."""
        self.codes.local = moved(self.codes.local, device)
        self.scales = moved(self.scales, device)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that this rank holds."""
        yield from (self.codes.local, self.scales)


def _rows(weight: Tensor) -> int:
    return max(1, AT_ONCE // weight.shape[1])


def _packed(weight: Tensor, scales: Tensor, share: Share) -> Tensor:
    """The 4-bit levels of a share of a whole weight, packed: [rows, columns / 2]."""
    rows = slice(share.row, share.row + share.rows)
    each = _rows(weight)
    found = [
        quantize.pack(quantize.to_levels(w, s)[:, share.column : share.column + share.columns])
        for w, s in zip(weight[rows].split(each), scales[rows].split(each), strict=True)
    ]
    return torch.cat(found)


def store_weights(
    name: str, layer: Linear, source: Weights, finetune: FinetuneConfig, like: Tensor, data: Axis
) -> Nf4 | Int8:
    """Quantise the weight ``name`` of a layer from a source, cut over the ranks of ``data``.

    ``like`` has the dtype of computation, which weights are rounded to first, and the device.
    """
    data = data if finetune.shard_base else Solo(data.name)
    hub_parts = list(parts(name, layer.shard, layer.tp.size))
    if finetune.quant == "nf4":
        return Nf4(layer, hub_parts, source, like, data, finetune.double_quant)
    return Int8(layer, hub_parts, source, like, data)


def stores(model: Llama) -> Iterator[Nf4 | Int8]:
    """The quantised layers of a model."""
    for layer in model.modules():
        if isinstance(layer, FrozenLinear) and isinstance(layer.store, (Nf4, Int8)):
            yield layer.store


# --- memory --------------------------------------------------------------------------------------


class Bytes(NamedTuple):
    """Bytes of a base on one rank: quantised layers, other weights, and one dense layer in use."""

    quantised: int
    plain: int
    dense: int


def expected(
    model: ModelConfig, finetune: FinetuneConfig, tensor: int, data: int, itemsize: int
) -> Bytes:
    """The bytes of a base by the formula above, with padding.

    ``itemsize`` is that of the dtype of computation.
    """
    D, E, F = model.hidden_size, model.head_dim, model.intermediate_size
    H, K = model.num_attention_heads * E, model.num_key_value_heads * E
    kv, f = ((max(K // tensor, E), D), (K, D)), ((F // tensor, D), (F, D))
    layers = (  # (rows, columns) of this rank's share, and of the whole, of each projection
        [((H // tensor, D), (H, D)), kv, kv],
        [((D, H // tensor), (D, H))],
        [f, f],
        [((D, F // tensor), (D, F))],
    )
    data = data if finetune.shard_base else 1
    quantised = dense = 0
    for layer in layers:
        weights = sum(rows * columns for (rows, columns), _ in layer)
        dense = max(dense, weights * itemsize)
        if finetune.quant == "int8":
            quantised += ceil(weights / data) + 4 * sum(rows for (rows, _), _ in layer)
            continue
        scales = sum(
            rows * columns // gcd(columns, NF4_BLOCK_WEIGHTS) for (rows, columns), _ in layer
        )
        quantised += ceil(weights // 2 / data)
        quantised += ceil(scales / data) * (1 if finetune.double_quant else 4)
        if finetune.double_quant:
            blocks = [rows * columns // NF4_BLOCK_WEIGHTS for _, (rows, columns) in layer]
            quantised += sum(4 * ceil(n / NF4_BLOCK_SCALES) + 4 for n in blocks)
    rows = ceil(model.vocab_size / tensor) * (1 if model.tie_word_embeddings else 2)
    norms = 2 * model.num_hidden_layers + 1
    return Bytes(model.num_hidden_layers * quantised, (rows + norms) * D * itemsize, dense)


def held(model: Llama) -> tuple[int, int]:
    """The bytes of the base that this rank holds: quantised weights, and other frozen weights."""
    quantised = sum(tensor.nbytes for store in stores(model) for tensor in store.tensors())
    return quantised, sum(p.nbytes for p in model.parameters() if not p.requires_grad)
