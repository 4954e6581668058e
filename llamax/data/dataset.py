"""The dataset that ``data.path`` names: a folder, a Megatron prefix, or a blend of several.

=============================================  ===================================================
``data``                                       a folder that ``llamax prepare`` made
``/fsx/data/redpajama_text_document``          a Megatron dataset: this prefix .bin and .idx
``0.7 /fsx/web 0.3 /fsx/books_text_document``  a blend: weights, and datasets of either kind
``random``                                     random tokens of the model's vocabulary
=============================================  ===================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamax.config.data_path import RANDOM, blend_words, weight_of
from llamax.data.chat.record import PromptRecord
from llamax.data.header import Header
from llamax.data.megatron import IndexedFile, indexed_prefix, is_prefix
from llamax.data.not_a_dataset import not_a_dataset
from llamax.data.random_stream import TRAINING, VALIDATION, RandomStream
from llamax.data.stream import GoOn, Stream
from llamax.data.token_file import TokenFile, Verify
from llamax.data.tokenizer.tokenizer import fingerprint_of_file
from llamax.runtime.errors import DataError
from llamax.runtime.files import is_file_name
from llamax.runtime.json_reader import JsonError, read_object

SCANNED = 1 << 24  # tokens looked at together


@dataclass(frozen=True)
class Mixture:
    """A blend of streams: ``weights`` are the shares of samples that come from each."""

    parts: tuple[Stream, ...]
    weights: tuple[float, ...]

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @property
    def header(self) -> Header:
        """The header of the first stream, with the largest vocabulary of all."""
        return replace(
            self.parts[0].header, vocab_size=max(part.header.vocab_size for part in self.parts)
        )

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def verify(self, share: int = 0, of: int = 1, go_on: GoOn | None = None) -> None:
        """Check part ``share`` of ``of`` of each stream; see ``Dataset.verify``."""
        for part in self.parts:
            part.verify(share, of, go_on)


Split = Stream | Mixture


@dataclass(frozen=True)
class Dataset:
    """An open dataset; ``validation`` is None if there are no documents for it."""

    folder: Path
    train: Split
    validation: Split | None
    tokenizer_path: Path | None = None  # of a blend: that of the first part that has one
    prompt: PromptRecord | None = None  # likewise; None for text

    @property
    def fingerprint(self) -> str | None:
        """sha256 of the tokenizer that made the tokens; None if the files do not name it."""
        known = (stream.header.tokenizer for stream in streams(self.train))
        return next(filter(None, known), None)

    def check_tokenizer(self, fingerprint: str | None, other: str) -> None:
        """Raise DataError if the tokens come from another tokenizer than ``other``."""
        if fingerprint and self.fingerprint and fingerprint != self.fingerprint:
            raise DataError(
                f"{self.folder}: made with tokenizer {self.fingerprint[:12]}, but {other} was made "
                f"with tokenizer {fingerprint[:12]}; prepare the data with that one"
            )

    def verify(self, share: int = 0, of: int = 1, go_on: GoOn | None = None) -> None:
        """Check part ``share`` of ``of`` of the data, so that ranks can divide the work.

        ``go_on`` is called now and then; checking ends early when it returns False.  Raises
        DataError for damaged data.
        """
        for file in (self.train, self.validation):
            if file is not None:
                file.verify(share, of, go_on)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError if a model of ``vocab_size`` cannot embed every token.

        A tokenizer may have tokens that no text contains.
        """
        for stream in (*streams(self.train), *streams(self.validation)):
            tokens = stream.header.vocab_size
            if tokens > vocab_size and largest_id(stream) >= vocab_size:
                raise DataError(
                    f"{stream.path}: its tokenizer has {tokens} tokens, and model.vocab_size="
                    f"{vocab_size} is fewer; set model.vocab_size={tokens} or more, or prepare "
                    "with another tokenizer"
                )


def streams(split: Split | None) -> tuple[Stream, ...]:
    """The streams of a split: those of a blend, or itself."""
    if split is None:
        return ()
    return split.parts if isinstance(split, Mixture) else (split,)


def largest_id(stream: Stream) -> int:
    """The largest token in a stream; -1 if there are none."""
    starts = range(0, len(stream.tokens), SCANNED)
    return max((int(stream.tokens[at : at + SCANNED].max()) for at in starts), default=-1)


def open_dataset(path: str | Path, verify: Verify = "start", vocab_size: int = 0) -> Dataset:
    """Open the dataset that ``path`` names, as in the table above.

    ``vocab_size``: the model's, for files that do not name theirs.  Raises DataError if the dataset
    is missing, unfinished or damaged, or if the parts of a blend have different tokenizers.
    """
    if blend := blend_words(str(path)):
        return _open_blend(str(path), blend, verify, vocab_size)
    folder = Path(path)
    if str(path) == RANDOM:
        train, validation = (
            RandomStream(length, vocab_size, seed)
            for seed, length in enumerate((TRAINING, VALIDATION))
        )
        return Dataset(folder, train, validation)
    if (folder / "dataset.json").is_file():
        return _open_folder(folder, verify, vocab_size)
    if is_prefix(folder):
        return Dataset(folder, IndexedFile(folder, verify, vocab_size), None)
    raise not_a_dataset(folder)


