"""The parts of a dataset: tokenized in parallel, kept when the program is killed, joined in order.

The name of a part is a hash of everything that decides its bytes (the settings, the tokenizer, and
the path, size and time of the text), and a part appears whole or not at all.  So a second run uses
the parts that it finds, and the result is the same bytes for any number of workers and after any
kill.  The hash of a document's text decides its split: copies of one text never lie in both splits,
and the order of the inputs does not matter.
"""

from __future__ import annotations

import errno
import hashlib
import json
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from llamax.data.header import Header
from llamax.data.megatron import indexed_prefix, write_indexed
from llamax.data.prepare.progress import Progress, count_tokens, start_worker
from llamax.data.prepare.unread import count_names
from llamax.data.token_file import TokenFile, TokenWriter
from llamax.data.tokenizer.tokenizer import Tokenizer
from llamax.runtime.errors import DataError
from llamax.runtime.files import show_free, write_atomic
from llamax.runtime.json_reader import read_object

COPIED = 2**20  # tokens copied at once
# Work for which no other processes are started, as each costs a twentieth of a second: in all so
# many processor seconds, in chunks of at most so many bytes.
ALONE_S, ALONE_BYTES = 0.5, 2**22
SPLITS = ("train", "validation", "test")


class Encoded(NamedTuple):
    """Documents of one split: the ids of each, which of them count (None: all), bytes of text.

    ``unread``: names of columns and keys that are not in the text, with their numbers of rows;
    ``more``: the ids go on in the next documents of this split, which end the document.
    """

    split: str
    ids: list[npt.NDArray[np.uint32]]
    counted: list[npt.NDArray[np.bool_]] | None
    text_bytes: int
    unread: Mapping[str, int] = MappingProxyType({})
    more: bool = False


