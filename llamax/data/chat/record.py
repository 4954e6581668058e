"""How training made text of rows, kept wherever the model goes.

::

    DATASET/dataset.json ──> checkpoint ─┬─> MODEL/llamax_prompt.json   template, system text,
                                         └─> MODEL/chat_template.jinja  fields, turn ends

``chat_template.jinja`` is for other programs: it begins with BOS where training did and the
template does not, and with the system text of training in a conversation that has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

PROMPT = "prompt"  # the key in a checkpoint's state


@dataclass(frozen=True)
class PromptRecord:
    """The template of training and what went into it.

    ``template`` is its name, ``source`` its text.  ``system`` is the system text of samples without
    one, ``fields`` are columns by field, ``turn_ends`` the tokens that end an answer.
    ``chat_template`` is the template for other programs; empty if it reads no conversations.
    """

    template: str
    source: str
    system: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    turn_ends: tuple[int, ...] = ()
    chat_template: str = ""

    def to_json(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        return {**asdict(self), "fields": dict(self.fields), "turn_ends": list(self.turn_ends)}

    @classmethod
    def of(cls, value: object) -> PromptRecord | None:
        """The record in a JSON value; None if the value is not one."""
        if not isinstance(value, Mapping):
            return None
        texts = {name: value.get(name, "") for name in ("template", "source", "system")}
        texts["chat_template"] = value.get("chat_template", "")
        fields, ends = value.get("fields") or {}, value.get("turn_ends") or []
        if not all(isinstance(text, str) for text in texts.values()) or not texts["source"]:
            return None
        if not isinstance(fields, Mapping) or not isinstance(ends, list):
            return None
        columns = {str(name): str(column) for name, column in fields.items()}
        return cls(**texts, fields=columns, turn_ends=tuple(i for i in ends if type(i) is int))


def with_system(source: str, system: str) -> str:
    """A chat template that gives a system text to conversations without one.

    The line break ends the block, and is not part of the text (``trim_blocks``).
    """
    if not system:
        return source
    text = json.dumps(system, ensure_ascii=False)
    return (
        "{% if not messages or messages[0].role != 'system' %}"
        f"{{% set messages = [{{'role': 'system', 'content': {text}}}] + (messages | list) %}}"
        "{% endif %}\n" + source
    )