def _open_folder(folder: Path, verify: Verify, vocab_size: int) -> Dataset:
    index = read_index(folder / "dataset.json")
    tokenizer = folder / str(index["tokenizer_file"])
    if not tokenizer.is_file():
        raise DataError(
            f"{tokenizer}: is missing, and dataset.json names it; copy it back, or run llamax "
            "prepare again"
        )
    splits: dict[str, Split] = {}
    found = fingerprint_of_file(tokenizer)
    for split, stream in _streams(folder, index, verify, vocab_size):
        splits[split] = stream
        if stream.header.tokenizer != found:
            raise DataError(
                f"{stream.path}: was not made with {tokenizer} (fingerprints "
                f"{stream.header.tokenizer[:12]} and {found[:12]}); copy the "
                "tokenizer back, or run llamax prepare again"
            )
    prompt = PromptRecord.of(index.get("prompt"))
    return Dataset(folder, splits["train"], splits.get("validation"), tokenizer, prompt)


def read_index(path: Path) -> dict[str, Any]:
    """The content of dataset.json; DataError if llamax prepare did not write it."""
    remedy = "copy it again, or run llamax prepare again"
    try:
        index = read_object(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except JsonError as error:
        raise DataError(f"{path}: {error}; {remedy}") from None
    name = index.get("tokenizer_file")
    if not is_file_name(name):
        raise DataError(f"{path}: names no tokenizer beside it; {remedy}")
    for key, fits in INDEX_FIELDS.items():
        if (value := index.get(key)) is not None and not fits(value):
            raise DataError(f"{path}: {key}={value!r:.60} was not written by llamax; {remedy}")
    names = [index.get(name) for name in ("key", "tokenizer")]
    if index.get("indexed") and not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: names no key and tokenizer of its files; {remedy}")
    return index


def _is_indexed(value: object) -> bool:
    """Whether a value has the fields of a header that files of Megatron lack."""
    if not isinstance(value, dict) or not {"vocab_size"} <= {*value} <= HEADER_FIELDS:
        return False
    return all(
        (number is None and name != "vocab_size") or (type(number) is int and 0 <= number < 2**32)
        for name, number in value.items()
    )


def _is_counts(value: object) -> bool:
    """Whether a value is a table of whole numbers."""
    return isinstance(value, dict) and all(type(number) is int for number in value.values())


HEADER_FIELDS = {"vocab_size", "bos_id", "eos_id"}
INDEX_FIELDS: dict[str, Callable[[object], bool]] = {
    "indexed": _is_indexed,
    "unread": _is_counts,
    "key": lambda value: isinstance(value, str) and is_file_name(f"{value}_document.idx"),
    "identity": lambda value: isinstance(value, str),
}


def _streams(
    folder: Path, index: dict[str, Any], verify: Verify, vocab_size: int
) -> Iterator[tuple[str, Stream]]:
    """The splits of a folder of either format."""
    for split in ("train", "validation"):
        if indexed := index.get("indexed"):
            prefix = indexed_prefix(folder, split, str(index["key"]))
            if split == "train" or is_prefix(prefix):
                header = Header(str(index["tokenizer"]), **indexed)
                yield split, IndexedFile(prefix, verify, vocab_size, header)
        elif split == "train" or (folder / f"{split}.tokens").exists():
            yield split, TokenFile(folder / f"{split}.tokens", verify)


def _open_blend(path: str, words: list[str], verify: Verify, vocab_size: int) -> Dataset:
    weights = [weight_of(word) or 0.0 for word in words[::2]]
    wrong = next((w for w, weight in zip(words[::2], weights, strict=True) if not weight), None)
    if len(words) % 2 or wrong is not None:
        problem = (
            "a weight has no dataset" if wrong is None else f"{wrong!r} is not a weight above 0"
        )
        raise DataError(
            f"blend {path!r}: {problem}; write weights and datasets in turn: 0.7 web 0.3 books"
        )
    places = [Path(word).resolve() for word in words[1::2]]
    if twice := [
        word for word, n in zip(words[1::2], map(places.count, places), strict=True) if n > 1
    ]:
        raise DataError(
            f"blend {path!r}: {twice[0]} is there twice, and would give each sample twice; "
            "write it once, with the sum of its weights"
        )
    parts = [open_dataset(word, verify, vocab_size) for word in words[1::2]]
    known = {part.fingerprint: part for part in parts if part.fingerprint}
    if len(known) > 1:
        first, second, *_ = known.values()
        raise DataError(
            f"{first.folder} and {second.folder} were made with different tokenizers "
            f"({(first.fingerprint or '')[:12]} and {(second.fingerprint or '')[:12]}); prepare "
            "both with one"
        )
    pairs = list(zip(parts, weights, strict=True))
    held_out = [(part.validation, w) for part, w in pairs if part.validation is not None]
    return Dataset(
        Path(path),
        _mixture([(part.train, weight) for part, weight in pairs]),
        _mixture(held_out) if held_out else None,
        next((part.tokenizer_path for part in parts if part.tokenizer_path), None),
        next((part.prompt for part in parts if part.prompt), None),
    )


def _mixture(pairs: list[tuple[Split, float]]) -> Mixture:
    streams = [(part, weight) for part, weight in pairs if not isinstance(part, Mixture)]
    return Mixture(tuple(part for part, _ in streams), tuple(weight for _, weight in streams))
