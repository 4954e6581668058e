"""torch's random state, from which modules of a program's own may draw: on the host and on a GPU.

::

    state    [ the host's generator | the GPU's seed and offset, where there is a GPU ]    uint8

A run that goes on without a GPU leaves the second part out, and one that had none begins it anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

GPU_BYTES = 16


def random_state(device: torch.device) -> Tensor:
    """The state for a run on ``device``: uint8 [n] on the host."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Go on from a ``state``; RuntimeError or TypeError for one that this torch cannot read."""
    size = len(torch.get_rng_state())
    if len(state) not in (size, size + GPU_BYTES):
        raise TypeError(f"a random state of {len(state)} bytes")
    torch.set_rng_state(state[:size].clone())
    if device.type == "cuda" and len(state) > size:
        torch.cuda.set_rng_state(state[size:].clone(), device)
