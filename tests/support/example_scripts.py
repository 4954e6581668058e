"""The scripts of examples/, as modules."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def script(name: str, file: str) -> ModuleType:
    """The Python file of an example, as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{file}", EXAMPLES / name / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
