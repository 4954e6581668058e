"""Mapped files, and one line in the place of SIGBUS where such a file is cut short while in use.

The kernel sends SIGBUS to a program that reads a mapped page which its file no longer has; Python
would end without a word.  ``map_file`` therefore installs a handler in C's table of signals, since
a handler of the module ``signal`` would run only after the read, which never succeeds::

    SIGBUS at an address of a file of map_file     one line that names the file; exit code 2
    at any other address                           what was installed before, by default the end

The handler runs Python in the thread that reads, which is sound because such a read happens between
two of Python's own steps.  Linux only; elsewhere files are mapped without a handler.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from llamax.runtime.errors import DataError, LlamaxError
from llamax.runtime.text import printable_line

REMEDY = "put the whole file back and start again; a file in use is replaced by renaming a new one"
SA_SIGINFO = 4
ADDRESS = 16  # where siginfo_t has the address of the read, in bytes

# Where each map begins in memory; the size and the name of its file when it was mapped.
_maps = WeakKeyDictionary[mmap.mmap, tuple[int, int, Path]]()
_installed: list[Any] = []  # the handler, which C does not keep alive


class _Action(ctypes.Structure):
    """``struct sigaction`` of Linux on 64-bit machines."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def map_file(handle: int, path: Path, length: int = 0, offset: int = 0) -> mmap.mmap:
    """Map an open file to read; ``path`` is its name in messages.

    Raises OSError or ValueError as ``mmap.mmap`` does.
    """
    mapped = mmap.mmap(handle, length, access=mmap.ACCESS_READ, offset=offset)
    if sys.platform == "linux" and sys.maxsize > 2**32:
        start = np.frombuffer(mapped, np.uint8).ctypes.data
        _maps[mapped] = start, mapped.size(), path
        if not _installed:
            _install()
    return mapped


def check_size(mapped: mmap.mmap | bytes, path: Path) -> None:
    """Raise DataError if a mapped file was cut short since; the last page would read as zeros."""
    if isinstance(mapped, mmap.mmap) and mapped.size() < len(mapped):
        raise DataError(describe_loss(mapped.size(), len(mapped), path))


def _install() -> None:
    libc = ctypes.CDLL(None)
    before, ours = _Action(), _Action()

    def handle(number: int, info: int, context: int | None) -> None:
        address = ctypes.c_size_t.from_address(info + ADDRESS).value
        for mapped, (start, size, path) in list(_maps.items()):
            if not mapped.closed and start <= address < start + len(mapped):
                line = f"llamax: {printable_line(describe_loss(mapped.size(), size, path))}\n"
                os.write(2, line.encode(errors="backslashreplace"))
                os._exit(LlamaxError.exit_code)
        libc.sigaction(number, ctypes.byref(before), None)  # the read is repeated and meets it

    callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(handle)
    ours.handler, ours.flags = ctypes.cast(callback, ctypes.c_void_p).value, SA_SIGINFO
    _installed.append(callback)
    libc.sigaction(signal.SIGBUS, ctypes.byref(ours), ctypes.byref(before))


def describe_loss(size: int, expected: int, path: Path) -> str:
    """What happened to a mapped file that cannot be read any more, as a line; sizes in bytes."""
    if size < expected:
        return (
            f"{path}: was cut short while it was in use: it has {size} bytes of {expected}; "
            f"{REMEDY}"
        )
    return f"{path}: its disk failed while it was in use; {REMEDY}"
