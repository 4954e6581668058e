"""Rows of tables that pyarrow reads: Parquet files, and files of Arrow.

::

    .parquet                 row groups
    .arrow .ipc .feather     record batches, as a stream (what ``datasets`` writes) or as a file

Rows are read in batches, so that memory does not grow with a row group.  Files of Arrow are mapped.
Checksums of Parquet's pages are checked where a writer, such as Spark, has made them.
Columns of bytes, such as images and sounds, are not read: their values are ``b""``.

Source: Arrow, "Serialization and Interprocess Communication (IPC)".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from llamax.data.prepare import file_kinds
from llamax.data.prepare.file_kinds import Row, too_long
from llamax.data.prepare.row_range import RowRange
from llamax.runtime.errors import DataError

END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream
BATCH_ROWS = 512  # read at once, at most


# ---- Parquet


def parquet_ranges(path: Path, version: str) -> Iterator[RowRange]:
    """The row groups of a Parquet file."""
    with _damage(path, "Parquet"):
        about, first = _parquet(path).metadata, 0
        for group in range(about.num_row_groups):
            count = about.row_group(group).num_rows
            if count:
                yield RowRange(str(path), "parquet", group, group + 1, first, count, version)
            first += count


def parquet_rows(rows: RowRange, most: int) -> Iterator[Any]:
    """The rows of a row group, an error in the place of one of more than ``most`` characters."""
    with _damage(Path(rows.path), "Parquet"):
        file = _parquet(Path(rows.path))
        group = file.metadata.row_group(rows.start)
        # Batches of about ``most`` bytes, however long rows are.
        size = max(1, min(BATCH_ROWS, most * group.num_rows // max(group.total_byte_size, 1)))
        for batch in file.iter_batches(size, row_groups=[rows.start], use_threads=False):
            yield from _short_rows(batch, most)


def _parquet(path: Path) -> Any:
    _pyarrow(path, "Parquet")
    from pyarrow import parquet  # type: ignore[import-untyped, import-not-found, unused-ignore]

    return parquet.ParquetFile(path, buffer_size=2**20, page_checksum_verification=True)


# ---- Arrow


def arrow_ranges(path: Path, version: str) -> Iterator[RowRange]:
    """Runs of rows of about CHUNK_BYTES of a file of Arrow: several batches, or part of one."""
    start = first = count = held = 0
    with _damage(path):
        for number, batch in enumerate(_batches(path)):
            size = batch.get_total_buffer_size()
            if count and held + size > file_kinds.CHUNK_BYTES:
                yield RowRange(str(path), "arrow", start, number, first, count, version)
                start, first, count, held = number, first + count, 0, 0
            if size > file_kinds.CHUNK_BYTES and batch.num_rows:
                step = max(1, batch.num_rows * file_kinds.CHUNK_BYTES // size)
                for skip in range(0, batch.num_rows, step):
                    part = min(step, batch.num_rows - skip)
                    span = (number, number + 1, first + skip, part, version, skip)
                    yield RowRange(str(path), "arrow", *span)
                start, first = number + 1, first + batch.num_rows
                continue
            count, held = count + batch.num_rows, held + size
        if count:
            yield RowRange(str(path), "arrow", start, number + 1, first, count, version)


def arrow_rows(rows: RowRange, most: int) -> Iterator[Any]:
    """The rows of a run of batches, an error in the place of a row as in ``parquet_rows``.

    An empty row stands for each of the ``rows.skip`` ones that do not belong to the run.
    """
    path, number, last = Path(rows.path), 0, rows.skip + rows.count
    with _damage(path):
        for batch in islice(_batches(path, rows.start), rows.stop - rows.start):
            size = most * batch.num_rows // max(batch.get_total_buffer_size(), 1)
            size = max(1, min(BATCH_ROWS, size))
            at = min(max(rows.skip - number, 0), batch.num_rows)
            yield from ({} for _ in range(at))
            for begin in range(at, batch.num_rows, size):
                if number + begin >= last:
                    return
                part = batch.slice(begin, min(size, last - number - begin))
                part.validate(full=True)
                yield from _short_rows(part, most)
            number += batch.num_rows


def _batches(path: Path, start: int = 0) -> Iterator[Any]:
    """The record batches of a file of Arrow from number ``start`` on."""
    pyarrow = _pyarrow(path, "Arrow")
    with path.open("rb") as file:
        magic = file.read(6)
        file.seek(-min(len(END), path.stat().st_size), 2)
        end = file.read()
    if magic[:4] == b"FEA1":
        raise DataError(
            f"{path}: is Feather of version 1, which is not read; write it anew with "
            "pyarrow.feather.write_feather, or as Parquet"
        )
    with pyarrow.memory_map(str(path)) as mapped:
        if magic == b"ARROW1":
            reader = pyarrow.ipc.open_file(mapped)
            yield from (reader.get_batch(i) for i in range(start, reader.num_record_batches))
        elif magic and end != END:
            raise DataError(f"{path}: is not Arrow, or is cut short; copy it again")
        else:
            yield from islice(pyarrow.ipc.open_stream(mapped), start, None)


@contextmanager
def _damage(path: Path, format: str = "Arrow") -> Iterator[None]:
    """Turn what pyarrow raises inside the block into a DataError."""
    pyarrow = _pyarrow(path, format)
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: is not {format}, or is damaged ({_short(error)})") from None


# ---- both


def _plain(batch: Any) -> list[Row]:
    """The rows of a batch, the values of columns of bytes left out."""
    columns = [
        [None if missing else b"" for missing in column.is_null().to_pylist()]
        if _has_bytes(column.type)
        else column.to_pylist()
        for column in batch.columns
    ]
    names = batch.schema.names
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _has_bytes(kind: Any) -> bool:
    """Whether values of a type hold bytes, at any depth."""
    if str(kind).startswith(("binary", "large_binary", "fixed_size_binary")):
        return True
    return any(_has_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _short_rows(batch: Any, most: int) -> Iterator[Row | DataError]:
    """The rows of a batch; an error in the place of one of more than ``most`` characters.

    Lengths are counted by pyarrow, so that no string of Python is made of a value that is too long.
    """
    from pyarrow import array, compute  # type: ignore[import-untyped, import-not-found, unused-ignore]

    names = batch.schema.names
    if twice := next((name for name in names if names.count(name) > 1), None):
        yield DataError(f"has two columns {twice[:80]!r}; rename one of them")
        return
    lengths = [
        compute.utf8_length(column).to_pylist()
        for column in batch.columns
        if str(column.type) in ("string", "large_string")
    ]
    fits = [all((length or 0) <= most for length in row) for row in zip(*lengths, strict=True)]
    if not all(fits):
        batch = batch.filter(array(fits))
    rows = iter(_plain(batch))
    for fit in fits or [True] * batch.num_rows:
        row = next(rows) if fit else None
        values = () if row is None else row.values()
        longest = max((len(value) for value in values if isinstance(value, str)), default=0)
        yield too_long("it", most) if row is None or longest > most else row


def _pyarrow(path: Path, format: str) -> Any:
    try:
        import pyarrow  # type: ignore[import-untyped, import-not-found, unused-ignore]

        return pyarrow
    except ImportError:
        raise DataError(
            f"{path}: {format} needs the package pyarrow, which is not installed; pip install "
            "'llamax[parquet]', or give JSONL or CSV"
        ) from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
