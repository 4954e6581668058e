"""The tokenizer that ``prepare`` trains on its inputs, kept so that a second run has the same."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from llamax.data.dataset import read_index
from llamax.data.prepare.chunks import Chunk, Settings, disk_space
from llamax.data.prepare.instruction_rows import InstructSettings, RowChunk, training_texts
from llamax.data.prepare.long_text import lines_of
from llamax.data.prepare.text_chunks import TextChunk, TextSettings, split_documents
from llamax.data.tokenizer.train import train_sentencepiece
from llamax.runtime.errors import DataError
from llamax.runtime.logging import logger
from llamax.runtime.progress import reported


def own_tokenizer(chunks: Sequence[Chunk], settings: Settings, pieces: int, folder: Path) -> Path:
    """The path of a tokenizer trained on the training split, in ``folder`` or made before."""
    names = [settings.name(pieces, chunk) for chunk in chunks]
    name = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    out, path = folder.parent, folder / f"{name}.model"
    if (out / "dataset.json").exists():
        if read_index(out / "dataset.json").get("trained") == name:
            return out / "tokenizer.model"
        raise DataError(
            f"{out}: holds another dataset, with another tokenizer; choose another `out`, or "
            "remove that folder"
        )
    if not path.exists():
        logger.info("training a tokenizer of %d pieces", pieces)
        with disk_space(folder, 2**20), reported("training a tokenizer"):
            train_sentencepiece(_training_texts(chunks, settings), pieces, path)
    return path


def _training_texts(chunks: Sequence[Chunk], settings: Settings) -> Iterable[str]:
    """The texts of the training split."""
    if isinstance(settings, InstructSettings):
        rows = (chunk for chunk in chunks if isinstance(chunk, RowChunk))
        return chain.from_iterable(training_texts(chunk, settings) for chunk in rows)
    assert isinstance(settings, TextSettings)
    text_chunks = (
        chunk for chunk in chunks if isinstance(chunk, TextChunk) and chunk.split in ("", "train")
    )
    found = chain.from_iterable(
        split_documents(chunk, settings, Counter()) for chunk in text_chunks
    )
    return chain.from_iterable(lines_of(text) for text, held_out in found if not held_out)
