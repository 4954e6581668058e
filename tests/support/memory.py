"""Bytes that an optimizer holds, counted from its tensors, and that torch's profiler saw.

``CPU`` is the machine for which they are planned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from llamax import ops
from llamax.config.hardware import Machine
from llamax.optim import Zero

CPU = Machine(
    name="cpu",
    backend="cpu",
    ranks=4,
    memory_gib=1,
    bfloat16_tflops=1,
    float32_tflops=1,
    memory_gbps=1,
    link_gbps=1,
    dollars_per_hour=0,
    bfloat16_products=ops.has_bf16_units(),
)


def held_bytes(zero: Zero) -> int:
    """Bytes of all distinct storages: weights, gradients, masters, moments, weights in the norm."""
    found: dict[int, int] = {}
    for group in zero.groups:
        tensors = [*group.gradients.stored]
        for bucket in group.buckets:
            tensors += [getattr(bucket, field.name) for field in dataclasses.fields(bucket)]
        for tensor in [*tensors, *group.parameters]:
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def changes(found: Any) -> list[int]:
    """Bytes of every allocation (and, negative, release), in order of time."""
    events = []
    todo = list(found.profiler.kineto_results.experimental_event_tree())
    while todo:
        node = todo.pop()
        todo += node.children
        if node.name == "[memory]":
            events.append((node.start_time_ns, node.extra_fields.alloc_size))
    return [size for _, size in sorted(events, key=lambda event: event[0])]


def highest(sizes: Iterable[int], start: int = 0) -> tuple[int, int]:
    """(the highest sum on the way, the last one)."""
    top = now = start
    for size in sizes:
        now += size
        top = max(top, now)
    return top, now
