"""The cache of keys and values of a server or of compiled programs, allocated once.

::

    slot 0   a b c d e f . . . . .      row i of the batch is slot i
    slot 1   k l m . . . . . . . .      one more token: every slot writes one place
    slot 2   . . . . . . . . . . .      free

The requests in progress are in the first slots: when one ends, the last takes its slot.

Memory: 2 x layers x slots x length x key/value heads of this rank x head dim elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from llamax import ops
from llamax.config.choices import EAGER_BACKENDS
from llamax.inference.kv_cache import DecodeStep
from llamax.model.llama import Attend, Llama
from llamax.runtime.errors import ConfigError
from llamax.runtime.units import show_bytes


class KVPool:
    """Keys and values of ``slots`` sequences of up to ``length`` positions, for one model.

    On a device that compiles the first zeros are copied from the host, because they would be a
    program; without ``memory``, for a device that only traces, they are just recorded.
    ``setting``: the user's name for ``slots``.  Raises ConfigError if there is no memory for them.
    """

    def __init__(
        self,
        model: Llama,
        slots: int,
        length: int,
        memory: bool = True,
        setting: str = "slots",
    ) -> None:
        config = model.config
        heads = max(1, config.num_key_value_heads // model.tp.size)
        like = next(model.parameters())
        self.slots, self.length = slots, length
        shape = (config.num_hidden_layers, 2, slots, heads, length, config.head_dim)
        eager = like.device.type in EAGER_BACKENDS
        home = torch.device("cpu") if memory and not eager else like.device

        def zeros() -> Tensor:
            return torch.zeros(shape[2:], dtype=like.dtype, device=home).to(like.device)

        try:
            self.layers = [(zeros(), zeros()) for _ in range(shape[0])]
        except RuntimeError:  # of which torch's out-of-memory errors are a kind
            size = show_bytes(math.prod(shape) * like.element_size())
            raise ConfigError(
                f"there is no memory for a cache of {size}; use a smaller `{setting}` or `length`"
            ) from None

    @property
    def num_bytes(self) -> int:
        """The size of the cache."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def prefill(self, slots: Sequence[int], start: int = 0) -> Attend:
        """Causal attention of prompts, which fill places of their ``slots`` from ``start`` on.

        Several slots begin at 0; the rest of a prompt is computed alone.
        """
        every = list(slots) == list(range(self.slots))

        def attend(q_BShE: Tensor, k_BSkE: Tensor, v_BSkE: Tensor, layer: int) -> Tensor:
            stop = start + k_BSkE.shape[1]
            for cache, new_BSkE in zip(self.layers[layer], (k_BSkE, v_BSkE), strict=True):
                if every:
                    cache[:, :, start:stop] = new_BSkE.transpose(1, 2)
                for row, slot in enumerate(() if every else slots):
                    cache[slot, :, start:stop] = new_BSkE[row].transpose(0, 1)
            if not start:
                return ops.attention(q_BShE, k_BSkE, v_BSkE)
            (slot,) = slots
            k_1TkE, v_1TkE = (
                cache[slot : slot + 1, :, :stop].transpose(1, 2) for cache in self.layers[layer]
            )
            place_T = torch.arange(stop, device=q_BShE.device)
            mask_1ST = (place_T <= place_T[start:, None])[None]
            return ops.attention_cached(q_BShE, k_1TkE, v_1TkE, mask_1ST)  # in little memory

        return attend

    def decode(self, positions_B1: Tensor, width: int) -> Attend:
        """Attention of one new token in each of the first slots; positions lie below ``width``."""
        step, rows = DecodeStep(positions_B1, width), len(positions_B1)

        def attend(q_B1hE: Tensor, k_B1kE: Tensor, v_B1kE: Tensor, layer: int) -> Tensor:
            keys, values = (cache[:rows] for cache in self.layers[layer])
            return step(q_B1hE, k_B1kE, v_B1kE, keys, values)

        return attend

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` places of a slot to another."""
        for cache in chain(*self.layers):
            cache[target, :, :length] = cache[source, :, :length]
