"""A range of rows of a file, which a worker reads."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RowRange:
    """Rows ``first`` to ``first + count`` (from 0) of a file.

    They lie in its bytes start:stop (in row groups of Parquet, in batches of Arrow), after ``skip``
    rows that do not belong to the range.  ``version`` changes when the file does.  ``split``: the
    one that the file is for; empty if the share for validation decides.
    """

    path: str
    kind: str
    start: int
    stop: int
    first: int
    count: int
    version: str
    skip: int = 0
    split: str = ""

    @property
    def size_bytes(self) -> int:
        """Bytes of the range; of row groups and batches, whose size is not known, none."""
        return 0 if self.kind in ("parquet", "arrow") else self.stop - self.start

    def slice(self, start: int, stop: int) -> RowRange | None:
        """The rows of this range that are among rows start:stop of the file; None if none are."""
        low, high = max(self.first, start), min(self.first + self.count, stop)
        if low >= high:
            return None
        return replace(self, first=low, count=high - low, skip=self.skip + low - self.first)
