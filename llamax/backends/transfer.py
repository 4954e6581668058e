"""Moves tensors and parameters between the host and a device."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor
from torch.nn import Parameter


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on ``device``; zeros for a meta tensor, which is but a shape."""
    if x.is_meta:  # cloned, because zeros are written in place, and see put
        return torch.zeros(x.shape, dtype=x.dtype, device=device).clone()
    return x.to(device, copy=True)


def move_parameter(parameter: Parameter, device: torch.device | str) -> None:
    """Move ``parameter`` in place, without its hooks, so that whoever holds it has it there."""
    there = Parameter(moved(parameter.detach(), device), parameter.requires_grad)
    torch.utils.swap_tensors(parameter, there)
    parameter._post_accumulate_grad_hooks = OrderedDict()  # torch keeps those of the old tensor
