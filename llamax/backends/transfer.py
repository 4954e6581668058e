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


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` from the host on ``device``; the host goes on, whatever the device still has to do.

    A GPU copies from pinned memory alone without the host, which would else wait for all work
    before it.  torch keeps that memory until the copy is done, and for the next one.
    """
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def move_parameter(parameter: Parameter, device: torch.device | str) -> None:
    """Move ``parameter`` in place, without its hooks: every reference to it follows."""
    there = Parameter(moved(parameter.detach(), device), parameter.requires_grad)
    torch.utils.swap_tensors(parameter, there)
    parameter._post_accumulate_grad_hooks = OrderedDict()  # torch keeps the old ones


def at_home(x: Tensor, offload: bool) -> Tensor:
    """``x`` where state is kept: on its device, or with ``offload`` a copy in host memory.

    The memory is pinned beside a GPU, so that copies between the two need no staging.
    """
    if not offload:
        return x
    home = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.device.type == "cuda")
    return home.copy_(x)


def settle(device: torch.device) -> None:
    """Wait for copies from ``device`` into host memory, before the host reads them."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
