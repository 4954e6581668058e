"""Token files of documents of given lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llamax.data.header import Header
from llamax.data.token_file import TokenFile, TokenWriter


def write_token_file(path: Path, lengths: list[int], answers: int | None = 2) -> TokenFile:
    """Documents of these lengths; the last ``answers`` tokens of each count (None: no mask)."""
    random = np.random.default_rng(1)
    with TokenWriter(path, Header("", 600, eos_id=2)) as writer:
        for length in lengths:
            tokens = random.integers(3, 600, length).astype(np.uint16)
            counted = None if answers is None else np.arange(length) >= length - answers
            writer.add(tokens, np.array([length]), length, counted)
    return TokenFile(path)
