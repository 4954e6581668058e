"""Two training steps at a ZeRO stage, joined from all ranks' shards, and those of one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llamax.config.model import ModelConfig
from llamax.model.recompute import Recompute
from llamax.optim.zero import Zero
from llamax.parallel import fsdp
from llamax.parallel.collectives import Axes
from support.step_reference import GLOBAL_BATCH, SEQUENCE, build, gradients, loss, share, training

TOKENS = GLOBAL_BATCH * SEQUENCE


def joined(optimizer: Zero, shard_of: Callable[[Any, Any], Tensor]) -> dict[str, Tensor]:
    """Whole tensors of this tensor rank by name, from a shard of each bucket on each data rank."""
    found: dict[str, Tensor] = {}
    for group in optimizer.groups:
        flats = {name: torch.zeros(n) for name, n in zip(group.names, group.lengths, strict=True)}
        for bucket in group.buckets:
            whole = optimizer.shard.all_gather(shard_of(group, bucket), 0)
            for member, start, stop, part in bucket.pieces:
                flats[group.names[member]][start:stop] = whole[part]
        shapes = {n: p.shape for n, p in zip(group.names, group.parameters, strict=True)}
        found |= {name: flat.view(shapes[name]) for name, flat in flats.items()}
    return found


def whole_step(model: ModelConfig) -> dict[str, Any]:
    """Loss, gradients, norm, validation loss, and weights after two steps, on one rank."""
    there = Axes.solo()
    llama = build(model, there, False).double()
    for micro in share(there, 1):
        (loss(llama, micro, there) / TOKENS).backward()
    grads = gradients(llama, there)
    llama = build(model, there, False)
    state = training(llama, there, 1)
    results = [state.step(share(there, 1), number) for number in (1, 2)]
    return {
        "loss": [float(r.loss) for r in results] + [float(state.validate([share(there, 1)]))],
        "norm": [float(r.grad_norm) for r in results],
        "grads": grads,
        "weights": {name: p.detach().clone() for name, p in llama.named_parameters()},
    }


def step(
    model: ModelConfig,
    axes: Axes,
    sequence: bool,
    accumulation: int,
    zero: int,
    bucket_bytes: int,
    recompute: Recompute,
) -> dict[str, Any]:
    llama = build(model, axes, sequence)
    llama.model.mode = recompute
    state = training(llama, axes, zero, bucket_bytes)
    for micro in share(axes, accumulation):
        with fsdp.gathered_again():
            total = loss(llama, micro, axes) / TOKENS
        total.backward()
    for group in state.optimizer.groups:
        group.gradients.finish()
    with torch.no_grad():
        grads = joined(
            state.optimizer, lambda group, bucket: state.optimizer._reduce(group, bucket)[0]
        )
    state.optimizer.zero_grad()
    results = [state.step(share(axes, accumulation), number) for number in (1, 2)]
    return {
        "loss": [float(r.loss) for r in results] + [float(state.validate([share(axes, 1)]))],
        "norm": [float(r.grad_norm) for r in results],
        "grads": grads,
        "weights": joined(state.optimizer, lambda group, bucket: bucket.weights.detach()),
    }
