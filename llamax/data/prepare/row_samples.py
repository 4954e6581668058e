"""Rows of questions and answers as samples, whatever program wrote them.

::

    {"instruction", "input", "output", "history"}   Alpaca, LLaMA-Factory    ─┐
    {"messages": [{"role", "content"}], "tools"}    OpenAI, transformers      ├─> Sample
    {"conversations": [{"from", "value"}]}          ShareGPT, NeMo           ─┤
    {"text": "<usr> ... <bot> ..."}                 whole conversations      ─┘

A key or a column that is null is absent: tables that were joined are filled with nulls.  Whatever
else a row holds reaches the template if the template reads it by name, and is reported otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from llamax.data.chat.templates import Message, Sample, Template, make_sample
from llamax.data.chat.written_turns import written_turns
from llamax.data.prepare.file_kinds import Row
from llamax.runtime.errors import DataError
from llamax.runtime.json_reader import JsonError, parse_json

# A field is the first of these columns with a value, unless ``fields`` names another.
FIELDS = {
    "instruction": ("instruction", "question", "prompt"),
    "context": ("context", "input"),
    "answer": ("answer", "response", "output", "completion"),
    "system": ("system", "system_prompt"),
    "messages": ("messages", "conversations", "conversation"),
    "history": ("history",),
}
# Roles as other programs call them, in lower case.
ROLES = {
    **dict.fromkeys(("user", "human", "usr", "prompter", "input"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "model", "bot", "ai", "bard", "bing", "output"),
        "assistant",
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(
        ("tool", "observation", "function", "ipython", "tool_response", "function_response"),
        "tool",
    ),
    **dict.fromkeys(("function_call", "tool_call"), "tool_call"),
}
ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value", "text")
CALLS = ("tool_calls", "function_call")
TESTS_NONE = re.compile(r"content\W{1,4}is\s+(not\s+)?none", re.IGNORECASE)


class EmptyAnswer(DataError):
    """A row without an answer; ``unread`` are keys whose values would be one."""

    def __init__(self, message: str, unread: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.unread = unread


def read_sample(
    row: Row, fields: Mapping[str, str], system: str, template: Template, prompt_only: bool = False
) -> Sample:
    """The sample in a row, for a template.

    ``fields``: columns of fields; ``system``: system prompt of a row without one; ``prompt_only``:
    leave the answer out.  Raises EmptyAnswer, and DataError for a field that is missing or not
    text, and for a turn whose role is unknown.
    """
    name = _column(row, "messages", fields) if template.chat else None
    if name is not None and _filled(row[name]):
        used = {name}
        sample = _conversation(row, name, fields, system, template, prompt_only, used)
    else:
        used = set()
        sample = _question(row, fields, system, template, prompt_only, used)
    return _with_variables(sample, row, template, used, prompt_only)


def check_fields(fields: Mapping[str, str]) -> None:
    """Raise DataError for a name that is not a field's, or for an empty column."""
    for field, column in fields.items():
        if field not in FIELDS or not column:
            raise DataError(
                f"`fields`: {field}={column} is not FIELD=COLUMN with a field of "
                f"{', '.join(FIELDS)}"
            )


def _column(row: Row, field: str, fields: Mapping[str, str]) -> str | None:
    """The column of a field: the first with a value, else the first; None if the row has none."""
    if (chosen := fields.get(field)) is not None:
        return chosen if chosen in row else None
    first = None
    for name in FIELDS[field]:
        if name in row:
            if row[name] is not None:
                return name
            first = first or name
    return first


def _filled(value: Any) -> bool:
    return value is not None and value != []


# ---- a question and its answer


def _question(
    row: Row,
    fields: Mapping[str, str],
    system: str,
    template: Template,
    prompt_only: bool,
    used: set[str],
) -> Sample:
    texts = {"answer": ""}
    for field in ("instruction", "context", "system", *(() if prompt_only else ("answer",))):
        key = _column(row, field, fields)
        if key is None and (field in fields or field in ("instruction", "answer")):
            if not template.chat and _column(row, "messages", fields) is not None:
                raise DataError(
                    "is a conversation, which this template cannot read; use usr-bot, "
                    "human-assistant or a chat template"
                )
            raise _missing(row, field, fields, template.chat)
        texts[field] = _text(row, key)
        if key is not None and template.reads(field):
            used.add(key)
    if not texts["instruction"].strip():
        name = _column(row, "instruction", fields)
        raise DataError(f"has an empty {name!r}; correct or remove it")
    if not prompt_only and not texts["answer"].strip():
        raise EmptyAnswer("has an empty answer")
    sample = make_sample(
        texts["instruction"], texts["context"], texts["answer"], texts["system"] or system
    )
    earlier = _column(row, "history", fields)
    if earlier is None and "history" in fields:
        raise _missing(row, "history", fields)
    if earlier is None or not template.chat or not _filled(_parsed(row[earlier])):
        return sample
    used.add(earlier)
    start = int(sample.messages[0]["role"] == "system")
    turns = list(_history(_parsed(row[earlier]), earlier, template))
    return sample._replace(messages=[*sample.messages[:start], *turns, *sample.messages[start:]])


