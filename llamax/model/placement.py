"""Moves a model that was loaded on the host to a device that traces programs."""

from __future__ import annotations

import torch

from llamax.backends.transfer import move_parameter, moved
from llamax.model.llama import Llama
from llamax.model.qlora import stores
from llamax.parallel.fsdp import fsdp_weights
from llamax.parallel.placeholder import Placeholder


def move_model(model: Llama, device: torch.device) -> None:
    """Move what is not on ``device`` yet: parameters, quantised weights, buffers.

    Of weights cut over the data ranks only frozen ones: an optimizer moves those that it updates.
    """
    for parameter in model.parameters():
        if parameter.device != device and not isinstance(parameter, Placeholder):
            move_parameter(parameter, device)
    for store in stores(model):
        store.to(device)
    for weight in fsdp_weights(model):
        if weight.gradient is None:
            weight.local = moved(weight.local, device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, moved(buffer, device))
