"""The text of ``llamax generate``: exact in a file or pipe, harmless on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from llamax.cli.generate import write

TEXT = "a\x1b[2J\u202eb\r\n\x07é"


class Stdout(io.TextIOWrapper):
    def __init__(self, terminal: bool, encoding: str = "utf-8") -> None:
        self.raw_bytes = io.BytesIO()
        super().__init__(self.raw_bytes, encoding=encoding, newline="")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(
    ("terminal", "encoding", "written"),
    [
        (False, "utf-8", TEXT.encode()),
        (False, "ascii", b"a\x1b[2J\\u202eb\r\n\x07\\xe9"),
        (True, "utf-8", b"a\\x1b[2J\\u202eb\\x0d\n\\x07" + "é".encode()),
    ],
)
def test_text_is_exact_unless_a_terminal_would_obey_it(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, encoding: str, written: bytes
) -> None:
    stdout = Stdout(terminal, encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    write(TEXT)
    assert stdout.raw_bytes.getvalue() == written
