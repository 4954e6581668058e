"""Text from tokens one at a time: whole characters, stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from llamax.data.tokenizer.streaming import Detokenizer

# --- text as it comes ----------------------------------------------------------------------------


def letters(ids: Sequence[int]) -> str:
    """A tokenizer whose ids are bytes."""
    return bytes(ids).decode("utf-8", "replace")


def test_characters_come_whole() -> None:
    text = "안녕, 세계! 🙂 ok"
    stream = Detokenizer(letters, b"prompt ")
    pieces = [stream.feed(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert stream.finish() == ""
    assert sum(map(bool, pieces)) == len(text), "each as soon as it is whole"
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_character_come_at_the_end_or_with_the_next_character() -> None:
    stream = Detokenizer(letters)
    assert [stream.feed(byte) for byte in b"a\xea\xb0"] == ["a", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    stream = Detokenizer(letters)
    assert "".join(stream.feed(byte) for byte in b"\xeab") == "\ufffdb"


@given(st.text("ab한", max_size=12), st.lists(st.text("ab한", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    stream, shown = Detokenizer(letters, stops=stops), ""
    for byte in text.encode():
        if not stream.stopped:
            shown += stream.feed(byte)
    shown += stream.finish()
    first_end = min((text.find(s) + len(s) for s in stops if s in text), default=None)
    met = [text.find(s) for s in stops if s in text and text.find(s) + len(s) == first_end]
    assert shown == (text if first_end is None else text[: min(met)])
    assert stream.stopped == (first_end is not None)
