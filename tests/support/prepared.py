"""Runs of ``llamax prepare``, and what they wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llamax.cli.prepare import main
from llamax.data.token_file import TokenFile
from support.corpora import python_sources


def run(out: Path, *args: object) -> dict[str, bytes]:
    """Prepare, and what is in the folder then."""
    assert main([*map(str, args), "--out", str(out)]) == 0
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def documents(file: TokenFile) -> list[list[int]]:
    return [part.tolist() for part in np.split(file.tokens, file.documents[1:-1].astype(int))]


def text_folder(folder: Path) -> Path:
    """A folder of 40 text files in two levels, and things that are not meant."""
    (folder / "deep").mkdir(parents=True)
    for i, source in enumerate(python_sources(40)):
        (folder / ("deep" if i % 2 else ".") / f"{i:02}.py").write_text(source, encoding="utf-8")
    (folder / "image.png").write_bytes(b"\x89PNG\0")
    (folder / ".hidden.py").write_bytes(b"\xff")
    return folder
