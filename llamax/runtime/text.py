"""Text of files and paths made safe for a terminal.

A terminal obeys control characters: what a file holds could move the cursor, change colours, set
the title of the window or answer for the user.  Everything that comes from a file, and every
path, passes through ``printable`` on its way to a terminal or a log.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import TextIO

# Control characters, halves of surrogate pairs, line and paragraph separators, and characters that
# change the direction of the text around them.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
BREAKS = "\n\t"  # harmless in text of several lines


def printable(text: str, keep: str = BREAKS) -> str:
    r"""``text`` with characters that a terminal obeys written as escapes: ``\x1b``, ``\u202e``.

    Those in ``keep`` stay; ``keep=""`` gives one line.
    """
    return UNSAFE.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def printable_line(value: object, most: int = 0) -> str:
    """A value as one line for a terminal, cut to ``most`` characters; 0: not cut."""
    text = printable(str(value), keep="")
    return f"{text[: most - 3]}..." if 0 < most < len(text) else text


def print_text(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print text that may hold parts of files or paths; ``stream``: standard output by default."""
    stream = stream or sys.stdout
    print(encodable(printable(text), stream), end=end, file=stream, flush=True)


def encodable(text: str, stream: TextIO) -> str:
    """``text`` with characters that the encoding of ``stream`` lacks written as escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def in_shell(path: str | Path) -> str:
    """A path as a word of a shell command that works in any folder: absolute, and quoted."""
    return shlex.quote(os.path.abspath(path))


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
