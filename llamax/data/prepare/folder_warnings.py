"""Warnings of what a folder holds, and nobody may want in the text for training.

::

    folder/train/a.jsonl, folder/test/b.jsonl     text that is to be held out
    folder/a.jsonl, folder/a.jsonl.zst            one text, packed and unpacked
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llamax.data.prepare.file_kinds import without_packing
from llamax.data.prepare.saved_dataset import PURPOSES
from llamax.runtime.logging import logger


def warn_of_files(folder: Path, files: Sequence[Path]) -> None:
    """Warn of files, all below ``folder`` and all for training, that look like others."""
    inside: dict[Path, set[str]] = {}
    for place in {file.parent for file in files} - {folder}:
        relative = place.relative_to(folder)
        for each in (relative, *relative.parents[:-1]):
            inside.setdefault(folder / each.parent, set()).add(each.name)
    for base, names in sorted(inside.items()):
        others = sorted(name for name in names if PURPOSES.get(name, "train") != "train")
        if "train" in names and others:
            logger.warning(
                "%s: the text in %s is taken for training too; give %s alone to leave it out",
                base,
                " and ".join(others),
                base / "train",
            )
    known: dict[Path, Path] = {}
    for file in files:
        other = known.setdefault(without_packing(file), file)
        if other is not file:
            logger.warning(
                "%s and %s are both taken; move one away if they hold the same", other, file
            )
