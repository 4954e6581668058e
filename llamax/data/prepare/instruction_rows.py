"""Rows of questions and answers to samples: fields, template, tokens, and which of them count.

::

    row ──fields──> Sample ──template──> spans ──tokenizer──> ids       1 835 29871 ... 2
                                                              counted   0 0   0     ... 1

A span is not encoded by itself: tokens at its edges would not be those of the text, and a space
could come in between.  The text between two special tokens is encoded whole; where an answer begins
inside it is found by encoding what comes before and counting the tokens that both begin with; a
token across the edge belongs to the answer.  So decoding gives the text back byte for byte, and a
prompt's tokens are those it has at generation.

A sample begins with BOS and ends with EOS, unless the template wrote them (or its own last special
token) itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llamax.data.chat.encode import Encoder
from llamax.data.chat.templates import Message, Sample, Span, Template, sample
from llamax.data.prepare.chunks import Encoded, is_validation, part_name
from llamax.data.prepare.tables import Row, RowRange, read_rows
from llamax.data.tokenizer.tokenizer import Tokenizer
from llamax.runtime.errors import DataError

BATCH_ROWS = 512
# A field is the first of these that a row has, unless --field names another.
FIELDS = {
    "instruction": ("instruction", "question", "prompt"),
    "context": ("context", "input"),
    "answer": ("answer", "response", "output", "completion"),
    "system": ("system",),
    "messages": ("messages", "conversations"),
}
ROLES = {"human": "user", "gpt": "assistant"}


# ---- from a row to a sample


def read_conversation(
    row: Row, fields: Mapping[str, str], system: str, chat: bool, asked: bool = False
) -> Sample | None:
    """The sample in a row, None where its answer is empty.

    ``fields`` renames; ``chat`` prefers a list of messages where the row has one; with ``asked``
    no answer is looked for.  Raises DataError with what is missing or not text.
    """
    name = _name(row, "messages", fields) if chat else None
    if name is not None and row[name] is not None:
        return _conversation(row[name], name, system, asked)
    texts = {"answer": ""}
    for known in ("instruction", "context", "system", *(() if asked else ("answer",))):
        key = _name(row, known, fields)
        if key is None and (known in fields or known in ("instruction", "answer")):
            if not chat and _name(row, "messages", fields) is not None:
                raise DataError(
                    "is a conversation, which this template cannot read; use usr-bot, "
                    "human-assistant or a chat template"
                )
            looked = fields.get(known) or ", ".join(FIELDS[known])
            raise DataError(
                f"has no field for the {known} (looked for {looked}; found "
                f"{', '.join(row) or 'none'}); use --field {known}=NAME"
            )
        value = "" if key is None or row[key] is None else row[key]
        if not isinstance(value, str):
            raise DataError(
                f"has a field {key!r} that is {type(value).__name__}, not text; mend it"
            )
        texts[known] = value
    if not texts["instruction"].strip():
        raise DataError(f"has an empty {known_as(row, 'instruction', fields)!r}; mend or remove it")
    if not asked and not texts["answer"].strip():
        return None
    return sample(
        texts["instruction"], texts["context"], texts["answer"], texts["system"] or system
    )


def known_as(row: Row, known: str, fields: Mapping[str, str]) -> str:
    """What a row calls a field."""
    return _name(row, known, fields) or known


def _name(row: Row, known: str, fields: Mapping[str, str]) -> str | None:
    """The column of a field, or None; a column that --field names must be there."""
    if (given := fields.get(known)) is not None:
        return given if given in row else None
    return next((name for name in FIELDS[known] if name in row), None)


def _conversation(given: Any, name: str, system: str, asked: bool) -> Sample | None:
    messages: list[Message] = []
    for turn in given if isinstance(given, list) else [None]:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        text = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(text, str):
            raise DataError(
                f"has a field {name!r} that is no list of {{role, content}} in text; mend it"
            )
        messages.append({"role": ROLES.get(role, role), "content": text})
    if system and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": system})
    if asked:
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return Sample(messages)
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    if not answers or not all(answer.strip() for answer in answers):
        return None
    while messages[-1]["role"] != "assistant":
        messages.pop()  # nobody answers what comes last
    return Sample(messages)


def column(text: str) -> tuple[str, str]:
    """FIELD=COLUMN of a command line as a pair; raises what argparse reports."""
    name, equals, found = text.partition("=")
    if name not in FIELDS or not equals or not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not FIELD=COLUMN with a field of {', '.join(FIELDS)}"
        )
    return name, found


# ---- from runs of rows to parts


@dataclass(frozen=True)
class InstructSettings:
    """What decides the bytes of an instruction dataset, beside its rows."""

    tokenizer: str
    template: str
    source: str
    fields: tuple[tuple[str, str], ...] = ()
    system: str = ""
    validation: float = 0.0
    bos: bool = True
    eos: bool = True
    drop_empty: bool = False

    def name(self, number: int, chunk: SplitRun) -> str:
        """The name of a part: equal names, equal bytes."""
        return part_name(number, asdict(self), asdict(chunk))

    def encode(self, chunk: SplitRun, tokenizer: Tokenizer) -> Iterator[Encoded]:
        """The samples of a run of rows, batch by batch and split by split."""
        encoder = Encoder(tokenizer, self.bos, self.eos)
        template = encoder.template(self.template, self.source)
        batches: dict[str, list[list[Span]]] = {}
        for spans, text in _spans(chunk, self, template):
            split = chunk.split
            if split == "train" and is_validation(text.encode(), self.validation):
                split = "validation"
            batch = batches.setdefault(split, [])
            batch.append(spans)
            if len(batch) == BATCH_ROWS:
                yield self._batch(split, batches.pop(split), encoder)
        for split, batch in batches.items():
            yield self._batch(split, batch, encoder)

    def _batch(self, split: str, batch: list[list[Span]], encoder: Encoder) -> Encoded:
        made = encoder.encode(batch)
        size = sum(len(span.text.encode()) for spans in batch for span in spans)
        return Encoded(split, [each.ids for each in made], [each.counted for each in made], size)


def _spans(
    chunk: SplitRun, settings: InstructSettings, template: Template
) -> Iterator[tuple[list[Span], str]]:
    """The spans and the text of each row; DataError names the place of one that has none."""
    for place, row in read_rows(chunk.run):
        try:
            found = read_conversation(row, dict(settings.fields), settings.system, template.chat)
            if found is None and not settings.drop_empty:
                raise DataError("has an empty answer; mend it, or use --drop-empty")
            if found is not None:
                spans = template.spans(found)
                text = "".join(span.text for span in spans)
                text.encode()
                yield spans, text
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: holds half a character (\\u{ord(text[error.start]):04x}); mend it"
            ) from None
        except DataError as error:
            raise DataError(f"{place}: {error}") from None


def texts(chunk: SplitRun, settings: InstructSettings) -> Iterator[str]:
    """The texts of a run that are of the training split, for training a tokenizer."""
    template = Template(settings.template, settings.source)
    for _, text in _spans(chunk, settings, template):
        if chunk.split == "train" and not is_validation(text.encode(), settings.validation):
            yield text


@dataclass(frozen=True)
class SplitRun:
    """A run of rows, and the split it was given for."""

    run: RowRange
    split: str

    unit = "row"

    @property
    def size(self) -> int:
        return self.run.count

    @property
    def size_bytes(self) -> int:
        return 0 if self.run.kind == "parquet" else self.run.stop - self.run.start
