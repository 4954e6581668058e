"""Weights in 4 and 8 bits, in plain tensor operations with static shapes.

nf4 (Dettmers et al. 2023, "QLoRA", section 3 and appendix E) stores 64 consecutive weights of a
row as one scale, their largest magnitude, and 16 levels that are quantiles of a normal::

    byte     [ level of w0 : 4 bits | level of w1 : 4 bits ]        two weights, the first one high
    weight   LEVELS[level] * scale of its block

Double quantisation stores the scales in 8 bits too, as bitsandbytes does: less their mean, and in
blocks of 256, as one of 256 ``dynamic`` levels (Dettmers et al. 2022, "8-bit Optimizers", section
2.1) times the block's largest magnitude.  A weight then costs 4 + 8/64 + 32/(64 * 256) = 4.127
bits.  The bits and values are those of bitsandbytes.

int8 stores a row of weights as integers in +-127 times the row's largest magnitude / 127 (Dettmers
et al. 2022, "LLM.int8()", section 2.1, weights only).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from llamax.config.constants import NF4_BLOCK_SCALES, NF4_BLOCK_WEIGHTS

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
SMALLEST = 1e-38  # a block of zeros is divided by this


class Nested(NamedTuple):
    """Scales in 8 bits: ``codes`` [..], a scale per 256 of them in flat order, and their mean."""

    codes: Tensor
    scales: Tensor
    mean: Tensor


@cache
def levels(device: torch.device) -> Tensor:
    """The 16 levels of nf4, fp32."""
    return torch.tensor(LEVELS, device=device)


@cache
def pairs(device: torch.device) -> Tensor:
    """The two levels that a byte stands for: [256, 2]."""
    byte = torch.arange(256)
    of = torch.tensor(LEVELS)
    return torch.stack((of[byte >> 4], of[byte & 15]), 1).to(device)


@cache
def dynamic(device: torch.device) -> Tensor:
    """The 256 levels for scales: 2^e even steps between 10^(e-7) and 10^(e-6), e = 0 to 6, both
    signs; 0 and 1."""
    found = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = 10 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        found += [middles, -middles]
    return torch.cat(found).sort().values.to(device)


def nearest(x: Tensor, sorted_levels: Tensor) -> Tensor:
    """The index of the nearest level, the lower one half-way: [..] -> uint8 [..]."""
    middles = (sorted_levels[:-1] + sorted_levels[1:]) / 2
    return torch.bucketize(x, middles, out_int32=True).to(torch.uint8)


def block_scales(weight: Tensor) -> Tensor:
    """The largest magnitude of each block of a row: [R, C] -> [R, C / 64], fp32."""
    return weight.float().view(len(weight), -1, NF4_BLOCK_WEIGHTS).abs().amax(-1)


def to_levels(weight: Tensor, scales: Tensor) -> Tensor:
    """The level of every weight: [R, C], [R, C / 64] -> uint8 [R, C]."""
    blocks = weight.float().view(len(weight), -1, NF4_BLOCK_WEIGHTS)
    unit = (blocks * scales.clamp(min=SMALLEST).reciprocal().unsqueeze(-1)).clamp(-1, 1)
    return nearest(unit, levels(weight.device)).flatten(-2)


def pack(codes: Tensor) -> Tensor:
    """Levels two to a byte, the first in the high bits: uint8 [R, C] -> [R, C / 2]."""
    return codes[..., ::2] << 4 | codes[..., 1::2]


def nest(scales: Tensor) -> Nested:
    """Scales in 8 bits: [R, n] -> codes [R, n], [ceil(R n / 256)], []."""
    mean = scales.mean()
    flat = (scales - mean).flatten()
    short = -len(flat) % NF4_BLOCK_SCALES
    blocks = torch.nn.functional.pad(flat, (0, short)).view(-1, NF4_BLOCK_SCALES)
    largest = blocks.abs().amax(1)
    unit = (blocks * largest.clamp(min=SMALLEST).reciprocal().unsqueeze(1)).clamp(-1, 1)
    codes = nearest(unit, dynamic(scales.device)).flatten()[: len(flat)]
    return Nested(codes.view(scales.shape), largest, mean)


def unnest(codes: Tensor, scales: Tensor, mean: Tensor) -> Tensor:
    """Scales from their codes and the scale of each code's block: uint8 [..], fp32 [..] -> [..]."""
    return look_up(dynamic(codes.device), codes) * scales + mean


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """The entries of a table: [N, ..], uint8 [..] -> [.., ..]."""
    found: Tensor = table.index_select(0, codes.flatten().int()).unflatten(0, codes.shape)
    return found


def from_levels(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights: uint8 [R, C / 2], fp32 [R, n] with C / n weights a scale -> [R, C]."""
    found = look_up(pairs(packed.device), packed).flatten(-2)
    found.unflatten(-1, (scales.shape[-1], -1)).mul_(scales.unsqueeze(-1))
    return found.to(dtype)


def row_scales(weight: Tensor) -> Tensor:
    """The largest magnitude of each row: [R, C] -> [R], fp32."""
    return weight.abs().amax(1).float()


def to_int8(weight: Tensor, scales: Tensor) -> Tensor:
    """Rows as integers: [R, C], [R] -> int8 [R, C]."""
    steps = 127.0 / scales.clamp(min=SMALLEST).unsqueeze(1)
    return (weight.float() * steps).round().to(torch.int8)


def from_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights: int8 [R, C], fp32 [R] -> [R, C]."""
    return (codes * scales.unsqueeze(1) * (1 / 127)).to(dtype)
