"""The section [prepare] of a job file, and the command line that it stands for.

Every key is an option of ``llamax prepare``, under the name that ``llamax.data.prepare.pipeline``
gives it, with the same default::

    validation_files = ["held_out.jsonl"]      --validation-file=held_out.jsonl
    fields.instruction = "question"            --field=instruction=question
    bos = false                                --no-bos
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from llamax.config.types import Count, Fraction, Natural
from llamax.runtime.address import protocol
from llamax.runtime.units import read_bytes

SINGULAR = {"validation_files": "validation-file", "test_files": "test-file"}
ONLY_TEXT = ("glob", "exclude")
ONLY_ROWS = (
    "fields",
    "system",
    "split",
    "limit",
    "validation_files",
    "test_files",
    "drop_empty",
)


@dataclass(frozen=True)
class Fields:
    """Columns of rows of questions and answers; empty: the usual names."""

    instruction: str = ""
    """Column of the question."""
    context: str = ""
    """Column of the text that a question is about."""
    answer: str = ""
    """Column of the answer."""
    system: str = ""
    """Column of the system prompt."""
    messages: str = ""
    """Column of a conversation."""
    history: str = ""
    """Column of earlier turns."""


@dataclass(frozen=True)
class Prepare:
    """The phase before training: text or rows to tokens, written to data.path."""

    inputs: tuple[str, ...] = ()
    """Text, JSONL or tables of rows, or folders of them."""
    tokenizer: str = ""
    """File tokenizer.model, tokenizer.json or .tiktoken, or a folder."""
    train_tokenizer: Natural = 0
    """Instead of a tokenizer: size of one to train on the inputs [pieces]."""
    key: str = "text"
    """Rows of text: the key or column that holds the text."""
    glob: tuple[str, ...] = ()
    """Folders of text: patterns of the names to take; empty: all."""
    exclude: tuple[str, ...] = ()
    """Folders of text: patterns of the names to skip."""
    validation: Fraction = 0.01
    """Share of documents for validation."""
    bos: bool | None = None
    """Whether documents start with BOS; unset: if the tokenizer adds it, but not of megatron."""
    eos: bool | None = None
    """Whether documents end with EOS; unset: yes, but not of megatron."""
    format: Literal["llamax", "megatron"] = "llamax"
    """Format of the tokens: llamax's checked files, or Megatron's .bin and .idx."""
    workers: Count = 32
    """Tokenizing processes [processes]."""
    max_document: str = ""
    """Longest row, or longest text without a place to cut, such as 2GB; empty: 64 MiB."""
    length: Natural = 0
    """Also report how well documents pack into samples of this length; 0: no [tokens]."""
    strict: bool = False
    """Refuse rows with a column or key that is not read, instead of naming it."""
    template: str = ""
    """Template of instruction data: a name, a Jinja file, tokenizer_config.json or a folder."""
    system: str = ""
    """System prompt of samples without one; may have several lines."""
    split: str = ""
    """Slice of the rows, such as train[:10%]; empty: all."""
    limit: Natural = 0
    """Rows to take, the first ones; 0: all [rows]."""
    validation_files: tuple[str, ...] = ()
    """Files of rows to validate on, instead of a share."""
    test_files: tuple[str, ...] = ()
    """Files of rows of the test split."""
    drop_empty: bool = False
    """Skip rows with an empty answer instead of refusing them."""
    fields: Fields = Fields()


def command_line(settings: Prepare, out: str) -> list[str]:
    """The arguments of ``llamax prepare``; keys with the default value are left out.

    Values are joined to their options by =, and inputs follow --, so that none is taken as an
    option.
    """
    words = [f"--out={out}", f"--workers={settings.workers}"]
    for each in fields(settings):
        value = getattr(settings, each.name)
        if value != each.default and each.name not in ("inputs", "workers"):
            words += _option(each.name, value)
    return [*words, "--", *settings.inputs]


def _option(name: str, value: object) -> Iterator[str]:
    option = SINGULAR.get(name, name.replace("_", "-"))
    if isinstance(value, Fields):
        for each in fields(value):
            if column := getattr(value, each.name):
                yield f"--field={each.name}={column}"
    elif isinstance(value, tuple):
        yield from (f"--{option}={item}" for item in value)
    elif isinstance(value, bool):
        yield f"--{option}" if value else f"--no-{option}"
    else:
        yield f"--{option}={value}"


def paths(settings: Prepare) -> Iterator[tuple[str, str]]:
    """(key, path) of every file that the settings name, and of ``template`` if it may be one."""
    for name in ("inputs", "validation_files", "test_files"):
        yield from ((name, path) for path in getattr(settings, name))
    yield from (("tokenizer", settings.tokenizer), ("template", settings.template))


def problems(settings: Prepare) -> Iterator[str]:
    """What ``llamax prepare`` would refuse on the cluster, one line each."""
    if not settings.inputs:
        yield "prepare.inputs is empty; set it to the text files, rows or folders"
    if "" in settings.inputs:
        yield "prepare.inputs has an empty name; use '.' for the working folder"
    if settings.tokenizer and settings.train_tokenizer:
        yield "prepare.tokenizer and prepare.train_tokenizer are both set; remove one"
    elif not settings.tokenizer and not settings.train_tokenizer:
        yield (
            "prepare.tokenizer is empty; set it to a tokenizer.model, tokenizer.json or folder, or "
            "set prepare.train_tokenizer"
        )
    for key, path in paths(settings):
        if protocol(path) not in ("", "hf"):
            yield (
                f"prepare.{key}={path!r} is an address, not a path; copy it to the storage, such "
                "as by aws s3 sync"
            )
    if settings.max_document:
        try:
            if read_bytes(settings.max_document) < 1:
                yield f"prepare.max_document={settings.max_document!r} is below one byte"
        except ValueError as error:
            yield f"prepare.max_document: {error}"
    given = [each.name for each in fields(settings) if getattr(settings, each.name) != each.default]
    if settings.template and settings.format == "megatron":
        yield (
            "prepare.format=megatron cannot store which tokens are answers; remove it, or "
            "prepare.template"
        )
    wrong = ONLY_TEXT if settings.template else ONLY_ROWS
    purpose = "text" if settings.template else "rows, which prepare.template asks for"
    for name in (name for name in given if name in wrong):
        yield f"prepare.{name} is for {purpose}; remove it"
