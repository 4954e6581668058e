"""The bytes that an optimizer holds, counted from its tensors."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from llamax.optim import Zero


def held_bytes(zero: Zero) -> int:
    """Bytes of all distinct storages: weights, gradients, masters, moments, weights in the norm."""
    found: dict[int, int] = {}
    for group in zero.groups:
        tensors = [group.weights, group.gradient]
        for bucket in group.buckets:
            tensors += [getattr(bucket, field.name) for field in dataclasses.fields(bucket)]
        for tensor in [*tensors, *group.parameters]:
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
