"""Ranks on the cuda backend, with gloo and CPUs in the place of nccl and GPUs.

    python -m support.cuda_ranks RANKS --config FILE --section.key=value ...

What torch.cuda knows is made up; the world, its collectives and everything else are real.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from llamax.backends import cuda
from support.fork_ranks import start


class Queue:
    """A stream, or an event, of a device that has no work left."""

    def __init__(self, *_: Any) -> None: ...

    def record(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...


def uuid(*_: Any) -> SimpleNamespace:
    return SimpleNamespace(uuid=f"GPU-{os.environ['LOCAL_RANK']}")


STAND_INS = {
    "device_count": lambda: 8,
    "set_device": lambda device: None,
    "get_device_properties": uuid,
    "get_device_name": lambda device: "NVIDIA H100 80GB HBM3",
    "current_stream": Queue,
    "Stream": Queue,
    "Event": Queue,
    "stream": lambda stream: nullcontext(),
    "max_memory_allocated": lambda device: 2**20,
}


class OnCpu(cuda.Cuda):
    """The cuda backend on a CPU."""

    collectives = "gloo"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        assert self.device.index == self.rendezvous.local_rank
        self.device = torch.device("cpu")


if __name__ == "__main__":
    for name, stand_in in STAND_INS.items():
        setattr(torch.cuda, name, stand_in)
    cuda.Cuda = OnCpu  # type: ignore[misc]
    count, *words = sys.argv[1:]
    children = [start(rank, int(count), words) for rank in range(int(count))]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(next(filter(None, codes), 0))
