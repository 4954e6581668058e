"""Rows of tables that pyarrow reads: Parquet files.

Rows are read in batches, so that memory does not grow with a row group.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamax.data.prepare.file_kinds import Row, too_long
from llamax.data.prepare.row_range import RowRange
from llamax.runtime.errors import DataError

BATCH_ROWS = 512  # read at once, at most


def parquet_ranges(path: Path, version: str) -> Iterator[RowRange]:
    """The row groups of a Parquet file."""
    about, first = _parquet(path).metadata, 0
    for group in range(about.num_row_groups):
        count = about.row_group(group).num_rows
        yield RowRange(str(path), "parquet", group, group + 1, first, count, version)
        first += count


def parquet_rows(rows: RowRange, most: int) -> Iterator[Any]:
    """The rows of a row group, an error in the place of one of more than ``most`` characters."""
    file = _parquet(Path(rows.path))
    group = file.metadata.row_group(rows.start)
    # Batches of about ``most`` bytes, however long rows are.
    size = max(1, min(BATCH_ROWS, most * group.num_rows // max(group.total_byte_size, 1)))
    for batch in file.iter_batches(size, row_groups=[rows.start], use_threads=False):
        yield from _short_rows(batch.to_pylist(), most)


def _short_rows(rows: list[Row], most: int) -> Iterator[Row | DataError]:
    """Rows of a table in memory; an error in the place of one of more than ``most`` characters."""
    for row in rows:
        longest = max((len(value) for value in row.values() if isinstance(value, str)), default=0)
        yield row if longest <= most else too_long("it", most)


def _parquet(path: Path) -> Any:
    try:
        import pyarrow  # type: ignore[import-untyped, import-not-found, unused-ignore]
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{path}: Parquet needs the package pyarrow, which is not installed; pip install "
            "'llamax[parquet]', or give JSONL or CSV"
        ) from None
    try:
        return parquet.ParquetFile(path, buffer_size=2**20)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not Parquet ({' '.join(str(error).split())[:120]})") from None
