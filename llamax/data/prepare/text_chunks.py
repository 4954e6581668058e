"""Text as documents: which split each belongs to, and its tokens between BOS and EOS.

A long text goes through in pieces (``llamax.data.tokenizer.cuts``): memory does not grow with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from llamax.data.prepare.chunks import Encoded, header_of, part_name
from llamax.data.prepare.file_kinds import MAX_DOCUMENT
from llamax.data.prepare.long_text import (
    PIECE,
    LongText,
    Text,
    digest,
    pieces_of,
    without_end,
)
from llamax.data.prepare.row_range import RowRange
from llamax.data.prepare.text_files import Source, documents
from llamax.data.tokenizer.cuts import Ids, encode_in_pieces
from llamax.data.tokenizer.tokenizer import Tokenizer
from llamax.runtime.errors import DataError

BATCH_CHARACTERS = 2**20
LEAST_HELD_OUT = 200  # characters, of an only text


@dataclass(frozen=True)
class TextChunk:
    """A chunk of text files and rows of text.

    ``only``: one text, of which the end is held out; ``most``: bytes of the longest row, or of a
    text without a place to cut.
    """

    sources: tuple[Source | RowRange, ...]
    only: bool = False
    most: int = MAX_DOCUMENT

    unit = "B"

    @property
    def size(self) -> int:
        return sum(source.size_bytes for source in self.sources)

    @property
    def size_bytes(self) -> int:
        return self.size

    @property
    def split(self) -> str:
        """The split that the chunk is for; empty if the share for validation decides."""
        source = self.sources[0]
        return source.split if isinstance(source, RowRange) else ""

    @property
    def files(self) -> Mapping[str, str]:
        return {
            source.path: "rows" if isinstance(source, RowRange) or source.rows else "text"
            for source in self.sources
        }


@dataclass(frozen=True)
class TextSettings:
    """What decides the bytes of a dataset of text, besides the text."""

    tokenizer: str
    key: str
    validation: float
    bos: bool
    eos: bool

    def name(self, number: int, chunk: TextChunk) -> str:
        """The name of a part: equal names, equal bytes."""
        return part_name(
            number, asdict(self), [asdict(source) for source in chunk.sources], chunk.only
        )

    def encode(self, chunk: TextChunk, tokenizer: Tokenizer) -> Iterator[Encoded]:
        """The documents of a chunk, each between BOS and EOS.

        Short ones come about BATCH_CHARACTERS at a time, a long one piece by piece.
        """
        header = header_of(self, tokenizer)
        bos = np.array([] if header.bos_id is None else [header.bos_id], np.uint32)
        eos = np.array([] if header.eos_id is None else [header.eos_id], np.uint32)
        unread: Counter[str] = Counter()
        for batch in _batches(split_documents(chunk, self, unread)):
            if isinstance(batch, tuple):
                yield from _in_pieces(*batch, chunk, tokenizer, bos, eos)
                continue
            texts = [text for text, _ in batch]
            raw = [text.encode() for text in texts]
            held_out = [held for _, held in batch]
            ids = [np.concatenate([bos, body, eos]) for body in tokenizer.encode_documents(texts)]
            for split, wanted in ((chunk.split or "train", False), ("validation", True)):
                chosen = [i for i, held in enumerate(held_out) if held is wanted]
                text_bytes = sum(len(raw[i]) for i in chosen)
                yield Encoded(split, [ids[i] for i in chosen], None, text_bytes)
        yield Encoded("train", [], None, 0, unread)


def _in_pieces(
    text: Text, held_out: bool, chunk: TextChunk, tokenizer: Tokenizer, bos: Ids, eos: Ids
) -> Iterator[Encoded]:
    """A long document, piece by piece."""
    split, begin = "validation" if held_out else chunk.split or "train", bos
    try:
        for piece in encode_in_pieces(tokenizer, pieces_of(text), chunk.most):
            end = eos if piece.last else eos[:0]
            ids = np.concatenate([begin, piece.ids, end])
            yield Encoded(split, [ids], None, piece.text_bytes, more=not piece.last)
            begin = bos[:0]
    except DataError as error:
        if isinstance(text, LongText) and str(error).startswith(text.path):
            raise
        names = ", ".join(dict.fromkeys(source.path for source in chunk.sources))
        raise DataError(f"{names}: a document {error}") from None


def split_documents(
    chunk: TextChunk, settings: TextSettings, unread: Counter[str]
) -> Iterator[tuple[Text, bool]]:
    """The documents of a chunk, and whether each is held out of its split, for validation.

    Of an only text the end is a document of the validation split, from a line break or a space on.
    """
    for text in documents(chunk.sources, settings.key, unread, chunk.most):
        if chunk.only:
            parts = without_end(text, settings.validation, LEAST_HELD_OUT)
            yield from zip(parts, (False, True), strict=False)
        else:
            yield text, not chunk.split and is_validation(text, settings.validation)


def is_validation(text: Text, fraction: float) -> bool:
    """Whether a document belongs to the validation split."""
    if not fraction:
        return False
    return int.from_bytes(digest(text), "little") < fraction * 2**64


Document = tuple[Text, bool]


def _batches(texts: Iterator[Document]) -> Iterator[list[tuple[str, bool]] | Document]:
    """Texts with their splits: short ones about BATCH_CHARACTERS at a time, a long one by itself.

    Empty texts are left out.
    """
    batch: list[tuple[str, bool]] = []
    held = 0
    for text, held_out in texts:
        if isinstance(text, LongText) or len(text) > PIECE:
            yield batch
            batch, held = [], 0
            yield text, held_out
        elif text:
            batch.append((text, held_out))
            held += len(text)
        if held > BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    yield batch
