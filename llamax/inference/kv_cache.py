"""The cache of keys and values: a new token costs one row of attention instead of all rows.

Token ``p`` of a prompt lies in slot ``p``, whatever else is in the batch.  Prompts are padded on
the right, so in a causal prefill no token attends to padding, and a new token takes the slot of the
first pad::

    slot        0   1   2   3   4   5          after prefill        after one step
    prompt 0    a   b   c   d   .   .          last = 3             slot 4 written
    prompt 1    a   b  pad pad  .   .          last = 1             slot 2 written, 3 unseen

A token at position ``p`` attends to slots 0 to p.  Positions are not shifted, masks ignore padding,
and each prompt gets the same result as alone.

Memory per token and layer: 2 x key/value heads of this rank x head dim elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llamax import ops
from llamax.model.llama import Attend

# The keys and the values of each layer, both contiguous [B, k, T, E].
Layers = Mapping[int, tuple[Tensor, Tensor]] | Sequence[tuple[Tensor, Tensor]]


class KVCache:
    """Keys and values of up to ``length`` positions of a batch, [B, k, length, E] per layer.

    ``prefill`` and ``decode(...)`` are arguments ``attend`` of ``Llama``.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def prefill(self, q_BShE: Tensor, k_BSkE: Tensor, v_BSkE: Tensor, layer: int) -> Tensor:
        """Causal attention of the prompts, which also fill the first slots."""
        B, S, k, E = k_BSkE.shape
        empty = k_BSkE.new_zeros(2, B, k, self.length, E)
        self.layers[layer] = keys, values = empty[0], empty[1]
        keys[:, :, :S] = k_BSkE.transpose(1, 2)
        values[:, :, :S] = v_BSkE.transpose(1, 2)
        return ops.attention(q_BShE, k_BSkE, v_BSkE)

    def decode(self, positions_B1: Tensor, width: int) -> Attend:
        """Attention of one new token per sequence at its position; all lie below ``width``."""
        step = DecodeStep(positions_B1, width)

        def attend(q_B1hE: Tensor, k_B1kE: Tensor, v_B1kE: Tensor, layer: int) -> Tensor:
            return step(q_B1hE, k_B1kE, v_B1kE, *self.layers[layer])

        return attend


class DecodeStep:
    """Puts the keys and values of one new token per sequence into a cache and attends to it.

    ``positions_B1``: the places of the new tokens, all below ``width``.
    """

    def __init__(self, positions_B1: Tensor, width: int) -> None:
        self.positions_B1, self.width = positions_B1, width
        mask_BT = visible(positions_B1, width)
        self.mask_B1T = None if mask_BT is None else mask_BT[:, None]
        self._places: Tensor | None = None  # the same for all layers

    def __call__(
        self, q_B1hE: Tensor, k_B1kE: Tensor, v_B1kE: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Attention of one layer with the contiguous cache ``keys``, ``values`` [B, k, T, E]."""
        if self._places is None:
            self._places = ops.cache_places(self.positions_B1, keys)
        ops.write_cache(keys, self._places, k_B1kE[:, 0])
        ops.write_cache(values, self._places, v_B1kE[:, 0])
        k_BTkE, v_BTkE = (x[:, :, : self.width].transpose(1, 2) for x in (keys, values))
        return ops.attention_cached(q_B1hE, k_BTkE, v_BTkE, self.mask_B1T)


def visible(positions_B1: Tensor, width: int) -> Tensor | None:
    """The places below ``width`` that each token attends to: bool [B, T]; on a CPU None if all."""
    place_T = torch.arange(width, dtype=positions_B1.dtype, device=positions_B1.device)
    mask_BT = place_T <= positions_B1
    # Without a mask attention is faster.
    return None if place_T.device.type == "cpu" and bool(mask_BT.all()) else mask_BT
