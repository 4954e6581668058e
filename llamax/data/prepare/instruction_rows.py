"""Rows of questions and answers as samples: fields, template, tokens, and which of them count.

::

    row ──fields──> Sample ──template──> spans ──tokenizer──> ids       1 835 29871 ... 2
                                                              counted   0 0   0     ... 1

Spans are not encoded one by one: the tokens at their edges would differ from those of the text, and
a space could come in between.  The text between two special tokens is encoded whole.  Where an
answer begins inside it is found by encoding the text before it and counting the tokens that both
have in common; a token across the edge belongs to the answer.  So decoding gives the text back byte
for byte, and a prompt has the same tokens in training and in generation.

A sample begins with BOS and ends with EOS, unless the template writes them (or ends with another
special token).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llamax.data.chat.encode import Encoder
from llamax.data.chat.templates import Message, Sample, Span, Template, make_sample
from llamax.data.prepare.chunks import Encoded, is_validation, part_name
from llamax.data.prepare.tables import Row, RowRange, read_rows
from llamax.data.tokenizer.tokenizer import Tokenizer
from llamax.runtime.errors import DataError

BATCH_ROWS = 512
# A field is the first of these columns that a row has, unless ``fields`` names another.
FIELDS = {
    "instruction": ("instruction", "question", "prompt"),
    "context": ("context", "input"),
    "answer": ("answer", "response", "output", "completion"),
    "system": ("system",),
    "messages": ("messages", "conversations"),
}
ROLES = {"human": "user", "gpt": "assistant"}


# ---- from a row to a sample


def read_sample(
    row: Row, fields: Mapping[str, str], system: str, chat: bool, prompt_only: bool = False
) -> Sample | None:
    """The sample in a row; None if its answer is empty.

    ``fields``: columns of fields; ``system``: system prompt of a row without one; ``chat``: use a
    list of messages if the row has one; ``prompt_only``: leave the answer out.  Raises DataError
    for a field that is missing or not text.
    """
    name = _column(row, "messages", fields) if chat else None
    if name is not None and row[name] is not None:
        return _conversation(row[name], name, system, prompt_only)
    texts = {"answer": ""}
    for known in ("instruction", "context", "system", *(() if prompt_only else ("answer",))):
        key = _column(row, known, fields)
        if key is None and (known in fields or known in ("instruction", "answer")):
            if not chat and _column(row, "messages", fields) is not None:
                raise DataError(
                    "is a conversation, which this template cannot read; use usr-bot, "
                    "human-assistant or a chat template"
                )
            looked = fields.get(known) or ", ".join(FIELDS[known])
            raise DataError(
                f"has no field for the {known} (looked for {looked}; found "
                f"{', '.join(row) or 'none'}); use `fields` {known}=NAME"
            )
        value = "" if key is None or row[key] is None else row[key]
        if not isinstance(value, str):
            raise DataError(
                f"has a field {key!r} that is {type(value).__name__}, not text; correct it"
            )
        texts[known] = value
    if not texts["instruction"].strip():
        name = _column(row, "instruction", fields)
        raise DataError(f"has an empty {name!r}; correct or remove it")
    if not prompt_only and not texts["answer"].strip():
        return None
    return make_sample(
        texts["instruction"], texts["context"], texts["answer"], texts["system"] or system
    )


def check_fields(fields: Mapping[str, str]) -> None:
    """Raise DataError for a name that is not a field's, or for an empty column."""
    for field, column in fields.items():
        if field not in FIELDS or not column:
            raise DataError(
                f"`fields`: {field}={column} is not FIELD=COLUMN with a field of "
                f"{', '.join(FIELDS)}"
            )


def _column(row: Row, known: str, fields: Mapping[str, str]) -> str | None:
    """The column of a field; None if the row lacks it, or lacks the one that ``fields`` names."""
    if (chosen := fields.get(known)) is not None:
        return chosen if chosen in row else None
    return next((name for name in FIELDS[known] if name in row), None)


def _conversation(turns: Any, name: str, system: str, prompt_only: bool) -> Sample | None:
    messages: list[Message] = []
    for turn in turns if isinstance(turns, list) else [None]:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        text = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(text, str):
            raise DataError(
                f"has a field {name!r} that is not a list of {{role, content}}; correct it"
            )
        messages.append({"role": ROLES.get(role, role), "content": text})
    if system and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": system})
    if prompt_only:
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return Sample(messages)
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    if not answers or not all(answer.strip() for answer in answers):
        return None
    while messages[-1]["role"] != "assistant":
        messages.pop()  # turns without an answer
    return Sample(messages)


# ---- from ranges of rows to parts


@dataclass(frozen=True)
class InstructSettings:
    """What decides the bytes of an instruction dataset, besides its rows.

    ``source`` is the template's text; ``fields`` are (field, column).
    """

    tokenizer: str
    template: str
    source: str
    fields: tuple[tuple[str, str], ...] = ()
    system: str = ""
    validation: float = 0.0
    bos: bool = True
    eos: bool = True
    drop_empty: bool = False

    def name(self, number: int, chunk: RowChunk) -> str:
        """The name of a part: equal names, equal bytes."""
        rows = {"run": asdict(chunk.rows), "split": chunk.split}
        return part_name(number, asdict(self), rows)

    def encode(self, chunk: RowChunk, tokenizer: Tokenizer) -> Iterator[Encoded]:
        """The samples of a range of rows, batch by batch and split by split."""
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
    chunk: RowChunk, settings: InstructSettings, template: Template
) -> Iterator[tuple[list[Span], str]]:
    """The spans and the text of each row; DataError names the place of a row without them."""
    for place, row in read_rows(chunk.rows):
        try:
            sample = read_sample(row, dict(settings.fields), settings.system, template.chat)
            if sample is None and not settings.drop_empty:
                raise DataError("has an empty answer; correct it, or use `drop_empty=True`")
            if sample is not None:
                spans = template.spans(sample)
                text = "".join(span.text for span in spans)
                text.encode()
                yield spans, text
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: holds half a character (\\u{ord(text[error.start]):04x}); correct it"
            ) from None
        except DataError as error:
            raise DataError(f"{place}: {error}") from None


def training_texts(chunk: RowChunk, settings: InstructSettings) -> Iterator[str]:
    """The texts of a chunk that are in the training split, for training a tokenizer."""
    template = Template(settings.template, settings.source)
    for _, text in _spans(chunk, settings, template):
        if chunk.split == "train" and not is_validation(text.encode(), settings.validation):
            yield text


@dataclass(frozen=True)
class RowChunk:
    """A range of rows, and the split that its file is for."""

    rows: RowRange
    split: str

    unit = "row"

    @property
    def size(self) -> int:
        return self.rows.count

    @property
    def size_bytes(self) -> int:
        return 0 if self.rows.kind == "parquet" else self.rows.stop - self.rows.start
