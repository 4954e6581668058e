"""A sandbox for Jinja templates that come with downloaded models.

A chat template is a program.  It is rendered within four limits:

* Jinja's immutable sandbox: no private attributes, no calls that are marked unsafe, no changes to
  the values, and no loader, so no other file is read;
* products and powers are checked before they are computed (``"a" * 10**9``, ``9**9**9``);
* rendering takes at most ``CPU_S`` CPU seconds of its thread (a virtual timer interrupts it), and
  the process may grow by ``MEMORY_BYTES`` meanwhile (the address-space limit, on Linux);
* the output has at most ``OUTPUT_CHARACTERS``.

Every failure inside becomes one DataError.  Syntax and helpers are those that transformers
documents for chat templates: trimmed blocks, ``{% break %}``, ``{% generation %}``, ``tojson`` with
its arguments, ``raise_exception``, ``strftime_now``.

Source: Jinja documentation, "Sandbox"; transformers documentation, "Writing a chat template".
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from jinja2 import Environment, Template, TemplateError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llamax.runtime.errors import DataError

Result = TypeVar("Result")
CPU_S = 2.0
MEMORY_BYTES = 2**30
OUTPUT_CHARACTERS = 10_000_000
SOURCE_CHARACTERS = 1_000_000
STATM = Path("/proc/self/statm")
LARGEST = 2**53  # largest number that a template may compute
LONGEST = 1_000_000  # longest sequence that it may repeat

# Marks of the beginning and the end of an answer in the output: noncharacters of Unicode, which no
# text may hold (the Unicode Standard, section 23.7).
START, STOP = "\ufdd0", "\ufdd1"

# Marks (these two, and those of ``templates``) as ``tojson(ensure_ascii=true)`` would escape them.
ESCAPED_MARK = re.compile(r"(?<!\\)((?:\\\\)*)\\u(fdd[0-4])")
LARGEST_INDENT = 16  # characters


class Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``: puts an answer between marks."""

    tags = {"generation"}
    used = False

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        if any(map(_leaves_loop, body)):
            parser.fail("a loop is left inside {% generation %}", line)
        self.used = True
        marks = [nodes.Output([nodes.TemplateData(mark)]) for mark in (START, STOP)]
        return nodes.Scope([marks[0], *body, marks[1]]).set_lineno(line)


