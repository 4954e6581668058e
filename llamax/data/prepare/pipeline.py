"""``prepare``: text or rows to a dataset folder, in parallel, resumed where it was killed.

::

    inputs ──plan──> chunks ──workers──> OUT/.parts/*.tokens ──join──> OUT/train.tokens
                                                                       OUT/validation.tokens
                                                                       OUT/tokenizer.model
                                                                       OUT/dataset.json, last

In the Megatron format the splits become .bin and .idx files, see ``llamax.data.megatron``.  With a
template the inputs are rows of questions and answers, see ``llamax.data.prepare.instruction_rows``.
How a killed preparation resumes: ``llamax.data.prepare.chunks``.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from llamax.data.chat.jinja_sandbox import Program
from llamax.data.chat.template_source import source_of
from llamax.data.chat.templates import unused
from llamax.data.dataset import read_index
from llamax.data.prepare.chunks import (
    SPLITS,
    Chunk,
    Settings,
    files_by_kind,
    join_parts,
    join_parts_to_megatron,
    make_parts,
    unread_in,
)
from llamax.data.prepare.dataset_index import (
    Format,
    already_made,
    count_documents,
    write_index,
)
from llamax.data.prepare.file_kinds import MAX_DOCUMENT, is_compressed
from llamax.data.prepare.hub_dataset import held_out_on_hub, pin_inputs
from llamax.data.prepare.instruction_rows import (
    InstructSettings,
    RowChunk,
)
from llamax.data.prepare.output_folder import PARTS, keeping, make_parts_folder
from llamax.data.prepare.own_tokenizer import own_tokenizer
from llamax.data.prepare.row_samples import check_fields
from llamax.data.prepare.saved_dataset import held_out
from llamax.data.prepare.tables import plan_tables
from llamax.data.prepare.text_chunks import TextChunk, TextSettings
from llamax.data.prepare.text_files import is_only_text, plan
from llamax.data.prepare.unread import unread_error, unread_names
from llamax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from llamax.runtime.errors import DataError
from llamax.runtime.logging import logger
from llamax.runtime.progress import reported

PathLike = str | Path
LEAST_BYTES = 2**20  # of text, for which the faster engine is loaded
PACKED = 4  # bytes of text in one byte of a compressed file, about


@dataclass(frozen=True)
class Prepared:
    """A dataset that ``prepare`` made: its folder, what went in, what came out, in what time."""

    folder: Path
    inputs: int
    unit: str  # of ``inputs``: "B" or "row"
    documents: int
    seconds: float
    unread: Mapping[str, int]  # columns and keys that are not in the text, with numbers of rows
    taken: Mapping[str, int]  # numbers of files by kind, "rows" and "text"
    left: Sequence[str]  # files that were not taken


def prepare(
    inputs: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    tokenizer: PathLike | None = None,
    train_tokenizer: int = 0,
    key: str = "text",
    glob: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    validation: float = 0.01,
    bos: bool | None = None,
    eos: bool | None = None,
    format: Format = "llamax",
    workers: int = 1,
    template: str = "",
    fields: Mapping[str, str] = MappingProxyType({}),
    system: str = "",
    split: str = "",
    limit: int = 0,
    validation_files: Sequence[PathLike] = (),
    test_files: Sequence[PathLike] = (),
    drop_empty: bool = False,
    strict: bool = False,
    max_document: int = MAX_DOCUMENT,
) -> Prepared:
    """Make a dataset folder of tokens from text, or from rows of questions and answers.

    The same call resumes what a kill interrupted, and returns at once where it is done.

    Args:
        inputs: Text or JSONL files, plain or packed (.gz, .bz2, .xz, .zst), or folders of them;
            with ``template`` JSONL, JSON, CSV, TSV or Parquet files; or datasets on the Hub,
            hf://datasets/org/name.
        out: Dataset folder to make.
        tokenizer: Tokenizer file, a folder with one, or org/name on the Hub.
        train_tokenizer: Instead: the number of pieces of a tokenizer to train on the inputs.
        key: Key of the text in JSONL rows.
        glob: Patterns of file names to take from folders.
        exclude: Patterns of file and folder names to skip in folders.
        validation: Share of documents for validation, 0 or more and below 1.
        bos: Whether documents begin with BOS; by default as the tokenizer adds it; Megatron: no.
        eos: Whether documents end with EOS; default as for ``bos``.
        format: "llamax", one checked file for each split, or "megatron", .bin and .idx files.
        workers: Number of processes; less than half a second of work is done by this one alone,
            and more than 1 are forks of it on Linux.
        template: Name of a built-in template, a Jinja file, a tokenizer_config.json or a folder
            with one.  The parameters below need a template.
        fields: Columns of the fields instruction, context, answer, system and messages, where they
            have other than the usual names.
        system: System prompt of samples that have none.
        split: Slice of the rows, such as "train[:10%]"; of a folder or a Hugging Face dataset the
            name chooses files.
        limit: Number of rows to take, the first ones; 0: all.
        validation_files: Files of rows for validation, instead of a share of ``inputs``.
        test_files: Files of rows for the test split.
        drop_empty: Whether to skip rows with an empty answer instead of refusing them.
        strict: Whether to refuse rows that hold a column or a key that is not read, instead of
            reporting it.
        max_document: Bytes of the longest row, or of a text file between two places where the
            tokenizer allows a cut; longer ones are refused.  Text files are read in pieces, so
            memory is at most 300 MB and 8 times this for each worker, and the window of a packed
            file where that is large.

    Raises:
        DataError: For a parameter out of range, an input that is missing or damaged, a tokenizer
            or template that cannot be used, a full disk, or a folder ``out`` that holds another
            dataset.
    """
    began = time.perf_counter()
    sources = [inputs] if isinstance(inputs, str | Path) else [*inputs]
    _check_paths(out, tokenizer, train_tokenizer)
    if twice := [path for path in sources if sources.count(path) > 1]:
        raise DataError(f"{twice[0]}: is given twice; leave one out")
    _check_ranges(validation, train_tokenizer, workers, limit, max_document)
    if template and format == "megatron":
        raise DataError(
            "`format=megatron` cannot store which tokens are answers; leave out `template` or "
            "`format`"
        )
    only_text = {"glob": [*glob] != ["*"], "exclude": exclude}
    only_rows = {
        "fields": fields,
        "system": system,
        "split": split,
        "limit": limit,
        "validation_files": validation_files,
        "test_files": test_files,
        "drop_empty": drop_empty,
    }
    purpose = "text" if template else "rows, which `template` asks for"
    for name, value in (only_text if template else only_rows).items():
        if value:
            raise DataError(f"`{name}` is for {purpose}; leave it out")
    out = Path(out)
    parts_folder = out / PARTS
    sources, tokenizer, from_hub = pin_inputs(out, sources, tokenizer)
    left: list[str] = []  # files that are not taken
    chunks: list[Chunk]
    draft: Settings
    special = format == "llamax"  # the Megatron format adds no special tokens by default
    default, bos, eos = bos is None, *(special if it is None else it for it in (bos, eos))
    if template:
        check_fields(fields)
        if not split:
            validation_files = validation_files or _held_out(sources, "validation")
            test_files = test_files or _held_out(sources, "test")
        tables = [("train", sources, split)]
        tables += [("validation", [path], "") for path in validation_files]
        tables += [("test", [path], "") for path in test_files]
        with reported("looking for the rows", began):
            chunks = [
                RowChunk(rows, split_name, max_document)
                for split_name, paths, chosen in tables
                for rows in plan_tables(
                    [str(path) for path in paths], chosen, limit, left, max_document
                )
            ]
        taken = {f"{path}/" for path in (*validation_files, *test_files)}
        left = [name for name in left if name not in taken]
        source = _template_source(template, system)
        columns = tuple(sorted(fields.items()))
        share = 0.0 if validation_files else validation
        draft = InstructSettings("", template, source, columns, system, share, bos, eos, drop_empty)
    else:
        with reported("looking for the text", began):
            files = plan(sources, [*glob] or ["*"], exclude, out.resolve(), key, left, max_document)
        chunks = [TextChunk(chunk, is_only_text(files), max_document) for chunk in files]
        given = any(each.split == "validation" for each in chunks if isinstance(each, TextChunk))
        draft = TextSettings("", key, 0.0 if given else validation, bos, eos)
    opened = None if train_tokenizer else _load(Path(str(tokenizer)), began)  # nothing is made yet
    make_parts_folder(out, tokenizer or "", key, bool(template))
    opened = opened or _load(own_tokenizer(chunks, draft, train_tokenizer, parts_folder), began)
    settings = _for_tokenizer(draft, opened, default)
    names = [settings.name(number, chunk) for number, chunk in enumerate(chunks)]
    identity = hashlib.sha256("\n".join(names).encode()).hexdigest()
    if not already_made(out, settings, identity, format):
        _speed_up(opened, chunks)
        with keeping(parts_folder):
            parts = make_parts(chunks, names, parts_folder, settings, opened, workers, began)
            unread = unread_in(parts)
            if unread and strict:
                raise unread_error(unread)
            with reported("joining the parts", began):
                made = _joined(parts, out, key, format)
            if not made["train"]:
                smaller = f", or a smaller `validation` than {validation}"
                raise DataError(
                    f"{', '.join(map(str, sources))}: no document is left for training; give more "
                    f"text{smaller if made['validation'] else ''}"
                    f"{f' (not read: {unread_names(unread)})' if unread else ''}"
                )
        trained = opened.path.stem if train_tokenizer else None
        write_index(out, settings, opened, identity, trained, format, unread, from_hub)
    else:
        kept = read_index(out / "dataset.json").get("unread")
        unread = Counter(kept if isinstance(kept, dict) else {})
        if unread and strict:
            raise unread_error(unread)
    shutil.rmtree(parts_folder)
    size = sum(chunk.size for chunk in chunks)
    documents, seconds = count_documents(out, key, format), time.perf_counter() - began
    return Prepared(
        out, size, chunks[0].unit, documents, seconds, unread, files_by_kind(chunks), left
    )


def _joined(parts: Sequence[Path], out: Path, key: str, format: Format) -> dict[str, bool]:
    """Join the parts of each split in ``out``; which splits have a document."""
    if format == "megatron":
        return {split: join_parts_to_megatron(parts, split, out, key) for split in SPLITS}
    return {split: join_parts(parts, split, out) is not None for split in SPLITS}


def _load(path: Path, began: float) -> Tokenizer:
    with reported("loading the tokenizer", began):
        return load_tokenizer(path)


def _held_out(sources: Sequence[PathLike], purpose: str) -> list[Path]:
    """The files and folders of all inputs that are for ``purpose``, "validation" or "test"."""
    return [*held_out(sources, purpose), *held_out_on_hub(sources, purpose)]


def _check_paths(out: PathLike, tokenizer: PathLike | None, train_tokenizer: int) -> None:
    for name, path in (("out", out), ("tokenizer", tokenizer)):
        if path == "":
            raise DataError(f"`{name}` is empty; give a path")
    if (tokenizer is None) == (train_tokenizer == 0):
        raise DataError("give either `tokenizer`, a path, or `train_tokenizer`, a size")


def _check_ranges(
    validation: float, train_tokenizer: int, workers: int, limit: int, max_document: int
) -> None:
    if not 0 <= validation < 1:
        raise DataError(f"`validation={validation}` is not a number of 0 or more and below 1")
    for name, value, least in (
        ("train_tokenizer", train_tokenizer, 0),
        ("workers", workers, 1),
        ("limit", limit, 0),
        ("max_document", max_document, 1),
    ):
        if value < least:
            raise DataError(f"`{name}={value}` is below {least}; use {least} or more")


def _template_source(template: str, system: str) -> str:
    """The text of a template; DataError if it would not use the system prompt."""
    source = source_of(template)
    variables = Program(source, f"template {template}").variables
    if system and variables.isdisjoint(("messages", "system")):
        raise unused(template, "system")
    return source


def _for_tokenizer(draft: Settings, tokenizer: Tokenizer, bos_by_tokenizer: bool) -> Settings:
    """Settings for a tokenizer: its fingerprint, and those special tokens that it has or adds."""
    assert isinstance(draft, TextSettings | InstructSettings)
    return replace(
        draft,
        tokenizer=tokenizer.fingerprint,
        bos=draft.bos
        and (tokenizer.adds_bos if bos_by_tokenizer else tokenizer.bos_id is not None),
        eos=draft.eos and tokenizer.eos_id is not None,
    )


def _speed_up(tokenizer: Tokenizer, chunks: Sequence[Chunk]) -> None:
    """Encode by the faster engine if the text is worth loading it."""
    paths = {Path(path) for chunk in chunks for path in chunk.files}
    text_bytes = sum(path.stat().st_size * (PACKED if is_compressed(path) else 1) for path in paths)
    if text_bytes >= LEAST_BYTES and (why := tokenizer.speed_up()):
        logger.info(
            "%s: %s, so its own engine, which is slower, encodes the text", tokenizer.path, why
        )
