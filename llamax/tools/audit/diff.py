"""The difference between two programs, and the Python line that made it.

Two ranks, or two steps, trace different programs because of one instruction: a constant that should
be an input, or state that is made in the first step.  The difference is the first instruction of
each program, by what it does and where it comes from, that the other program lacks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest

from llamax.tools.audit.hlo import Instruction, Program


@dataclass(frozen=True)
class Difference:
    """The first instruction of each program that the other lacks; None if it lacks none."""

    expected: Instruction | None
    found: Instruction | None


def difference(expected: Program, found: Program) -> Difference | None:
    """The difference of ``found`` from ``expected``; None where they are the same program."""
    if expected.normal == found.normal:
        return None
    removed, added = _only_in(expected, found), _only_in(found, expected)
    if removed is None and added is None:  # the same instructions with other operands
        pairs = zip_longest(_lines(expected), _lines(found))
        at = next((n for n, (a, b) in enumerate(pairs) if a != b), 0)
        removed, added = (
            program.instructions[at] if at < len(program.instructions) else None
            for program in (expected, found)
        )
    return Difference(removed, added)


def describe(instruction: Instruction | None) -> str:
    """``f32[] constant(3) at model.py:7``: shape, operation, and the line that made it."""
    if instruction is None:
        return "nothing"
    literal = f"({instruction.literal[:40]})" if instruction.opcode == "constant" else ""
    text = (
        f"{instruction.shape} {instruction.opcode}{literal}"
        if instruction.shapes
        else instruction.opcode
    )
    return f"{text} at {instruction.source}" if instruction.source else text


def _only_in(program: Program, other: Program) -> Instruction | None:
    """The first instruction of ``program`` that ``other`` lacks."""
    left = Counter(map(_signature, other.instructions))
    for instruction in program.instructions:
        if instruction.opcode == "tuple":  # the list of outputs follows from the rest
            continue
        if not left[_signature(instruction)]:
            return instruction
        left[_signature(instruction)] -= 1
    return None


def _signature(instruction: Instruction) -> tuple[object, ...]:
    literal = instruction.literal if instruction.opcode == "constant" else ""
    attributes = instruction.attributes.partition("to_apply")[0]
    return instruction.opcode, instruction.shapes, attributes, literal, instruction.source


def _lines(program: Program) -> list[str]:
    return program.normal.partition("ENTRY ")[2].splitlines()[1:]
