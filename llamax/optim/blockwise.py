"""AdamW's moments in 8 bits: block-wise dynamic quantisation (Dettmers et al. 2022, section 2).

::

    block    [ 256 numbers ]      their largest magnitude is kept in float32,
    codes    [ 256 bytes   ]      and each number, divided by it, as the nearest of 256 values

The values are dense around 0: seven powers of ten, each with more steps than the one below
(``dynamic_map``).  Blocks and values are those of bitsandbytes, whose AdamW8bit has the same bits.
A block lies in one Hub tensor, at a multiple of 256 elements from its start, so that the moments
are the same on every mesh; a cut inside a block is refused.  Tensors with fewer than 4096 elements,
or not a multiple of 256, keep 32 bits.
"""

from __future__ import annotations

from functools import cache
from math import prod

import torch
from torch import Tensor

from llamax.backends.transfer import at_home
from llamax.config.constants import STATE_BLOCK, STATE_LEAST_ELEMENTS
from llamax.parallel.sharding import Shard, ShardedParameters, whole_shape
from llamax.runtime.errors import ConfigError

# Below it products with the smallest value would lose digits; AdamW's eps makes it a zero anyway.
LEAST_ABSMAX = 1e-30


@cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of a code, ascending, from -0.993 or 0 to 1: float32 [256]."""
    found = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (power + (not signed)) + 1, dtype=torch.float32)
        means = 10 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        found += means.tolist() + ((-means).tolist() if signed else [])
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and largest magnitudes of blocks: float32 [n] -> uint8 [n], float32 [n / 256]."""
    blocks, levels = values.view(-1, STATE_BLOCK), dynamic_map(signed, values.device)
    absmax = blocks.abs().amax(1)
    absmax = torch.where(absmax >= LEAST_ABSMAX, absmax, torch.zeros_like(absmax))
    inverse = torch.where(absmax > 0, 1.0 / absmax, absmax)
    scaled = (blocks * inverse.unsqueeze(1)).clamp(-1, 1)
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8).view(-1), absmax


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The numbers of codes: uint8 [n], float32 [n / 256] -> float32 [n]."""
    values = dynamic_map(signed, codes.device).index_select(0, codes.int())
    return (values.view(-1, STATE_BLOCK) * absmax.unsqueeze(1)).view(-1)


class Blockwise:
    """``length`` numbers, at first 0, in 8 bits each; ``signed``: whether some are below 0.

    They are used on ``device``, and lie in host memory if ``offload``.
    """

    def __init__(self, length: int, signed: bool, device: torch.device, offload: bool) -> None:
        self.signed, self.device = signed, device
        codes, absmax = quantize(torch.zeros(length, device=device), signed)
        self.codes, self.absmax = at_home(codes, offload), at_home(absmax, offload)

    def values(self) -> Tensor:
        """The numbers on the device: float32 [n], a copy."""
        return dequantize(*self._fetched(), self.signed)

    def take(self, values: Tensor, accepted: Tensor) -> None:
        """Keep new numbers, unless ``accepted`` is false."""
        for kept, old, new in zip(
            (self.codes, self.absmax), self._fetched(), quantize(values, self.signed), strict=True
        ):
            kept.copy_(torch.where(accepted, new, old), non_blocking=True)

    def _fetched(self) -> tuple[Tensor, Tensor]:
        codes, absmax = (x.to(self.device, non_blocking=True) for x in (self.codes, self.absmax))
        return codes, absmax

    def exact(self) -> Tensor:
        """Numbers on the host that ``load`` takes back to the same bits: float32 [n].

        They are ``values``, but for the first code: the map has 1 and no -1, so where a block's
        largest magnitude is that of a negative number, this is it.
        """
        codes, absmax = self.codes.cpu(), self.absmax.cpu()
        values = dequantize(codes, absmax, self.signed).view(-1, STATE_BLOCK)
        if self.signed:
            rows = codes.view(-1, STATE_BLOCK)
            lowest = (rows == 0) & ~(rows == 255).any(1, keepdim=True)
            values = torch.where(lowest, -absmax.unsqueeze(1), values)
        return values.view(-1)

    def load(self, values: Tensor) -> None:
        """Take the numbers of a checkpoint: float32 [n]."""
        for kept, new in zip((self.codes, self.absmax), quantize(values, self.signed), strict=True):
            kept.copy_(new)


def bits_of(parameters: ShardedParameters, name: str) -> int:
    """The bits of a moment of a parameter: 8, or 32 for one that is not made of whole blocks.

    Raises ConfigError where the cut over tensor ranks falls into a block.
    """
    shape = parameters[name].tensor.shape
    for part in parameters.parts(name):
        elements = prod(whole_shape(part.how, shape))
        if elements < STATE_LEAST_ELEMENTS or elements % STATE_BLOCK:
            return 32
    for part in parameters.parts(name):
        if isinstance(part.how, Shard) and parameters.degree > 1:
            piece = part.length * prod(shape[part.how.dim + 1 :])
            if piece % STATE_BLOCK:
                raise ConfigError(
                    f"optim.state_bits=8 keeps moments in blocks of {STATE_BLOCK}, and "
                    f"parallel.tensor={parameters.degree} cuts {part.name} into pieces of {piece}; "
                    "use optim.state_bits=32, or fewer tensor ranks"
                )
    return 8
