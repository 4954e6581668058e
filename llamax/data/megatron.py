"""Megatron's indexed datasets, ``PREFIX.bin`` and ``PREFIX.idx``: read in place, and written.

::

    PREFIX.bin   the tokens of all sequences, end to end
    PREFIX.idx   magic "MMIDIDX\\0\\0", version 1 (uint64), dtype code (uint8)
                 number of sequences n, number of document marks d (uint64)
                 tokens of each sequence (int32 x n), where it begins in bytes (int64 x n)
                 documents: sequences [marks[i], marks[i + 1]) are document i (int64 x d)
                 modes (int8 x n), of multimodal data only

All integers are little-endian.  These are the files of Megatron-LM, NeMo and NeMo Megatron on
Neuron ("mmap").  Nothing is converted and memory does not grow with the corpus: both files are
mapped, and the tables of positions and of documents are searched in the file.

The format has no checksums and names no tokenizer.  Checked are the sizes of both files, that
sequences lie end to end, and that every token is in the model's vocabulary.

Source: megatron/core/datasets/indexed_dataset.py of Megatron-LM, for the layout.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from llamax.data.header import Header
from llamax.data.search import first_at_least, inside
from llamax.data.shuffle import Integers
from llamax.data.stream import GoOn, Stream
from llamax.data.token_file import TokenFile, Verify
from llamax.runtime.errors import DataError
from llamax.runtime.files import new_file, plain_file, refuse_link, sync_folder, sync_handle
from llamax.runtime.mapping import check_size, map_file

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
CODES = {np.dtype(name): code for code, name in DTYPES.items()}
TABLES = 34  # bytes before the tables of an .idx file
LARGEST_U2 = 65_500  # larger vocabularies take int32
CHUNK = 2**20  # elements checked at a time
SAMPLED = 1000  # documents looked at for the token with which all begin


def is_prefix(path: str | Path) -> bool:
    """Whether there is an .idx or a .bin file of this prefix."""
    return any(Path(f"{path}{suffix}").is_file() for suffix in (".idx", ".bin"))


def indexed_prefix(folder: Path, split: str, key: str) -> Path:
    """The prefix of a split that ``llamax prepare`` writes, named as Megatron names it."""
    return folder / f"{split}_{key}_document"


class IndexedFile(Stream):
    """A mapped Megatron dataset: ``tokens`` [tokens] and ``documents`` [documents + 1].

    ``verify`` sets when tokens are checked against ``vocab_size`` (0: unknown); ``header`` is what
    another file states about the dataset.  Raises DataError if a file is missing or of another
    format, or if the two files disagree.
    """

    def __init__(
        self,
        prefix: str | Path,
        verify: Verify = "start",
        vocab_size: int = 0,
        header: Header | None = None,
    ) -> None:
        self.path, self.vocab_size, self.checks = Path(prefix), vocab_size, verify
        index, data = (Path(f"{prefix}{suffix}") for suffix in (".idx", ".bin"))
        (self._index, self.identity), (self._data, _) = _map(index), _map(data)
        if len(self._index) < TABLES or bytes(self._index[: len(MAGIC)]) != MAGIC:
            raise DataError(
                f"{index}: is not a Megatron index of kind mmap (it begins with "
                f"{bytes(self._index[: len(MAGIC)])!r}, not {MAGIC!r}); prepare it with "
                "--dataset-impl mmap"
            )
        version, code, n, d = struct.unpack_from("<QBQQ", self._index, len(MAGIC))
        if version != VERSION or code not in DTYPES:
            raise DataError(
                f"{index}: has version {version} and dtype code {code}; llamax reads version "
                f"{VERSION} and codes {min(DTYPES)} to {max(DTYPES)}"
            )
        self.dtype = np.dtype(DTYPES[code])
        size = TABLES + 12 * n + 8 * d
        if len(self._index) not in (size, size + n):  # with modes
            raise DataError(
                f"{index}: has {len(self._index)} bytes, but its {n} sequences and {d} document "
                f"marks take {size}; copy it again"
            )
        self.lengths: npt.NDArray[np.int32] = np.frombuffer(self._index, "<i4", n, TABLES)
        self.pointers: npt.NDArray[np.uint64] = np.frombuffer(self._index, "<u8", n, TABLES + 4 * n)
        self.marks: Integers = np.frombuffer(self._index, "<i8", d, TABLES + 12 * n)
        width = self.dtype.itemsize
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * width if n else 0
        if end != len(self._data):
            raise DataError(
                f"{data}: has {len(self._data)} bytes, but {index} says {end}; the files belong to "
                "different datasets, or one is cut short: copy both again"
            )
        if n and (not d or self.marks[0] != 0 or self.marks[-1] != n):
            marked = f"sequences {self.marks[0]} to {self.marks[-1]}" if d else "not marked"
            raise DataError(
                f"{index}: its documents are {marked}, but it has {n}; prepare it again"
            )
        if self.dtype.kind == "f":
            raise DataError(f"{data}: holds {self.dtype.name} numbers, not tokens; give token ids")
        self.tokens = np.frombuffer(self._data, self.dtype)
        self._check_sequences(0, SAMPLED)
        self.header = header or Header("", 0, bos_id=self._first_token())

    def sequence(self, number: int) -> npt.NDArray[Any]:
        """The tokens of a sequence, a view."""
        start = int(self.pointers[number]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[number])]

    @property
    def num_documents(self) -> int:
        return max(len(self.marks) - 1, 0)

    @cached_property
    def documents(self) -> npt.NDArray[np.uint64]:  # type: ignore[override]  # made when it is used
        self._check_marks(0, len(self.marks))
        found = self._begins(self.marks).astype(np.uint64)
        if (found[1:] < found[:-1]).any():  # damage beyond the sequences checked at opening
            self._check_sequences(0, len(self.lengths))
        return found

    def bounds(self, documents: Integers) -> tuple[Integers, Integers]:
        """The first token of each of these documents, and one after its last."""
        first, stop = self.marks[documents], self.marks[documents + 1]
        for place in np.flatnonzero((first < 0) | (stop < first) | (stop > len(self.lengths)))[:1]:
            self._check_marks(int(documents[place]), int(documents[place]) + 2)
        starts, stops = self._begins(first), self._begins(stop)
        if (stops < starts).any():  # damage beyond the sequences checked at opening
            self._check_sequences(0, len(self.lengths))
        return starts, stops

    def begins(self, starts: Integers, stops: Integers) -> tuple[Integers, Integers]:
        """The documents that begin inside windows: (window, first token) of each.

        Only the parts of the tables that the search visits are read.
        """
        unit = self.dtype.itemsize
        first = first_at_least(self.pointers, starts * unit + 1)
        stop = first_at_least(self.pointers, stops * unit)
        windows, documents = inside(self.marks, first - 1, stop)
        marks = self.marks[documents]
        wrong = (marks < first[windows]) | (marks >= stop[windows])
        wrong[1:] |= (marks[1:] < marks[:-1]) & (windows[1:] == windows[:-1])
        if wrong.any():
            self._check_marks(0, len(self.marks))
        return windows, self._begins(marks)

    def _begins(self, sequences: Integers) -> Integers:
        """The first token of each of these sequences; for one after the last, all tokens."""
        last = len(self.lengths) - 1
        begins = self.pointers[np.clip(sequences, 0, last)].astype(np.int64) // self.dtype.itemsize
        found: Integers = np.where(sequences > last, len(self), begins)
        return found

    def _check_marks(self, start: int, stop: int) -> None:
        marks = self.marks[start:stop]
        outside = (marks < 0) | (marks > len(self.lengths))
        outside[1:] |= marks[1:] < marks[:-1]
        for wrong in np.flatnonzero(outside)[:1].tolist():
            raise DataError(
                f"{self.path}.idx: document {start + max(wrong - 1, 0)} ends before it begins or "
                f"after the last sequence, at sequence {marks[wrong]}; prepare it again"
            )

    def verify(self, share: int = 0, of: int = 1, go_on: GoOn | None = None) -> None:
        """Check part ``share`` of ``of``: sequences lie end to end, tokens are in the vocabulary.

        ``go_on`` is called now and then; checking ends early when it returns False.
        """
        for start in range(share * CHUNK, max(len(self.lengths), len(self.marks)), of * CHUNK):
            self._check_sequences(start, start + CHUNK)
            self._check_marks(start, start + CHUNK + 1)
        for start in range(share * CHUNK, len(self), of * CHUNK):
            if go_on and not go_on():
                return
            self._check(start, start + CHUNK)

    def touch(self, starts: Integers, stops: Integers, section: str = "tokens") -> None:
        """Check the length, and tokens starts[i]:stops[i] if ``verify`` is "read"."""
        check_size(self._data, Path(f"{self.path}.bin"))
        if self.checks == "read" and section == "tokens":
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
                self._check(start, stop)

    def _check_sequences(self, start: int, stop: int) -> None:
        lengths, begins = self.lengths[start:stop], self.pointers[start : stop + 1]
        ends = begins[: len(lengths)] + lengths.astype(np.uint64) * np.uint64(self.dtype.itemsize)
        wrong = np.flatnonzero(ends[: len(begins) - 1] != begins[1:]).tolist()
        if start == 0 and len(begins) and begins[0]:
            wrong = [-1]
        if wrong:
            raise DataError(
                f"{self.path}.idx: sequence {start + wrong[0] + 1} does not begin where the one "
                "before it ends; prepare it again"
            )
        if (short := lengths.min(initial=0)) < 0:
            raise DataError(f"{self.path}.idx: a sequence has {short} tokens; prepare it again")

    def _check(self, start: int, stop: int) -> None:
        part = self.tokens[start:stop]
        if self.vocab_size and len(part):
            low, high = int(part.min()), int(part.max())
            if low < 0 or high >= self.vocab_size:
                wrong = low if low < 0 else high
                raise DataError(
                    f"{self.path}.bin: token {wrong} near place {start} is outside "
                    f"model.vocab_size={self.vocab_size}; it was made with another tokenizer"
                )

    def _first_token(self) -> int | None:
        """The token with which the first documents begin; None if they differ."""
        starts = self.pointers[:SAMPLED] // np.uint64(self.dtype.itemsize)
        first = np.unique(self.tokens[starts[self.lengths[:SAMPLED] > 0]])
        return int(first[0]) if len(first) == 1 and len(starts) > 1 else None


def _map(path: Path) -> tuple[mmap.mmap | bytes, str]:
    """A mapped file, and its place, size and time, since it has no checksums."""
    try:
        with open(path, "rb", opener=plain_file) as file:
            stat = os.fstat(file.fileno())
            facts = path.resolve(), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
            identity = " ".join(map(str, facts))
            return map_file(file.fileno(), path) if stat.st_size else b"", identity
    except OSError as error:
        raise DataError(
            f"{path}: cannot be opened ({error.strerror}); a Megatron dataset is PREFIX.idx and "
            "PREFIX.bin, and is named by its prefix"
        ) from None


# --- writing -------------------------------------------------------------------------------------


def write_indexed(prefix: Path, files: Sequence[TokenFile], vocab_size: int) -> int:
    """Join token files into ``prefix.bin`` and ``prefix.idx``; the number of documents written.

    Writes the same bytes as Megatron's builder: uint16 for vocabularies below 65,500, else int32;
    documents without tokens are left out.  Both files appear whole, the index last, or not at all.
    """
    dtype = np.dtype("<u2" if vocab_size < LARGEST_U2 else "<i4")
    index, data = (Path(f"{prefix}{suffix}") for suffix in (".idx", ".bin"))
    partial = [path.with_name(f".{path.name}.partial") for path in (index, data)]
    for path in (index, data, *partial):
        refuse_link(path)
    try:
        with open(partial[1], "wb", opener=new_file) as body:
            for file in files:
                for start in range(0, len(file), CHUNK):
                    body.write(file.tokens[start : start + CHUNK].astype(dtype).tobytes())
                    file.release()
            _sync(body)
        count = sum(len(_lengths(file)) for file in files)
        with open(partial[0], "wb", opener=new_file) as head:
            head.write(MAGIC + struct.pack("<QBQQ", VERSION, CODES[dtype], count, count + 1))
            for file in files:
                head.write(_lengths(file).astype("<i4").tobytes())
            offset = 0
            for file in files:
                lengths = _lengths(file) * dtype.itemsize
                head.write((offset + np.cumsum(lengths) - lengths).astype("<i8").tobytes())
                offset += int(lengths.sum())
            for start in range(0, count + 1, CHUNK):
                head.write(np.arange(start, min(start + CHUNK, count + 1), dtype="<i8").tobytes())
            _sync(head)
        os.replace(partial[1], data)
        os.replace(partial[0], index)
        sync_folder(prefix.parent)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    return count


def _lengths(file: TokenFile) -> Integers:
    """The length of each document that has tokens."""
    lengths = np.diff(file.documents.astype(np.int64))
    return lengths[lengths > 0]


def _sync(file: IO[bytes]) -> None:
    file.flush()
    sync_handle(file.fileno(), Path(file.name))