class Sandbox(ImmutableSandboxedEnvironment):
    """The Jinja environment of all templates."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        self.filters["tojson"] = _tojson
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            if not (abs(left) <= LARGEST and 0 <= right <= 16):
                raise SecurityError(f"{left}**{right} is too large")
        else:
            for one, other in ((left, right), (right, left)):
                if (
                    isinstance(one, int)
                    and hasattr(other, "__len__")
                    and len(other) * one > LONGEST
                ):
                    raise SecurityError(f"a sequence of {len(other)} times {one} is too long")
        found = super().call_binop(context, operator, left, right)
        if isinstance(found, int | float) and abs(found) > LARGEST:
            raise SecurityError(f"a number is above {LARGEST}")
        return found


class Program:
    """A compiled template; ``variables`` are the names it reads, ``marks``: it marks answers.

    ``keys``: names of attributes that it reads; ``texts``: its constant texts; ``where`` names it
    in messages.  Raises DataError if the source is not a template.
    """

    def __init__(self, source: str, where: str) -> None:
        self.where = where
        if len(source) > SOURCE_CHARACTERS:
            raise DataError(f"{where}: has {len(source)} characters; a template is shorter")
        self.variables, self.keys, self.texts, self.marks, self._template = self._guarded(
            partial(_compile, source)
        )

    def render(self, values: dict[str, Any]) -> str:
        """The text for ``values``; DataError if the template fails or exceeds a limit."""
        text = self._guarded(partial(self._template.render, values))
        if len(text) > OUTPUT_CHARACTERS:
            raise DataError(
                f"{self.where}: is refused: it wrote {len(text)} characters for one row, and "
                f"{OUTPUT_CHARACTERS} is the most"
            )
        return text

    def _guarded(self, work: Callable[[], Result]) -> Result:
        try:
            return _limited(work)
        except SecurityError as error:
            raise DataError(f"{self.where}: is refused: {_line(error)}") from None
        except _TooLong:
            raise DataError(
                f"{self.where}: is refused: it computed for {CPU_S:g} s on one row; templates "
                "take microseconds"
            ) from None
        except (MemoryError, RecursionError, OverflowError) as error:
            raise DataError(
                f"{self.where}: is refused: it needs too much memory ({type(error).__name__})"
            ) from None
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            at = f" (line {line})" if line else ""
            raise DataError(f"{self.where}: the template says{at}: {_line(error)}") from None
        except Exception as error:  # of any type: filters and the compiler raise many
            raise DataError(
                f"{self.where}: the template fails: {type(error).__name__}: {_line(error)}"
            ) from None


class _TooLong(BaseException):
    """The time is over; a BaseException, so no template can catch it."""


class _Limits:
    """The limits of this process.

    ``began``: since when a template works, in CPU seconds of its thread; None: none does.
    ``statm``: the open file of the size of this process; None: there is none.
    """

    active = False
    began: float | None = None
    statm: int | None = None


def _alarm(number: int, frame: FrameType | None) -> None:
    """Interrupt a template that has worked for CPU_S; for one that began later, wait on."""
    left = CPU_S if _Limits.began is None else CPU_S - (time.thread_time() - _Limits.began)
    if left <= 0:
        raise _TooLong
    signal.setitimer(signal.ITIMER_VIRTUAL, left)


@contextmanager
def limits() -> Iterator[None]:
    """Prepare the limits once for many renderings inside; each has them anew."""
    before = signal.signal(signal.SIGVTALRM, _alarm)
    try:
        if STATM.exists():
            _Limits.statm = os.open(STATM, os.O_RDONLY)
        _Limits.active = True
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:
        _Limits.active = False
        if _Limits.statm is not None:
            os.close(_Limits.statm)
        _Limits.statm = None
        signal.signal(signal.SIGVTALRM, before)


def _compile(source: str) -> tuple[frozenset[str], frozenset[str], frozenset[str], bool, Template]:
    """The names, keys and texts of a template, whether it marks answers, and the compiled one."""
    environment = Sandbox()
    tree = environment.parse(source)
    names = frozenset(meta.find_undeclared_variables(tree))
    marks = any(
        each.used for each in environment.extensions.values() if isinstance(each, Generation)
    )
    constants = (node.value for node in tree.find_all(nodes.Const))
    keys = frozenset(node.attr for node in tree.find_all(nodes.Getattr))
    texts = frozenset(value for value in constants if isinstance(value, str))
    template = Environment.from_string(environment, source)
    template.globals = dict(template.globals)  # a ChainMap, which takes long to copy
    return names, keys, texts, marks, template


def _leaves_loop(node: nodes.Node) -> bool:
    """Whether a statement leaves a loop around it."""
    if isinstance(node, nodes.For):
        return False
    children = node.iter_child_nodes()
    return isinstance(node, nodes.Break | nodes.Continue) or any(map(_leaves_loop, children))


def _limited(work: Callable[[], Result]) -> Result:
    """``work()`` with limits on the CPU seconds and the growth of this process.

    The timer may fire at any instruction up to the end of the inner block.
    """
    if not _Limits.active:
        with limits():
            return _limited(work)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        try:
            resource.setrlimit(resource.RLIMIT_AS, (_room(soft), hard))
            _Limits.began = time.thread_time()
            return work()
        finally:
            _Limits.began = None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _room(soft: int) -> int:
    """The limit on the address space: its present size and MEMORY_BYTES, at most ``soft``."""
    if _Limits.statm is None:
        return soft
    pages = int(os.pread(_Limits.statm, 64, 0).split()[0])
    room = pages * resource.getpagesize() + MEMORY_BYTES
    return room if soft == resource.RLIM_INFINITY else min(soft, room)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' ``tojson``: the arguments of ``json.dumps``, without HTML escapes."""
    size = len(indent) if isinstance(indent, str) else indent
    if size is not None and size > LARGEST_INDENT:
        raise SecurityError(f"tojson(indent={indent}) is above {LARGEST_INDENT}")
    text = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    return ESCAPED_MARK.sub(_as_mark, text) if ensure_ascii else text


def _as_mark(match: re.Match[str]) -> str:
    """The mark that an escape of JSON stands for, after the escaped backslashes before it."""
    return match[1] + chr(int(match[2], 16))


def _refuse(message: str) -> str:
    raise TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
