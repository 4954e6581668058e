"""Modules that stand in for packages that are not installed here."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import pytest


def install_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> ModuleType:
    """A module that can be found and imported under ``name``, and the packages above it."""
    parent, _, leaf = name.rpartition(".")
    if parent and parent not in sys.modules:
        install_module(monkeypatch, parent)
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, name, module)
    if parent:
        monkeypatch.setattr(sys.modules[parent], leaf, module, raising=False)
    return module
