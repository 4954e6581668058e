"""A conversation that is already written as text, in the form of a template, as messages.

::

    "<usr> 안녕\\n<bot> 네.</s>\\n<usr> 누구?"  ->  user 안녕, assistant 네., user 누구?

What begins a turn is found by rendering two turns with the template: the texts before both
questions have the user's marker as their common end, those before both answers the assistant's.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import takewhile

from llamax.data.chat.jinja_sandbox import START, STOP
from llamax.data.chat.templates import SHIELD, Message, Sample, Template
from llamax.runtime.errors import DataError

WORDS = ("question1", "answer1", "question2", "answer2")
ROLES = ("user", "assistant")


def written_turns(text: str, template: Template) -> list[Message]:
    """The messages of a text; what stands before its first turn is the system text.

    Raises DataError if the template has no markers of turns, or the text none of them.
    """
    *markers, end = _markers(template)
    pattern = "|".join(re.escape(marker) for marker in sorted(markers, key=len, reverse=True))
    pieces = re.split(f"({pattern})", text)
    if len(pieces) == 1:
        raise DataError(
            f"has no turn in the form of template {template.name}, which begins with "
            f"{' or '.join(markers)}; correct it, or use the template that it is written in"
        )
    roles = dict(zip(markers, ROLES, strict=True))
    ends = {end, *(template.token(name) for name in ("bos_token", "eos_token"))} - {""}
    messages = [{"role": "system", "content": pieces[0]}]
    messages += [
        {"role": roles[marker], "content": content}
        for marker, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    for message in messages:
        message["content"] = _without(message["content"].strip(), ends)
    return messages if messages[0]["content"] else messages[1:]


def _without(content: str, ends: set[str]) -> str:
    """A content without the tokens at its ends."""
    before = None
    while content != before:
        before = content
        for token in ends:
            content = content.removeprefix(token).removesuffix(token).strip()
    return content


@lru_cache(maxsize=8)  # the template of a dataset, for all of its rows
def _markers(template: Template) -> tuple[str, str, str]:
    """The texts that begin a turn of the user and of the assistant, and that which ends answers."""
    messages = [{"role": ROLES[i % 2], "content": word} for i, word in enumerate(WORDS)]
    whole = template.text(Sample(messages))
    for mark in (START, STOP, SHIELD):
        whole = whole.replace(mark, "")
    pieces = re.split("|".join(WORDS), whole)
    if len(pieces) == len(WORDS) + 1:
        ends = {template.token("bos_token"), template.token("eos_token")} - {""}
        user = _without(_common_end(pieces[0], pieces[2], template), ends)
        assistant = _without(_common_end(pieces[1], pieces[3], template), ends)
        if user and assistant and user != assistant:
            return user, assistant, pieces[4].strip()
    raise DataError(
        f"is text, and template {template.name} has no markers that divide it into turns; use rows "
        "of messages"
    )


def _common_end(one: str, other: str, template: Template) -> str:
    """The common end of two texts; special tokens count as one character."""
    special = "|".join(map(re.escape, sorted(template.specials, key=len, reverse=True)))
    part = re.compile(f"{special}|." if special else ".", re.DOTALL)
    pairs = zip(part.findall(one)[::-1], part.findall(other)[::-1], strict=False)
    alike = [here for here, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return "".join(alike[::-1]).strip()
