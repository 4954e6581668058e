"""Settings and measurements of a CPU: its heap, and its rate of matrix products."""

from __future__ import annotations

import ctypes
import time
from functools import cache

import torch

from llamax import ops

M_MXFAST, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = 1, -1, -3, -8  # <malloc.h>
HEAP_BYTES = (1 << 31) - 1, 32 << 20  # the largest C int; the largest that older glibc accepts
MAPPED_BYTES = 128 << 10  # size from which a bounded heap maps each block by itself


def keep_heap() -> bool:
    """Keep freed memory in the process; returns whether glibc accepted the setting.

    By default glibc maps every block above a threshold anew and unmaps it when it is freed, so the
    kernel faults in and zeroes the pages of every activation in every step: about 96,000 faults in
    a step of a 57 M parameter model, a sixth of its time.  Without the two thresholds a step reuses
    the pages of the previous one.  And without M_MXFAST small freed blocks join their neighbours at
    once: with the ends that were cut off it (``llamax.runtime.process.steady_heap``) the place of a
    freed tensor takes one of the same size again.  Other C libraries are not changed.
    """
    kept = any(_mallopt(M_MMAP_THRESHOLD, size) for size in HEAP_BYTES)
    _mallopt(M_MXFAST, 0)
    return _mallopt(M_TRIM_THRESHOLD, HEAP_BYTES[0]) and kept


def unmap_large_blocks() -> None:
    """Return freed blocks above 32 MiB to the system, after ``keep_heap``.

    For programs that gather a large weight often and drop it.  In a heap that is kept, small blocks
    that are still in use cut the room of a dropped one in two, and the heap grows by another weight
    every few steps.  Other C libraries are not changed.
    """
    _mallopt(M_MMAP_THRESHOLD, HEAP_BYTES[1])


def bound_heap() -> None:
    """Return freed blocks above 128 KiB to the system, and use one heap for all threads.

    For programs that hold much and compute little at a time; it undoes ``keep_heap``.  Other C
    libraries are not changed.
    """
    _mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    _mallopt(M_ARENA_MAX, 1)


def _mallopt(setting: int, value: int) -> bool:
    """Change a setting of glibc's heap, and return whether it took it; no other C library does."""
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(setting, value))
    except (OSError, AttributeError):
        return False


def measure_peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, as ``ops.linear`` computes it with torch's current threads.

    The best of a few products of 1024 x 1024 matrices, measured once for each number of threads.
    """
    dtype = ops.product_dtype(torch.empty(0, dtype=dtype))
    return _probe(dtype, torch.get_num_threads())


@cache
def _probe(dtype: torch.dtype, _threads: int, size: int = 1024, repeats: int = 8) -> float:
    a, b = torch.ones(2, size, size, dtype=dtype)
    out = a @ b
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
