"""What is read of tokenizer files to speed tokenizers up, judged by protobuf and json."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

import pytest
from support.tokenizer_kinds import byte_level

from llamax.data.tokenizer.fast_settings import of_engine
from llamax.data.tokenizer.hf_tokenizer import HuggingFace, _fast_settings, members
from llamax.data.tokenizer.sentencepiece_model import SentencePieceModel

pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")


def model_of(pieces: list[tuple[str, float, int]]) -> bytes:
    """A tokenizer.model of these pieces, and fields between them."""
    raw = b""
    for number, (text, score, kind) in enumerate(pieces):
        piece = pb2.ModelProto.SentencePiece(piece=text, score=score)
        if kind != 1 or number % 11 == 10:  # the usual kind may be stated too
            piece.type = kind
        raw += pb2.ModelProto(pieces=[piece]).SerializeToString()
        if number % 13 == 12:
            raw += pb2.ModelProto(trainer_spec={"vocab_size": number}).SerializeToString()
    return raw


def test_pieces_are_those_of_protobuf() -> None:
    """Short texts are read at once; others, and other kinds, field by field."""
    rng = random.Random(0)
    lengths = [*range(1, 5), *range(115, 135), 300, 20_000]
    texts = (
        ["x" * n for n in lengths] + ["▁é한😀" * n for n in (1, 10, 11, 12, 40)] + ["\0", "\n\n"]
    )
    pieces = [(text, rng.uniform(-9, 9), rng.choice([1, 1, 1, 3, 4, 6])) for text in texts * 3]
    for shuffled in (pieces, rng.sample(pieces, len(pieces))):
        raw = model_of(shuffled)
        found = SentencePieceModel.from_bytes(raw).pieces
        theirs = pb2.ModelProto.FromString(raw).pieces
        assert found == [(each.piece, each.score, each.type) for each in theirs]


def test_a_model_that_is_cut_anywhere_is_refused_or_ends_before() -> None:
    whole = model_of([(text, -1.0, 1) for text in ("ab", "cdef", "g")])
    pieces = SentencePieceModel.from_bytes(whole).pieces
    ends = [len(model_of(pieces[:count])) for count in range(1, 4)]
    for size in range(len(whole)):
        if size in ends:
            found = SentencePieceModel.from_bytes(whole[:size]).pieces
            assert found == pieces[: ends.index(size) + 1]
            continue
        with pytest.raises((ValueError, IndexError, struct.error)):
            SentencePieceModel.from_bytes(whole[:size])


@pytest.mark.parametrize("indent", [None, 2, "\t"])
@pytest.mark.parametrize("value", [{}, {"a": 1}, {"b": {"}": '"},{'}, "c": [], "": None, "é": "x"}])
def test_members_are_those_of_json(value: dict[str, Any], indent: int | str | None) -> None:
    text = f" \n{json.dumps(value, indent=indent)}\r\n "
    found = list(members(text))
    assert {key: each for key, each, _ in found} == value
    assert all(json.loads(part) == each and part.strip() == part for _, each, part in found)


@pytest.mark.parametrize("typed", [True, False])
def test_the_fast_engine_gets_the_settings_of_the_file(typed: bool, tmp_path: Any) -> None:
    """The model as its text in the file, or written anew if it lacks its type."""
    given = json.loads(byte_level().to_str())
    if not typed:
        del given["model"]["type"]
    raw = json.dumps(given, indent=1).encode()
    (tmp_path / "tokenizer.json").write_bytes(raw)
    tokenizer = HuggingFace(tmp_path / "tokenizer.json", raw)
    settings, model = tokenizer._settings()
    assert bool(model) is typed
    text, by_class = _fast_settings(settings, model)
    assert json.loads(text) == of_engine(settings)
    assert by_class
