"""A reader of sentencepiece's ``tokenizer.model``: its pieces and settings.

The file is a protocol buffer.  sentencepiece's Python module does not expose all of it without the
protobuf package, and the few fields needed here are read in thirty lines.
Field numbers: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llamax.runtime.json_reader import read_object

BPE = 2
SCORE = struct.Struct("<f")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class SentencePieceModel:
    """The content of a tokenizer.model: ``pieces`` are (text, score, kind) by id.

    ``rewrites``: text is normalized before encoding; ``drops_spaces``: extra spaces are removed;
    ``spaces_behind``: a space ends a piece instead of beginning it; ``dummy_prefix``: a space is
    put before every text.
    """

    raw: bytes
    pieces: list[tuple[str, float, int]]
    kind: int
    rewrites: bool
    drops_spaces: bool
    spaces_behind: bool
    dummy_prefix: bool

    @classmethod
    def from_bytes(cls, raw: bytes) -> SentencePieceModel:
        """The model in these bytes; IndexError, ValueError or struct.error if they are not one."""
        pieces: list[tuple[str, float, int]] = []
        trainer: dict[int, int | bytes] = {}
        normalizer: dict[int, int | bytes] = {}
        at = _read_usual(raw, 0, pieces)
        while at < len(raw):
            number, value, at = _field(raw, at)
            if not isinstance(value, bytes):
                continue
            if number == 1:
                piece = dict(_fields(value))
                text, raw_score = piece.get(1, b""), piece.get(2, bytes(4))
                if not (isinstance(text, bytes) and isinstance(raw_score, bytes)):
                    raise ValueError("a piece without text")
                kind = int(piece.get(3, NORMAL))
                pieces.append((text.decode(), struct.unpack("<f", raw_score)[0], kind))
                at = _read_usual(raw, at, pieces)
            elif number == 2:
                trainer.update(_fields(value))
            elif number == 3:
                normalizer.update(_fields(value))
        if not pieces:
            raise ValueError("it holds no pieces")
        return cls(
            raw,
            pieces,
            kind=int(trainer.get(3, 1)),
            rewrites=bool(normalizer.get(2)) or not normalizer.get(5, 1),
            drops_spaces=bool(normalizer.get(4, 1)),
            spaces_behind=bool(trainer.get(24, 0)),
            dummy_prefix=bool(normalizer.get(3, 1)),
        )


def why_not_plain(model: SentencePieceModel) -> str:
    """What makes a model other than a plain BPE over bytes, as a clause; empty for a plain one.

    Other engines compute the ids of a plain one alone.
    """
    kinds = [kind for _, _, kind in model.pieces]
    symbols = (text for text, _, kind in model.pieces if kind == USER_DEFINED)
    for fault, clause in (
        (model.kind != BPE, "is not a BPE"),
        (model.rewrites, "normalizes text"),
        (model.drops_spaces, "removes extra spaces"),
        (model.spaces_behind, "puts spaces at the end of pieces"),
        (kinds.count(BYTE) != 256, "has no bytes to fall back on"),
        (UNUSED in kinds, "has unused pieces"),
        (any(set(" ▁") & set(text) for text in symbols), "has user-defined pieces with spaces"),
    ):
        if fault:
            return clause
    return ""


def without_prefix(raw: bytes) -> bytes:
    """The bytes of the same model that puts no space before a text.

    A message that occurs twice is merged and later fields win, so it is enough to append
    ``normalizer_spec { add_dummy_prefix: false }``.
    """
    return raw + b"\x1a\x02\x18\x00"


def extends(engine_file: Path, model_file: Path) -> bool:
    """Whether a tokenizer.json has added tokens beyond the pieces of the tokenizer.model."""
    if not (engine_file.is_file() and model_file.is_file()):
        return False
    try:
        added = read_object(engine_file)["added_tokens"]
        pieces = len(SentencePieceModel.from_bytes(model_file.read_bytes()).pieces)
        return any(token["id"] >= pieces for token in added)
    except (ValueError, LookupError, TypeError, struct.error):
        return False  # load_tokenizer reports a damaged file


def _read_usual(raw: bytes, at: int, pieces: list[tuple[str, float, int]]) -> int:
    """Read pieces of a short text and a score alone, as most are, up to another one; its place."""
    last = len(raw) - 9  # bytes of such a piece without its text
    while at <= last and raw[at] == raw[at + 2] == 10 and (size := raw[at + 3]) < 121:
        end = at + 4 + size
        if raw[at + 1] != size + 7 or end > last + 4 or raw[end] != 0x15:
            break
        pieces.append((raw[at + 4 : end].decode(), SCORE.unpack_from(raw, end + 1)[0], NORMAL))
        at = end + 5
    return at


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: an int for a varint, the bytes for anything else."""
    at = 0
    while at < len(raw):
        number, value, at = _field(raw, at)
        yield number, value


def _field(raw: bytes, at: int) -> tuple[int, int | bytes, int]:
    """Number and value of the field at a place of a message, and where it ends."""
    key, at = _varint(raw, at)
    wire = key & 7
    if wire == 0:
        value, at = _varint(raw, at)
        return key >> 3, value, at
    if wire == 2:
        size, at = _varint(raw, at)
    elif wire in (1, 5):
        size = 8 if wire == 1 else 4
    else:
        raise ValueError(f"wire type {wire}")
    if at + size > len(raw):
        raise ValueError("cut short")
    return key >> 3, raw[at : at + size], at + size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    if (value := raw[at]) < 128:
        return value, at + 1
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
