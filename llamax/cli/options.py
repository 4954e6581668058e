"""What the commands share: option names in messages, FIELD=COLUMN, sizes."""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any, NoReturn

from llamax.config.choices import EAGER_BACKENDS, MODEL_DTYPES, QUANTIZED
from llamax.runtime.errors import ConfigError, LlamaxError
from llamax.runtime.units import read_bytes

Main = Callable[[Sequence[str]], int]

THREADS = "per rank; default: OMP_NUM_THREADS, or a share of the cores"
PARAMETER = re.compile(r"`([a-z][a-z0-9_]*)(=[^`]*)?`")
# An option of other commands: the one that a command has in its place, and how to use it.
INSTEAD = {
    "--config": ("--job", 'name the recipe in a job file, recipe = "NAME", and give --job FILE'),
    "--job": ("--config", "a job file is for launch and doctor; give --config RECIPE_OR_FILE"),
}
IRREGULAR = {"fields": "field", "validation_files": "validation-file", "test_files": "test-file"}


class Parser(argparse.ArgumentParser):
    """A command line that reports a mistake in one line, with a hint where one is known."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """What argparse returns; it remembers the words for the hint of a mistake."""
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End the program with exit code 2 and one line on stderr."""
        more = f"{self.prog} --help lists the options"
        self.exit(2, f"{self.prog}: {message}; {self._hint(message) or more}\n")

    def nearest(self, word: str) -> str:
        """The option that a misspelt one is nearest to, or nothing."""
        name = word.partition("=")[0]
        return next(iter(difflib.get_close_matches(name, self._option_string_actions, 1, 0.7)), "")

    def _hint(self, message: str) -> str:
        """What to write instead of a dash, a misspelt or another command's option; or nothing."""
        words = list(itertools.takewhile(lambda word: word != "--", self._words))
        for option in {"--config", "--job"} & {*self._option_string_actions}:
            lacks = option in message or message.split()[2:3] == words[:1]  # not recognized
            if lacks and words and words[0][:1] != "-" and option not in words:
                return f"did you mean {option} {words[0]}?"
        unknown = [word for word in words if word[:1] == "-" and word[1:] and not self._knows(word)]
        value = re.match(r"argument (?:.*/)?(--?[\w-]+): expected", message)
        for option, word in itertools.pairwise(words):
            if value and option == value[1] and word in unknown:
                return f"a value that begins with - needs an equals sign: {option}={word}"
        for word in unknown:
            option, hint = INSTEAD.get(word.partition("=")[0], ("", ""))
            if option in self._option_string_actions:
                return hint
            if word.startswith("--") and (name := self.nearest(word)):
                return f"did you mean {name}?"
            if not word.startswith("--") and not message.startswith("argument "):
                return f"a name that begins with - stands last, after --: {self.prog} ... -- {word}"
        return ""

    def _knows(self, word: str) -> bool:
        """Whether a word is an option, or the start of one where that is enough."""
        name, options = word.partition("=")[0], self._option_string_actions
        return name in options or (
            self.allow_abbrev and any(option.startswith(name) for option in options)
        )


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


def add_computing(
    parser: argparse.ArgumentParser, backends: Sequence[str] = EAGER_BACKENDS
) -> None:
    """Add the options of a program that computes with a model in files."""
    parser.add_argument(
        "--dtype",
        choices=MODEL_DTYPES,
        default="",
        help="default: that of the files, with float16 as float32 except on cuda",
    )
    parser.add_argument(
        "--backend", choices=backends, default="cpu", help="device (default %(default)s)"
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZED,
        default="",
        help="linear layers in 8 bits, on the cpu (default: in --dtype)",
    )
    parser.add_argument("--threads", type=int, default=0, metavar="N", help=THREADS)


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


def pairs(option: str, given: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The names and values of an option that was repeated; ConfigError for two values of one."""
    found = dict[str, str]()
    for name, value in given:
        if found.setdefault(name, value) != value:
            raise ConfigError(f"{option} {name} is {found[name]} and {value}; give it once")
    return found


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


def batch_length(text: str) -> tuple[int, int]:
    """BATCHxLENGTH, such as 8x2048, as a pair; the type of an option."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not BATCHxLENGTH, prompts at once and tokens of each, such as 8x2048"
        )
    return int(match[1]), int(match[2])


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
