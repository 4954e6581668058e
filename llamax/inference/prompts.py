"""Prompts: plain texts, or questions formatted by a template.

::

    text              plain: "TEXT"        template dolly:  ### Instruction
    lines.txt                                               TEXT
    rows.csv                                                ### Answer

A template formats a question exactly as ``prepare`` did for training, so the tokens before the
answer are the same in training and in generation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from llamax.data.chat.encode import Encoder
from llamax.data.chat.record import PromptRecord
from llamax.data.chat.template_source import source_of
from llamax.data.chat.templates import Template, make_sample, unused
from llamax.data.prepare.file_kinds import Row, kind_of
from llamax.data.prepare.row_samples import read_sample
from llamax.data.prepare.tables import plan_tables, read_rows
from llamax.data.tokenizer.tokenizer import Tokenizer
from llamax.runtime.errors import ConfigError, DataError
from llamax.runtime.files import read_input

PLAIN = "none"  # in place of a template: prompts are text
MAX_BYTES = 256 << 20  # of a file of prompts


class Prompt(NamedTuple):
    """A prompt: its text and tokens, and the row of a file that it comes from."""

    text: str
    ids: list[int]
    row: Row


class PromptFormat:
    """Formats prompts: plain, or with ``template`` (a name or a file).

    ``bos_id``: token at the beginning; None: none.  ``fields``: columns of the fields of rows.
    ``context`` and ``system`` are for questions that have none.  What is not given, a template
    included, is that of training (``record``), unless ``template`` is another one or "none".
    Raises DataError for a template that cannot be used.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        bos_id: int | None,
        template: str = "",
        fields: Mapping[str, str] = MappingProxyType({}),
        context: str = "",
        system: str | None = None,
        record: PromptRecord | None = None,
    ) -> None:
        record, template = (None, "") if template == PLAIN else (record, template)
        source = source_of(template) if template else record.source if record else ""
        self._usual: Mapping[str, str] = {}
        if record and source == record.source:
            template, self._usual = template or record.template, record.fields
            system = record.system if system is None else system
        system = system or ""
        self.tokenizer, self.bos_id = tokenizer, bos_id
        self.fields, self.context, self.system = fields, context, system
        self._encoder = Encoder(tokenizer, bos=bos_id is not None)
        self._template: Template | None = None
        if template:
            self._template = self._encoder.template(template, source)
            for name, text in (("context", context), ("system", system)):
                if text and not self._template.reads(name):
                    raise unused(template, name)
        elif context or system:
            raise DataError("`context` and `system` need a template; give `template` too")

    def prompt(self, row: Row, place: str = "prompt") -> Prompt:
        """The prompt of a row; without a template the row is {"prompt": text}.

        Raises DataError that begins with ``place`` if the row lacks a field.
        """
        try:
            if self._template is None:
                return self._plain(row)
            asked = row
            if not self._template.chat and [*row] == ["messages"]:
                asked = question_of(row["messages"]) or row
            fields = self.fields_of(asked)
            found = read_sample(asked, fields, self.system, self._template, prompt_only=True)
            if self.context and not found.context:
                found = make_sample(found.instruction, self.context, system=found.system)
            spans = self._template.prompt(found)
            text = "".join(span.text for span in spans)
            check_encodable(text)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        (tokens,) = self._encoder.encode([spans], prompts=True)
        return Prompt(text, [int(i) for i in tokens.ids], row)

    def fields_of(self, row: Row) -> Mapping[str, str]:
        """The columns of fields: those given, and those of training that the row has."""
        usual = {field: column for field, column in self._usual.items() if column in row}
        return {**usual, **self.fields}

    @property
    def template(self) -> Template:
        """The template; without one, the question and its answer."""
        return self._template or Template("none", "{{ instruction }}{{ context }}{{ answer }}")

    @property
    def chat(self) -> bool:
        """Whether the template reads messages."""
        return self._template is not None and self._template.chat

    @property
    def stop_ids(self) -> set[int]:
        """The special tokens with which the template ends an answer."""
        if self._template is None:
            return set()
        return set(self._encoder.turn_ends(self._template))

    def _plain(self, row: Row) -> Prompt:
        prompt = row.get("prompt")
        if not isinstance(prompt, str):
            raise DataError(
                f'{json.dumps(row)[:60]} is not {{"prompt": "text"}}; correct that line, or '
                "use `template` for rows of questions"
            )
        check_encodable(prompt)
        bos = [] if self.bos_id is None else [self.bos_id]
        return Prompt(prompt, [*bos, *self.tokenizer.encode(prompt)], row)


def question_of(messages: object) -> dict[str, str] | None:
    """The row of a conversation that is one question, for a template that reads no more; or None.

    It is a message of the user, perhaps after one of the system.
    """
    if not isinstance(messages, list) or not 0 < len(messages) < 3:
        return None
    found = {}
    for message, role in zip(reversed(messages), ("user", "system"), strict=False):
        if not isinstance(message, Mapping) or message.get("role") != role:
            return None
        if not isinstance(text := message.get("content"), str):
            return None
        found["instruction" if role == "user" else role] = text
    return found


def check_encodable(text: str) -> None:
    """Raise DataError for a text that holds half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{ascii(text)[:60]} holds half of a surrogate pair and is not UTF-8; retype it"
        ) from None


def read_prompts(
    prompts: str | Sequence[str | Row], file: str | Path | None = None, template: str = ""
) -> list[tuple[str, Row]]:
    """(place for messages, row) of each prompt: those given, then those of a file.

    Without any there is one empty prompt; with a template that is a ConfigError.  Raises DataError
    for a file that cannot be read or has no prompts.
    """
    rows: list[tuple[str, Row]] = []
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        row = {"prompt": prompt, "instruction": prompt} if isinstance(prompt, str) else prompt
        name = prompt if isinstance(prompt, str) else str(row)
        rows.append((f"prompt {ascii(name)[:40]}", row))
    if file is not None:
        rows += read_file(Path(file))
    if not rows and template not in ("", PLAIN):
        raise ConfigError("`template` has no prompts to format; give `prompt` or `prompts_file`")
    return rows or [("prompt", {"prompt": ""})]


def read_file(path: Path) -> list[tuple[str, Row]]:
    """(place for messages, row) of each row of a table, or {"prompt": line} of each line of text.

    Blank lines are skipped.  Raises DataError if the file cannot be read, is not UTF-8, or has no
    prompts.
    """
    if kind_of(path):
        return [found for rows in plan_tables([str(path)]) for found in read_rows(rows)]
    try:
        text = read_input(path, MAX_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 at byte {error.start}; convert it") from None
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError(f"{path}: holds no prompts; write one per line")
    return [(f"{path}: prompt {i}", {"prompt": line}) for i, line in enumerate(lines, 1)]
