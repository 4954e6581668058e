"""What the commands share: option names in messages, FIELD=COLUMN, sizes."""

from __future__ import annotations

import argparse
import functools
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal

from llamax.runtime.errors import LlamaxError
from llamax.runtime.units import read_bytes

Main = Callable[[Sequence[str]], int]

THREADS = "per rank; default: OMP_NUM_THREADS, or a share of the cores"
PARAMETER = re.compile(r"`([a-z][a-z0-9_]*)(=[^`]*)?`")
IRREGULAR = {"fields": "field", "validation_files": "validation-file", "test_files": "test-file"}


def command(main: Main) -> Main:
    """Decorate a command's ``main``: messages name its options.

    The library names its parameters, in backticks: "choose another `out`".  A command says the
    same of its options: "choose another --out".
    """

    @functools.wraps(main)
    def named(argv: Sequence[str]) -> int:
        try:
            return main(argv)
        except LlamaxError as error:
            error.args = (with_options(str(error)),)
            raise

    return named


def with_options(message: str) -> str:
    """A message in which each `parameter` is the option of that name.

    `max_new_tokens=8` becomes --max-new-tokens=8, `drop_empty=True` --drop-empty and
    `verify=False` --no-verify.
    """

    def option(match: re.Match[str]) -> str:
        name, value = match[1], match[2] or ""
        name = IRREGULAR.get(name, name.replace("_", "-"))
        if value == "=False":
            return f"--no-{name}"
        return f"--{name}{'' if value == '=True' else value}"

    return PARAMETER.sub(option, message)


def column(text: str) -> tuple[str, str]:
    """FIELD=COLUMN as a pair; the type of an option, so it raises what argparse reports."""
    from llamax.data.prepare.row_samples import FIELDS

    field, equals, name = text.partition("=")
    if field not in FIELDS or not equals or not name:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not FIELD=COLUMN with a field of {', '.join(FIELDS)}"
        )
    return field, name


def number(text: str) -> int:
    """A whole number, such as 300B, 1.5M, 3e11 or 15_000; the type of an option."""
    match = re.fullmatch(r"([\d_]*\.?\d+)(?:e\+?(\d{1,2})|([kmbt]))?", text.strip(), re.IGNORECASE)
    if match is not None:
        digits, exponent, suffix = match.groups()
        power = int(exponent or 0) + (3 * ("kmbt".index(suffix.lower()) + 1) if suffix else 0)
        value = Decimal(digits.replace("_", "")).scaleb(power)
        if value == int(value):
            return int(value)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number such as 2000, 300B or 3e11")


def size(text: str) -> int:
    """A size in bytes, such as 64MiB; the type of an option."""
    try:
        if (number := read_bytes(text)) >= 1:
            return number
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    raise argparse.ArgumentTypeError(f"{text!r} is below one byte")


def folded(lines: Iterable[str], column: str = "") -> Iterator[str]:
    """The lines, folded to the width of a terminal; as they are into a file or a pipe.

    A line goes on below the end of ``column``, a regular expression for its start, or four columns
    to the right of its start.
    """
    if not sys.stdout.isatty():
        yield from lines
        return
    width = shutil.get_terminal_size().columns
    for line in lines:
        found = re.match(column, line) if column else None
        left = len(line) - len(line.lstrip())
        begin, indent = left, left + 4
        if found and found.end() + 20 < width:
            begin = indent = found.end()
        yield from textwrap.wrap(
            line[begin:],
            width,
            initial_indent=line[:begin],
            subsequent_indent=" " * indent,
            drop_whitespace=True,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
