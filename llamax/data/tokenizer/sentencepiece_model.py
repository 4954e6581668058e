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
        for number, value in _fields(raw):
            if not isinstance(value, bytes):
                continue
            if number == 1:
                end = value[1] + 2 if len(value) > 1 else 0
                if len(value) == end + 5 and end < 130 and value[0] == 10 and value[end] == 0x15:
                    # the usual piece, read at once: field 1, its text, and field 2, its score
                    score = struct.unpack_from("<f", value, end + 1)[0]
                    pieces.append((value[2:end].decode(), score, NORMAL))
                    continue
                piece = dict(_fields(value))
                text, raw_score = piece.get(1, b""), piece.get(2, bytes(4))
                if not (isinstance(text, bytes) and isinstance(raw_score, bytes)):
                    raise ValueError("a piece without text")
                kind = int(piece.get(3, NORMAL))
                pieces.append((text.decode(), struct.unpack("<f", raw_score)[0], kind))
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


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: an int for a varint, the bytes for anything else."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(raw, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(raw, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(raw):
            raise ValueError("cut short")
        yield key >> 3, raw[at : at + size]
        at += size


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