def _text(row: Row, key: str | None) -> str:
    value = "" if key is None or row[key] is None else row[key]
    if not isinstance(value, str):
        raise DataError(f"has a field {key!r} that is {type(value).__name__}, not text; correct it")
    return value


def _missing(row: Row, field: str, fields: Mapping[str, str], chat: bool = False) -> DataError:
    looked = fields.get(field) or ", ".join(FIELDS[field])
    whole = ", or messages=text for whole conversations as text" if chat and "text" in row else ""
    return DataError(
        f"has no field for the {field} (looked for {looked}; found "
        f"{', '.join(row) or 'none'}); use `fields` {field}=NAME{whole}"
    )


def _history(turns: Any, name: str, template: Template) -> Iterator[Message]:
    """Earlier turns: pairs of a question and its answer, or a conversation."""
    for pair in turns if isinstance(turns, list) else [None]:
        if isinstance(pair, dict):
            yield from _turn(pair, name, template)
        elif isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair):
            yield {"role": "user", "content": pair[0]}
            yield {"role": "assistant", "content": pair[1]}
        else:
            raise DataError(
                f"has a field {name!r} that is not a list of [question, answer]; correct it"
            )


# ---- a conversation


def _conversation(
    row: Row,
    name: str,
    fields: Mapping[str, str],
    system: str,
    template: Template,
    prompt_only: bool,
    used: set[str],
) -> Sample:
    turns = _transposed(_parsed(row[name]))
    if isinstance(turns, str) and turns.strip():
        turns = written_turns(turns, template)
    messages = [
        message
        for turn in (turns if isinstance(turns, list) else [None])
        for message in _turn(turn, name, template)
    ]
    column = _column(row, "system", fields)
    if column is None and "system" in fields:
        raise _missing(row, "system", fields)
    text = _text(row, column)
    if not messages or messages[0]["role"] != "system":
        if column is not None:
            used.add(column)
        if text.strip() or system:
            messages.insert(0, {"role": "system", "content": text if text.strip() else system})
    elif column is not None and text.strip() == str(messages[0].get("content")).strip():
        used.add(column)
    if ROLES.get(str(row.get("mask")).lower()) == "user":
        used.add("mask")  # NeMo: the role that is not learnt
    if prompt_only:
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return Sample(messages)
    answers = [message for message in messages if message["role"] == "assistant"]
    for message in answers:
        if not _answers(message, template):
            calls = tuple(key for key in CALLS if message.get(key))
            reason = "".join(
                f" beside {key}, which template {template.name} does not read" for key in calls[:1]
            )
            raise EmptyAnswer(
                f"has an empty answer{reason}",
                tuple(f"messages[].{key}" for key in calls),
            )
    if not answers:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise EmptyAnswer(f"has no answer (roles in {name!r}: {roles or 'none'})")
    while messages[-1]["role"] != "assistant":
        messages.pop()  # turns without an answer
    return Sample(messages)


def _transposed(turns: Any) -> Any:
    """A list of turns that ``datasets`` holds as columns, {role: [...], content: [...]}."""
    columns = list(turns.values()) if isinstance(turns, dict) else []
    if not columns or not all(isinstance(column, list) for column in columns):
        return turns
    if len(set(map(len, columns))) > 1:
        return turns
    return [dict(zip(turns, values, strict=True)) for values in zip(*columns, strict=True)]


def _answers(message: Message, template: Template) -> bool:
    """Whether a message of the assistant holds an answer that the template can write."""
    text = message.get("content") or ""
    return bool(text.strip()) or any(message.get(key) and key in template.words for key in CALLS)


