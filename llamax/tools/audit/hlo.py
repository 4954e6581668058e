"""Parses HLO text into instructions: operation, operands, and the Python line that made it.

An HLO module is a list of computations; the one named ENTRY is the program.  An instruction is a
line ``%name = shape opcode(operands), attributes, metadata={... source_file= source_line=}``::

    %dot.7 = f32[8,4]{1,0} dot(f32[8,2]{1,0} %p0.1, f32[2,4]{1,0} %p1.2), lhs_contracting_dims={1}

Names are counters that differ between two traces of one program.  ``normal`` renumbers them: two
programs are the same if and only if their normal texts are equal.

Source: OpenXLA, "HLO text format" and "Operation semantics".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from math import prod

WIDTH_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
WIDTH_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "token": 0}

_COMMENT = re.compile(r"/\*.*?\*/")
_METADATA = re.compile(r",? metadata=\{[^}]*\}")
_NAME = re.compile(r"%[\w.-]+")
_SHAPE = re.compile(r"(\w+)\[([^\]]*)\](?:\{[^}]*\})?")
_LINE = re.compile(r"\s*(ROOT )?(%[\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_SOURCE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')


@dataclass(frozen=True)
class Shape:
    """Element type and dims of an array; ``dynamic``: a dim is only bounded."""

    dtype: str
    dims: tuple[int, ...]
    dynamic: bool = False

    @property
    def elements(self) -> int:
        return prod(self.dims)

    @property
    def nbytes(self) -> int:
        return WIDTH_BYTES[self.dtype] * self.elements

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of a program; the result of a tuple has several ``shapes``."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    source: str  # "path:line", or "" where it is unknown
    literal: str  # the text in the parentheses of a constant or a parameter
    root: bool

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def nbytes(self) -> int:
        return sum(shape.nbytes for shape in self.shapes)

    def ints(self, attribute: str) -> tuple[int, ...]:
        """The numbers of an attribute such as ``lhs_contracting_dims={1,2}``."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(map(int, filter(None, found.group(1).split(",")))) if found else ()

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The replica groups or the source-target pairs of a collective."""
        found = re.search(
            r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", self.attributes
        )
        rows = re.findall(r"\{([\d,]+)\}", found.group(1)) if found else []
        return tuple(tuple(map(int, row.split(","))) for row in rows)


@dataclass(frozen=True)
class Program:
    """The entry computation, operands before users, and its normal text."""

    instructions: tuple[Instruction, ...]
    normal: str

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @property
    def parameters(self) -> list[Instruction]:
        return [each for each in self.instructions if each.opcode == "parameter"]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the results."""
        root = next(each for each in self.instructions if each.root)
        return root.operands if root.opcode == "tuple" else (root.name,)


def read(text: str) -> Program:
    """The program of an HLO module; raises ValueError for any other text."""
    _, found, entry = text.partition("\nENTRY ")
    if not found:
        raise ValueError("this text has no ENTRY computation: it is not an HLO module")
    lines = _COMMENT.sub("", entry.partition("\n}")[0]).splitlines()[1:]
    return Program(tuple(_instruction(line) for line in lines if " = " in line), normal(text))


@lru_cache(maxsize=64)
def normal(text: str) -> str:
    """``text`` with renumbered names, without metadata and comments: equal for equal programs."""
    lines = []
    for line in _METADATA.sub("", _COMMENT.sub("", text)).splitlines():
        if line.startswith("HloModule") or not line.strip():
            continue
        if line.rstrip().endswith("{"):  # the head of a computation repeats its parameters
            line = ("ENTRY " if line.startswith("ENTRY") else "") + _NAME.findall(line)[0] + " {"
        lines.append(line)
    numbers: dict[str, str] = {}
    return _NAME.sub(
        lambda match: numbers.setdefault(match.group(), f"%{len(numbers)}"), "\n".join(lines)
    )


def digest(normal_text: str) -> str:
    """The sha256 of a normal text: equal for equal programs."""
    return sha256(normal_text.encode()).hexdigest()


@lru_cache(maxsize=4096)
def shapes(text: str) -> tuple[Shape, ...]:
    """Every array shape in ``text``."""
    return tuple(
        Shape(dtype, tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim), "<=" in dims)
        for dtype, dims in _SHAPE.findall(text)
        if dtype in WIDTH_BYTES
    )


def _instruction(line: str) -> Instruction:
    found = _LINE.match(line)
    if found is None:
        raise ValueError(f"this line is not an HLO instruction: {line.strip()[:80]}")
    root, name, shape, opcode, rest = found.groups()
    inside, attributes = _closed(rest)
    source = _SOURCE.search(attributes)
    return Instruction(
        name=name,
        opcode=opcode,
        shapes=shapes(shape),
        operands=tuple(_NAME.findall(inside)),
        attributes=_METADATA.sub("", attributes),
        source=":".join(source.groups()) if source else "",
        literal=inside if opcode in ("constant", "parameter") else "",
        root=root is not None,
    )


def _closed(rest: str) -> tuple[str, str]:
    """The text before and after the bracket that closes an open one."""
    depth, at = 1, -1
    while depth:
        opened, at = rest.find("(", at + 1), rest.find(")", at + 1)
        if at < 0:
            raise ValueError(f"this line does not close its operands: {rest[:80]}")
        if 0 <= opened < at:
            depth, at = depth + 1, opened
        else:
            depth -= 1
    return rest[:at], rest[at + 1 :]
