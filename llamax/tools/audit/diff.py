"""Where two programs part, and the Python line that made them.

Two ranks, or two steps, that trace different programs do so because one instruction is there that
should not be: a constant that should be an input, state that is made in the first step.  It is the
first instruction of one program, by what it does and where it comes from, that the other lacks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest

from llamax.tools.audit.hlo import Instruction, Program


@dataclass(frozen=True)
class Difference:
    """The first instruction of each program that the other lacks; None where it lacks none."""

    mine: Instruction | None
    theirs: Instruction | None


def difference(mine: Program, theirs: Program) -> Difference | None:
    """How ``theirs`` differs from ``mine``; None where they are the same program."""
    if mine.normal == theirs.normal:
        return None
    here, there = _lacking(mine, theirs), _lacking(theirs, mine)
    if here is None and there is None:  # the same instructions, wired otherwise
        pairs = zip_longest(_lines(mine), _lines(theirs))
        at = next((n for n, (a, b) in enumerate(pairs) if a != b), 0)
        here, there = (
            each.instructions[at] if at < len(each.instructions) else None
            for each in (mine, theirs)
        )
    return Difference(here, there)


def describe(each: Instruction | None) -> str:
    """``f32[] constant(3) at model.py:7``: what an instruction is, and the line that made it."""
    if each is None:
        return "nothing"
    literal = f"({each.literal[:40]})" if each.opcode == "constant" else ""
    what = f"{each.shape} {each.opcode}{literal}" if each.shapes else each.opcode
    return f"{what} at {each.source}" if each.source else what


def _lacking(program: Program, other: Program) -> Instruction | None:
    left = Counter(map(_signature, other.instructions))
    for each in program.instructions:
        if each.opcode == "tuple":  # the list of outputs follows from the rest
            continue
        if not left[_signature(each)]:
            return each
        left[_signature(each)] -= 1
    return None


def _signature(each: Instruction) -> tuple[object, ...]:
    literal = each.literal if each.opcode == "constant" else ""
    attributes = each.attributes.partition("to_apply")[0]
    return each.opcode, each.shapes, attributes, literal, each.source


def _lines(program: Program) -> list[str]:
    return program.normal.partition("ENTRY ")[2].splitlines()[1:]