def _turn(turn: Any, name: str, template: Template) -> Iterator[Message]:
    """The messages of a turn, usually one: null keys left out, the role by its usual name."""
    if not isinstance(turn, dict):
        raise DataError(f"has a field {name!r} that is not a list of {{role, content}}; correct it")
    turn = {str(key): value for key, value in turn.items() if value is not None}
    role_key = next((key for key in ROLE_KEYS if key in turn), None)
    if role_key is None and {"input", "output"} <= turn.keys():  # XTuner: a pair in one turn
        for part in ("system", "input", "output"):
            if turn.get(part):
                yield from _turn({"role": part, "content": turn[part]}, name, template)
        if more := sorted(turn.keys() - {"system", "input", "output"}):
            raise DataError(f"has a field {name!r} with a key {more[0]!r} beside input and output")
        return
    role = turn.get(role_key) if role_key else None
    if not isinstance(role, str):
        raise DataError(
            f"has a field {name!r} that is not a list of {{role, content}} "
            f"(found {', '.join(turn) or 'nothing'}); correct it"
        )
    text_key = next((key for key in TEXT_KEYS if key in turn), None)
    rest: dict[str, Any] = {
        key: _without_nulls(_parsed(value) if key in CALLS else value)
        for key, value in turn.items()
        if key not in (role_key, text_key)
    }
    known = _role(role, name, template)
    text: str | None = _content(turn[text_key], name) if text_key else None
    if known == "tool_call":
        known, call = "assistant", _parsed(text)
        calls = call if isinstance(call, list) else [call]
        if "tool_calls" in template.words and all(isinstance(each, dict) for each in calls):
            wrapped = [
                each if "function" in each else {"type": "function", "function": each}
                for each in calls
            ]
            rest, text = {"tool_calls": wrapped, **rest}, ""
    if text is None:
        if not any(rest.get(key) for key in (*CALLS, "reasoning_content", "thinking")):
            if known != "assistant":
                raise DataError(
                    f"has a field {name!r} that is not a list of {{role, content}} "
                    f"(a turn of {role!r} has no text); correct it"
                )
            text = ""
        elif TESTS_NONE.search(template.source):
            yield {"role": known, "content": None, **rest}
            return
        else:
            yield {"role": known, **rest}
            return
    yield {"role": known, "content": text, **rest}


def _role(role: str, name: str, template: Template) -> str:
    """The usual name of a role; one that only the template knows stays as it is."""
    known = ROLES.get(role.strip().lower())
    if known not in ("user", "assistant", "tool_call") and role in template.texts:
        return role
    if known is None:
        raise DataError(
            f"has a turn of role {role!r} in {name!r}, which is unknown (known: "
            f"{', '.join(ROLES)}); rename the role"
        )
    return known


def _content(value: Any, name: str) -> str:
    """The text of a turn: a string, or a list of parts of text."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        kinds = [part.get("type") for part in value]
        if other := [kind for kind in kinds if kind != "text"]:
            raise DataError(f"has a part of type {other[0]!r} in {name!r}; only text can be read")
        return "".join(str(part.get("text") or "") for part in value)
    if not isinstance(value, str):
        raise DataError(
            f"has a field {name!r} that is not a list of {{role, content}} "
            f"(a content is {type(value).__name__}, not text); correct it"
        )
    return value


# ---- what else a row holds


def _with_variables(
    sample: Sample, row: Row, template: Template, used: set[str], prompt_only: bool
) -> Sample:
    """The sample with the columns that the template reads by name, and the names of the rest."""
    rest = {key: value for key, value in row.items() if key not in used and value is not None}
    if not rest:
        return sample
    variables: dict[str, Any] = {}
    if isinstance(settings := rest.get("chat_template_kwargs"), dict):
        settings = {key: value for key, value in settings.items() if value is not None}
        if settings.keys() <= template.columns:
            variables |= settings
            del rest["chat_template_kwargs"]
    for key in [*rest]:
        if key in template.columns:
            value = rest.pop(key)
            variables[key] = _without_nulls(_list(value, key) if key == "tools" else value)
    unread = tuple(key for key, value in rest.items() if value not in ("", [], {}))
    if prompt_only:
        unread = ()
    return sample._replace(variables=variables, unread=unread)


def _list(value: Any, key: str) -> Any:
    """A list that is perhaps written as JSON text, as tables hold it; None if it is empty."""
    found = _parsed(value)
    if isinstance(found, str) and found.strip():
        raise DataError(f"has a field {key!r} that is neither a list nor JSON; correct it")
    return found or None


def _parsed(value: Any) -> Any:
    """The object or the list in a JSON text; anything else as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return parse_json(value, False)
        except JsonError:
            pass
    return value


def _without_nulls(value: Any) -> Any:
    """A value without the keys that are null, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
