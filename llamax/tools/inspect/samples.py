"""Samples of a dataset as training takes them: tokens of documents, and which of them are learnt.

::

    dataset, blend, file or run ──> Samples ──┬─ spread evenly over the split
                                              └─ seed: the first samples of a run
    sample ──> parts of documents ──> Shown: text, names of special tokens, learnt or not
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamax.checkpoint.listing import newest_checkpoint
from llamax.checkpoint.places import find_folder
from llamax.config.data_path import blend_words
from llamax.config.load import config_in
from llamax.config.schema import DataConfig
from llamax.config.step_folders import MANIFEST
from llamax.data.blended_loader import turns
from llamax.data.dataset import Dataset, Split, open_dataset
from llamax.data.packing import Packs
from llamax.data.samples import Samples
from llamax.data.shuffle import Integers
from llamax.data.stream import Stream
from llamax.data.token_file import TokenFile
from llamax.data.tokenizer.streaming import Detokenizer
from llamax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from llamax.parallel.mesh import ALONE
from llamax.runtime.errors import ConfigError, DataError

LENGTH = 512  # tokens of a sample, unless a run or the user gives another


class Piece(NamedTuple):
    """Text of neighbouring tokens, or the name of one special token."""

    text: str
    learnt: bool
    special: bool = False


@dataclass(frozen=True)
class Part:
    """A document in a sample, or the part of it that the sample takes.

    ``document`` is its number in the file, from 1; ``start`` its first token here, and ``missing``
    the tokens that follow.
    """

    document: int
    start: int
    missing: int
    ids: tuple[int, ...]
    learnt: tuple[bool, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Shown:
    """A sample: its number of ``total``, from 0, and the file it is from."""

    number: int
    total: int
    file: Path
    how: str
    parts: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        """The number of its tokens."""
        return sum(len(part.ids) for part in self.parts)

    @property
    def learnt(self) -> int:
        """The number of tokens that are labels."""
        return sum(map(sum, (part.learnt for part in self.parts)))


def read_samples(
    path: Path | str,
    count: int,
    *,
    split: str = "train",
    length: int = 0,
    seed: int | None = None,
    tokenizer: Path | str = "",
) -> list[Shown]:
    """``count`` samples of a dataset, a token file, a blend or the data of a run.

    They are spread evenly over the split.  With ``seed`` they are the first of a run with that
    run.seed; of a run they are its first.  ``length`` in tokens; 0: that of the run, or 512.

    Raises DataError where there is no dataset, split or tokenizer.
    """
    for name, value in (("sample", count), ("length", length + 1)):
        if value < 1:
            raise ConfigError(f"`{name}={value}` is out of range; use 1 or more")
    dataset, data, seed = _open(path, split, seed)
    data = replace(data, sequence_length=length or data.sequence_length)
    words = _tokenizer(dataset, tokenizer)
    chosen = _split(dataset, split, path)
    samples = Samples(chosen, data, seed or 0)
    return [
        _show(part, number, words)
        for part, number in _pick(samples, min(count, len(samples)), seed)
    ]


def _open(path: Path | str, split: str, seed: int | None) -> tuple[Dataset, DataConfig, int | None]:
    """The dataset at a path, the settings of its samples, and the seed of their order."""
    data, place = DataConfig(sequence_length=LENGTH), Path(path)
    run = newest_checkpoint(place) if place.is_dir() else None
    if place.is_dir() and (run or (place / MANIFEST).is_file()):
        config = config_in(run or place)
        if config is None:
            raise DataError(f"{path}: keeps no configuration that names its data; give the dataset")
        validation = split == "validation" and bool(config.data.validation)
        named = config.data.validation if validation else config.data.path
        found = None if blend_words(named) else find_folder(named, run or place)
        data = replace(config.data, global_batch=1, micro_batch=1)
        seed = config.run.seed if seed is None else seed
        opened = open_dataset(found or named, "read", config.model.vocab_size)
        return (replace(opened, validation=opened.train) if validation else opened), data, seed
    if place.suffix == ".tokens":
        return open_dataset(place.parent, "read"), data, seed
    if place.suffix in (".bin", ".idx"):
        place = place.with_suffix("")
    return open_dataset(path if blend_words(str(path)) else place, "read"), data, seed


def _split(dataset: Dataset, split: str, path: Path | str) -> Split:
    """The split of a dataset, or the token file at ``path``."""
    if Path(path).suffix == ".tokens":
        return TokenFile(path, "read")
    splits = {"train": dataset.train, "validation": dataset.validation}
    found = splits.get(split)
    if found is None and (dataset.folder / f"{split}.tokens").is_file():
        found = TokenFile(dataset.folder / f"{split}.tokens", "read")
    if found is None:
        names = [name for name, part in splits.items() if part is not None]
        names += [p.stem for p in sorted(dataset.folder.glob("*.tokens")) if p.stem not in names]
        raise DataError(f"{path}: has no split {split}; use `split` {', '.join(names)}")
    return found


def _tokenizer(dataset: Dataset, given: Path | str) -> Tokenizer:
    """The tokenizer of a dataset: the given one, or that beside its tokens."""
    if not given and dataset.tokenizer_path is None:
        raise DataError(
            f"{dataset.folder}: names no tokenizer, so its tokens cannot be shown as text; give it "
            "with `tokenizer`"
        )
    found = load_tokenizer(given or dataset.tokenizer_path or "")
    dataset.check_tokenizer(found.fingerprint, str(found.path))
    return found


def _pick(samples: Samples, count: int, seed: int | None) -> Iterator[tuple[Samples, int]]:
    """(samples of a file, number among them) of the samples to show; see ``read_samples``."""
    parts = samples.parts or [samples]
    firsts: Integers = np.cumsum([0, *map(len, parts)])
    if seed is not None:
        order = samples.loader(ALONE, 0, shuffle=True).order(np.arange(count))
        for number in order.tolist():
            part = int(np.searchsorted(firsts, number, "right")) - 1
            yield parts[part], number - int(firsts[part])
        return
    turn = turns(samples.weights)[:count] if samples.parts else np.zeros(count, np.int64)
    shares = [int((turn == part).sum()) for part in range(len(parts))]
    taken = [0] * len(parts)
    for part in turn.tolist():
        total = len(parts[part])
        yield parts[part], min(taken[part] * total // shares[part], total - 1)
        taken[part] += 1


def _show(samples: Samples, number: int, tokenizer: Tokenizer) -> Shown:
    """A sample of a file as text."""
    file, length, packs = samples.file, samples.data.sequence_length, samples.packs
    ranges = _packed(packs, number) if packs is not None else _window(file, number, length)
    parts = []
    for document, start, stop in ranges:
        begin, end = (int(each[0]) for each in file.bounds(np.array([document])))
        places = np.arange(start, stop)
        file.touch(places[:1], places[-1:] + 1)
        learnt = np.ones(stop - start, bool)
        if samples.answers and file.masked:
            file.touch(places[:1], places[-1:] + 1, "counted")
            learnt = file.counted(places)
        # The first of a document, and of a sample, is only an input.
        learnt[0] = False
        ids = file.tokens[start:stop].tolist()
        pieces = (*pieces_of(ids, learnt.tolist(), tokenizer),)
        parts.append(
            Part(document + 1, start - begin, end - stop, (*ids,), (*map(bool, learnt),), pieces)
        )
    how = packs.way if packs is not None else "concat"
    return Shown(number, len(samples), file.path, f"{how} at {length}", tuple(parts))


def _packed(packs: Packs, number: int) -> Iterator[tuple[int, int, int]]:
    """(document, first token, one after the last) of the documents of a packed sample."""
    documents = packs.documents(number)
    bounds = (each.tolist() for each in packs.file.bounds(documents))
    for document, start, stop in zip(documents.tolist(), *bounds, strict=True):
        yield document, start, min(stop, start + packs.length + 1)


def _window(file: Stream, number: int, length: int) -> Iterator[tuple[int, int, int]]:
    """(document, first token, one after the last) of the documents in a window of the stream."""
    start, end = number * length, min(len(file), (number + 1) * length + 1)
    offsets = file.documents
    file.touch(np.zeros(1, np.int64), np.full(1, len(offsets)), "documents")
    while start < end:
        document = int(np.searchsorted(offsets, start, "right")) - 1
        stop = min(end, int(offsets[document + 1])) if document + 1 < len(offsets) else end
        yield document, start, stop
        start = stop


def pieces_of(ids: Sequence[int], learnt: Sequence[bool], tokenizer: Tokenizer) -> Iterator[Piece]:
    """The text of ids, cut where learning begins or ends and at special tokens.

    A character of several tokens belongs to its last one.
    """
    names = {number: name for name, number in tokenizer.special.items()}
    decoder = Detokenizer(tokenizer.decode)
    text, now = "", False
    for number, learns in zip(ids, learnt, strict=True):
        named = names.get(number) or ("" if number < tokenizer.vocab_size else f"<{number}>")
        added = decoder.finish() if named else decoder.feed(number)
        if named:
            text += added
        if text and (named or (added and learns != now)):
            yield Piece(text, now)
            text = ""
        if named:
            yield Piece(named, learns, special=True)
        elif added:
            text, now = text + added, learns
    if text := text + decoder.finish():
        yield Piece(text, now)
