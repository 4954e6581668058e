"""Text on its way to a terminal: no character that a terminal obeys."""

from __future__ import annotations

import io
import subprocess
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamax.runtime.text import encodable, in_shell, printable, printable_line


def test_controls_become_escapes_and_text_stays() -> None:
    assert printable("a\x1b[2Jb\x07\x9b1m\x7f\r") == r"a\x1b[2Jb\x07\x9b1m\x7f\x0d"
    assert printable("one\n\ttwo") == "one\n\ttwo"
    assert printable_line("one\n\ttwo") == r"one\x0a\x09two"
    assert printable("gnp.exe\u202etxt\ud800") == r"gnp.exe\u202etxt\ud800"
    for text in ("naïve 안녕 שלום", "👩‍💻 می‌خواهم", "\u3000\xa0"):  # joiners belong to words
        assert printable(text) == text


def test_a_line_is_cut() -> None:
    assert printable_line("x" * 90, 80) == "x" * 77 + "..."
    assert printable_line(["a"], 80) == "['a']"


@given(st.text())
def test_no_control_character_is_left(text: str) -> None:
    kinds = {unicodedata.category(c) for c in printable_line(text)}
    assert not kinds & {"Cc", "Cs", "Zl", "Zp"}
    assert printable(printable(text)) == printable(text)


def test_a_stream_that_lacks_characters_gets_escapes() -> None:
    ascii_stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert encodable("naïve 안", ascii_stream) == "na\\xefve \\uc548"
    assert encodable("안", io.StringIO()) == "안"


@pytest.mark.parametrize("name", ["run", "my run", "it's", "-rf", "a;b", "$HOME", "über"])
def test_a_path_in_a_hint_works_in_a_shell_of_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    command = f"cd {in_shell(name)} && pwd"
    done = subprocess.run(["sh", "-c", command], cwd="/", capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / name}\n"
