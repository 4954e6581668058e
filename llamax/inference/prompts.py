"""What a model is asked: texts as they are, or questions in the words of a template.

::

    --prompt TEXT                    plain: "TEXT"        template dolly:  ### Instruction
    --prompts-file lines.txt                                               TEXT
    --prompts-file rows.csv                                                ### Answer

A template wraps a question exactly as ``llamax prepare --template`` wrapped it for training, so the
tokens before the answer are those that the model has learnt to answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from llamax.data.chat.encode import Encoder
from llamax.data.chat.templates import Template, make_sample, source_of, unused
from llamax.data.prepare.instruction_rows import read_sample
from llamax.data.prepare.tables import Row, kind_of, plan_tables, read_rows
from llamax.data.tokenizer.tokenizer import Tokenizer
from llamax.runtime.errors import DataError


class Prompt(NamedTuple):
    """A prompt: its text and tokens, and the row of a file that it comes from."""

    text: str
    ids: list[int]
    row: Row


class PromptFormat:
    """How prompts are put: as they are, or with ``template`` (a name or a file).

    ``bos_id``: the token to begin with.  ``fields``: what columns of rows are called.  ``context``
    and ``system`` are for questions that bring none.  Raises DataError for a bad template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        bos_id: int | None,
        template: str = "",
        fields: Mapping[str, str] = MappingProxyType({}),
        context: str = "",
        system: str = "",
    ) -> None:
        self.tokenizer, self.bos_id = tokenizer, bos_id
        self.fields, self.context, self.system = fields, context, system
        self._encoder = Encoder(tokenizer, bos=bos_id is not None)
        self._template: Template | None = None
        if template:
            self._template = self._encoder.template(template, source_of(template))
            for name, text in (("context", context), ("system", system)):
                if text and not self._template.reads(name):
                    raise unused(template, name)
        elif context or system:
            raise DataError("--context and --system are put by a template; give --template too")

    def ask(self, row: Row, where: str = "prompt") -> Prompt:
        """The prompt that a row of a file makes; {"prompt": text} is one without a file.

        Raises DataError that begins with ``where`` if the row makes none.
        """
        try:
            if self._template is None:
                return self._plain(row)
            found = read_sample(
                row, self.fields, self.system, self._template.chat, prompt_only=True
            )
            assert found is not None
            if self.context and not found.context:
                found = make_sample(found.instruction, self.context, system=found.system)
            spans = self._template.prompt(found)
            text = "".join(span.text for span in spans)
            _encodable(text)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        (tokens,) = self._encoder.encode([spans], prompts=True)
        return Prompt(text, [int(i) for i in tokens.ids], row)

    @property
    def chat(self) -> bool:
        """Whether the template reads messages."""
        return self._template is not None and self._template.chat

    @property
    def ends(self) -> set[int]:
        """The special tokens with which the template ends an answer."""
        if self._template is None:
            return set()
        (tokens,) = self._encoder.encode([self._template.spans(make_sample("Q", answer="A"))])
        return {int(i) for i in tokens.ids[tokens.counted] if int(i) in self._encoder.names}

    def _plain(self, row: Row) -> Prompt:
        prompt = row.get("prompt")
        if not isinstance(prompt, str):
            raise DataError(
                f'{json.dumps(row)[:60]} is not {{"prompt": "text"}}; mend that line, or use '
                "--template for rows of questions"
            )
        _encodable(prompt)
        bos = [] if self.bos_id is None else [self.bos_id]
        return Prompt(prompt, [*bos, *self.tokenizer.encode(prompt)], row)


def _encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{ascii(text)[:60]} is not UTF-8; retype it") from None


def read_file(path: Path) -> list[tuple[str, Row]]:
    """(place for messages, row) for each row of a table, else {"prompt": line} of each line.

    Blank lines are none.  Raises DataError where the file cannot be read, is not UTF-8, or holds
    no prompts.
    """
    if kind_of(path):
        return [found for run in plan_tables([str(path)]) for found in read_rows(run)]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 at byte {error.start}; convert it") from None
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError(f"{path}: holds no prompts; write one per line")
    return [(f"{path}: prompt {i}", {"prompt": line}) for i, line in enumerate(lines, 1)]
