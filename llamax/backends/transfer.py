"""Copies tensors and parameters between the host and a device."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor
from torch.nn import Parameter


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """A copy of ``x`` on ``device``; zeros for a meta tensor, which has only a shape."""
    if x.is_meta:  # cloned, because state is written in place
        return torch.zeros(x.shape, dtype=x.dtype, device=device).clone()
    return x.to(device, copy=True)


def move_parameter(parameter: Parameter, device: torch.device | str) -> None:
    """Move ``parameter`` in place, without its hooks: every reference to it follows."""
    there = Parameter(moved(parameter.detach(), device), parameter.requires_grad)
    torch.utils.swap_tensors(parameter, there)
    parameter._post_accumulate_grad_hooks = OrderedDict()  # torch keeps the old ones
