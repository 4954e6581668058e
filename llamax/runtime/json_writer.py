"""Writes JSON for programs that read what a command prints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any


def to_json(value: object, indent: int | None = 2) -> str:
    """A value as JSON in ASCII; numbers that are not finite, which JSON lacks, are null."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def plain(value: object) -> Any:
    """A value of dicts (also for named tuples), lists, texts, finite numbers and None."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(member) for key, member in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(member) for member in value]
    return str(value) if isinstance(value, PurePath) else repr(value)
