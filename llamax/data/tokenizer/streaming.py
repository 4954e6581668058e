"""Decoding while tokens are generated: ids one at a time, text in whole characters.

A character may take several ids (bytes), and the text of an id may depend on the one before it
(a leading space).  So a short window of ids is decoded twice, without and with the new ones; the
difference is the new text, unless it ends within a character::

    ids     ...  [already shown | shown last | new]
    before       decode(         shown last       )
    now          decode(         shown last | new )     new text = now[len(before):]

Text that may be the beginning of a stop text is held back until that is decided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"  # decoders write it for half a character


class Detokenizer:
    """Decodes the text after ``prompt``, up to one of ``stops``; then ``stopped`` is true."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        prompt: Sequence[int] = (),
        stops: Sequence[str] = (),
    ) -> None:
        self.stopped = False
        self._decode, self._stops = decode, stops
        self._ids = list(prompt)
        self._window, self._shown = 0, len(prompt)
        self._held = ""

    def feed(self, token: int) -> str:
        """The new text that is certain after one more token; may be empty."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(BROKEN):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return self._release(text)

    def finish(self) -> str:
        """The text held back, when no more tokens come."""
        text = self._release(self._new_text()) if not self.stopped else ""
        text, self._held, self._shown = text + self._held, "", len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._window : self._shown])
        return self._decode(self._ids[self._window :])[len(before) :]

    def _release(self, text: str) -> str:
        """The certain part of the text held back and ``text``."""
        text = self._held + text
        if met := [at for stop in self._stops if (at := text.find(stop)) >= 0]:
            self.stopped, self._held = True, ""
            return text[: min(met)]
        longest = max((len(stop) for stop in self._stops), default=0)
        open_ends = range(max(0, len(text) - longest + 1), len(text))
        cut = next((i for i in open_ends if self._begins_stop(text[i:])), len(text))
        self._held = text[cut:]
        return text[:cut]

    def _begins_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
