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

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from llamax.data.chat.encode import Encoder
from llamax.data.chat.jinja_sandbox import limits
from llamax.data.chat.templates import Span, Template
from llamax.data.prepare.chunks import Encoded, part_name
from llamax.data.prepare.file_kinds import MAX_DOCUMENT
from llamax.data.prepare.row_range import RowRange
from llamax.data.prepare.row_samples import EmptyAnswer, read_sample
from llamax.data.prepare.tables import read_rows
from llamax.data.prepare.text_chunks import is_validation
from llamax.data.prepare.unread import UnreadParts, count_names
from llamax.data.tokenizer.cuts import longest
from llamax.data.tokenizer.tokenizer import Tokenizer
from llamax.runtime.errors import DataError
from llamax.runtime.units import show_bytes

BATCH_ROWS, BATCH_BYTES = 512, 2**20


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
        sizes: Counter[str] = Counter()  # bytes of text
        unread: Counter[str] = Counter()
        most = longest(tokenizer, chunk.most)
        with limits():
            for spans, text, size in _spans(chunk, self, template, unread, most):
                split = chunk.split
                if split == "train" and is_validation(text, self.validation):
                    split = "validation"
                batch = batches.setdefault(split, [])
                batch.append(spans)
                sizes[split] += size
                if len(batch) == BATCH_ROWS or sizes[split] > BATCH_BYTES:
                    yield _encoded(split, batches.pop(split), sizes.pop(split), encoder)
        for split, batch in batches.items():
            yield _encoded(split, batch, sizes[split], encoder)
        yield Encoded("train", [], [], 0, unread)


def _encoded(split: str, batch: list[list[Span]], text_bytes: int, encoder: Encoder) -> Encoded:
    """The tokens of a batch of samples."""
    made = encoder.encode(batch)
    return Encoded(split, [each.ids for each in made], [each.counted for each in made], text_bytes)


def _spans(
    chunk: RowChunk,
    settings: InstructSettings,
    template: Template,
    unread: Counter[str],
    most: int = MAX_DOCUMENT,
) -> Iterator[tuple[list[Span], str, int]]:
    """The spans, the text and its bytes of each row; DataError names the place of a mistake.

    Counts in ``unread`` the rows that hold something which is not in the text, by its name;
    ``most``: bytes of the longest sample.
    """
    parts, fields = UnreadParts(template), dict(settings.fields)
    for place, row in read_rows(chunk.rows, chunk.most):
        try:
            sample = read_sample(row, fields, settings.system, template)
            spans = template.spans(sample)
            text = "".join([span.text for span in spans])
            size = len(text) if text.isascii() else len(text.encode())
            if size > most:
                raise DataError(
                    f"is a sample of more than {show_bytes(most)}; shorten it, or use a larger "
                    f"`max_document` than {show_bytes(chunk.most)}"
                )
            count_names(unread, parts.of(sample, text))
            yield spans, text, size
        except EmptyAnswer as error:
            count_names(unread, error.unread)
            if not settings.drop_empty:
                raise DataError(f"{place}: {error}; correct it, or use `drop_empty=True`") from None
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: holds half a character (\\u{ord(text[error.start]):04x}); correct it"
            ) from None
        except DataError as error:
            raise DataError(f"{place}: {error}") from None


def training_texts(chunk: RowChunk, settings: InstructSettings) -> Iterator[str]:
    """The texts of a chunk that are in the training split, for training a tokenizer."""
    template = Template(settings.template, settings.source)
    for _, text, _ in _spans(chunk, settings, template, Counter()):
        if chunk.split == "train" and not is_validation(text, settings.validation):
            yield text


@dataclass(frozen=True)
class RowChunk:
    """A range of rows, and the split that its file is for; ``most``: bytes of the longest row."""

    rows: RowRange
    split: str
    most: int = MAX_DOCUMENT

    unit = "row"

    @property
    def size(self) -> int:
        return self.rows.count

    @property
    def size_bytes(self) -> int:
        return self.rows.size_bytes

    @property
    def files(self) -> Mapping[str, str]:
        return {self.rows.path: "rows"}
