"""Plants a defect in a module or class for the length of a ``with``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    with mock.patch.object(owner, name, value):
        yield


def defect(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[], Any]:
    """Replaces an attribute by ``make(original)``, when it is called."""
    return lambda: replaced(owner, name, make(getattr(owner, name)))