class Chunk(Protocol):
    """The source of a part; ``size`` is in ``unit``, "B" or "row"."""

    @property
    def unit(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def files(self) -> Mapping[str, str]:
        """The kind of each file, "rows" or "text", by its path."""


class Settings(Protocol):
    """What decides the bytes of a dataset, besides its inputs.

    ``tokenizer`` is a fingerprint; ``bos`` and ``eos``: whether documents begin and end with them.
    """

    @property
    def tokenizer(self) -> str: ...
    @property
    def bos(self) -> bool: ...
    @property
    def eos(self) -> bool: ...

    def name(self, number: int, chunk: Any) -> str:
        """The name of a part: equal names, equal bytes."""

    def encode(self, chunk: Any, tokenizer: Tokenizer) -> Iterator[Encoded]:
        """The documents of a chunk, some at a time."""


Job = tuple[Path, str, Chunk, Settings]  # folder and name of a part, and what it is made of


def part_name(number: int, *values: object) -> str:
    """The name of a part; ``values``, fit for JSON, are all that decides its bytes."""
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    return f"{number:06d}-{digest[:16]}"


def header_of(settings: Settings, tokenizer: Tokenizer) -> Header:
    """The header of the token files, but for counts."""
    return Header(
        settings.tokenizer,
        tokenizer.vocab_size,
        tokenizer.bos_id if settings.bos else None,
        tokenizer.eos_id if settings.eos else None,
    )


def make_part(
    folder: Path,
    name: str,
    chunk: Chunk,
    settings: Settings,
    tokenizer: Tokenizer,
    count: Callable[[int], None] = count_tokens,
) -> None:
    """Tokenize a chunk into ``folder/name.SPLIT.tokens``; ``count`` receives numbers of tokens.

    What was not read is written to ``folder/name.unread.json``.

    Files that are there and pass their checksums are kept.
    """
    paths = [folder / f"{name}.{split}.tokens" for split in SPLITS]
    report = folder / f"{name}.unread.json"
    if report.exists() and all(map(_is_complete, paths)):
        return
    header = header_of(settings, tokenizer)
    with disk_space(folder, chunk.size_bytes * header.dtype.itemsize), ExitStack() as stack:
        writers = {
            split: stack.enter_context(TokenWriter(path, header, durable=False))
            for split, path in zip(SPLITS, paths, strict=True)
        }
        missed: Counter[str] = Counter()
        for split, ids, counted, text_bytes, unread, more in settings.encode(chunk, tokenizer):
            lengths = np.array([len(each) for each in ids], np.int64)
            count(int(lengths.sum()))
            count_names(missed, unread)
            writers[split].add(
                np.concatenate([*ids, np.array([], np.uint32)]),
                lengths[:0] if more else lengths,
                text_bytes,
                None if counted is None else np.concatenate([*counted, np.array([], bool)]),
            )
        write_atomic(report, json.dumps(missed).encode())


def files_by_kind(chunks: Sequence[Chunk]) -> Mapping[str, int]:
    """The number of files of each kind that chunks are made of."""
    kinds = {path: kind for chunk in chunks for path, kind in chunk.files.items()}
    return Counter(kinds.values())


def unread_in(parts: Sequence[Path]) -> Counter[str]:
    """The names of what was not read in parts, with their numbers of rows."""
    total: Counter[str] = Counter()
    for part in parts:
        count_names(total, read_object(part.with_name(f"{part.name}.unread.json")))
    return total


def _is_complete(path: Path) -> bool:
    try:
        TokenFile(path)
    except DataError:
        return False
    return True


_tokenizer: Tokenizer  # in a worker


def _start_worker(shared: Any, tokenizer: Tokenizer) -> None:
    """Begin a worker process with a tokenizer, which it receives once."""
    global _tokenizer
    start_worker(shared)
    _tokenizer = tokenizer


def _make_part(folder: Path, name: str, chunk: Chunk, settings: Settings) -> None:
    """``make_part`` in a worker."""
    make_part(folder, name, chunk, settings, _tokenizer)


def make_parts(
    chunks: Sequence[Chunk],
    names: Sequence[str],
    folder: Path,
    settings: Settings,
    tokenizer: Tokenizer,
    workers: int,
    began: float | None = None,
) -> list[Path]:
    """Make all parts; their paths, without ``.SPLIT.tokens``, in order.

    This process makes the first one, and goes on where that shows that the others are little work;
    otherwise ``workers`` processes make them, if these are more than 1.  Shows its progress;
    ``names``: of the parts, as ``settings`` names them; ``began``: when the program did, on
    time.perf_counter.  Raises DataError for a mistake in a chunk, a full disk or a worker that
    died.
    """
    left = deque((folder, name, chunk, settings) for name, chunk in zip(names, chunks, strict=True))
    size, start_s, done_bytes = sum(chunk.size for chunk in chunks), time.process_time(), 0
    with Progress(size, chunks[0].unit, len(chunks), began) as progress:
        while left and (
            min(workers, len(left)) == 1
            or _is_little([job[2] for job in left], time.process_time() - start_s, done_bytes)
        ):
            job = left.popleft()
            make_part(*job, tokenizer, progress.count)
            progress.finish(job[2].size)
            done_bytes += job[2].size_bytes
        if left:
            _make_in_pool(left, tokenizer, workers, progress)
    return [folder / name for name in names]


def _is_little(left: Sequence[Chunk], done_s: float, done_bytes: int) -> bool:
    """Whether chunks are too little work to share, after so many processor seconds and bytes."""
    sizes = [chunk.size_bytes for chunk in left]
    short = 0 < sizes[0] <= ALONE_BYTES  # chunks of Parquet do not say their size
    return short and (not done_bytes or sum(sizes) * done_s / done_bytes <= ALONE_S)


def _make_in_pool(
    jobs: Sequence[Job], tokenizer: Tokenizer, workers: int, progress: Progress
) -> None:
    """Make parts with other processes; errors as in ``make_parts``."""
    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    # A fork shares the engines that this process has loaded; they have no threads.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    progress.share(context)
    with ProcessPoolExecutor(
        min(workers, len(jobs)), context, _start_worker, (progress.shared, tokenizer)
    ) as pool:
        try:
            # Ctrl-C reaches every process of a terminal: workers ignore it, this one acts.
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited
            try:
                futures: dict[Future[None], int] = {
                    pool.submit(_make_part, *job): job[2].size for job in jobs
                }
            finally:
                signal.signal(signal.SIGINT, handler)
            for future in as_completed(futures):
                future.result()
                progress.finish(futures[future])
        except (BrokenProcessPool, BrokenPipeError, KeyboardInterrupt) as error:
            # The pool does not end a worker that was still starting.
            for child in multiprocessing.active_children():
                child.kill()
            if isinstance(error, KeyboardInterrupt):
                raise
            raise DataError(
                f"a worker of {workers} died, perhaps because memory ran out; do the same "
                "again with fewer `workers`: finished parts are kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def join_parts(parts: Sequence[Path], split: str, out: Path) -> TokenFile | None:
    """Join the parts of a split into ``out/split.tokens``; None, and no file, if it is empty."""
    files = [TokenFile(part.with_name(f"{part.name}.{split}.tokens"), "off") for part in parts]
    path = out / f"{split}.tokens"
    if not any(map(len, files)):
        path.unlink(missing_ok=True)
        return None
    size = sum(sum(file.header.sections["checksums"]) for file in files)
    with disk_space(out, size), TokenWriter(path, files[0].header) as writer:
        for part in parts:
            _append(writer, TokenFile(part.with_name(f"{part.name}.{split}.tokens")))
    return TokenFile(path, "off")


def _append(writer: TokenWriter, file: TokenFile) -> None:
    """Append the documents of a file, COPIED tokens at a time."""
    ends, done = file.documents[1:].astype(np.int64), 0
    for start in range(0, len(file), COPIED):
        stop = min(start + COPIED, len(file))
        after = int(np.searchsorted(ends, stop, "right"))
        lengths = np.diff(ends[done:after], prepend=start)
        text_bytes = file.header.text_bytes if stop == len(file) else 0
        counted = file.counted(np.arange(start, stop)) if file.masked else None
        writer.add(file.tokens[start:stop], lengths, text_bytes, counted)
        file.release()
        done = after


def join_parts_to_megatron(parts: Sequence[Path], split: str, out: Path, key: str) -> bool:
    """Join the parts of a split into Megatron's two files; whether it has any document."""
    files = [TokenFile(part.with_name(f"{part.name}.{split}.tokens")) for part in parts]
    if not any(map(len, files)):
        return False
    size = sum(8 * len(file.documents) + 4 * len(file) for file in files)
    with disk_space(out, size):
        write_indexed(indexed_prefix(out, split, key), files, files[0].header.vocab_size)
    return True


@contextmanager
def disk_space(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Turn a disk that fills up inside the block into a DataError that names ``needed_bytes``."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # EFBIG: a limit on sizes, not on room
            raise
        raise DataError(
            f"{folder}: no space left: about {needed_bytes} bytes needed, {show_free(folder)}; "
            "make room or choose another `out`, then do the same again: finished parts are kept"
        ) from None
