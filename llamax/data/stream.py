"""Documents end to end, from which samples are cut: a token file or a Megatron dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llamax.data.shuffle import Integers
from llamax.data.token_file import GoOn, Header


class Stream(Protocol):
    """The tokens of all documents, and where each document lies."""

    path: Path
    header: Header
    tokens: npt.NDArray[Any]

    def __len__(self) -> int: ...

    @property
    def identity(self) -> str:
        """The same for equal files, so that what was computed from one serves again."""

    @property
    def documents(self) -> npt.NDArray[np.uint64]:
        """Tokens [documents[i], documents[i + 1]) are document i."""

    @property
    def num_documents(self) -> int: ...

    def bounds(self, documents: Integers) -> tuple[Integers, Integers]:
        """The first token of each of these documents, and one after its last."""

    def begins(self, starts: Integers, stops: Integers) -> tuple[Integers, Integers]:
        """The documents that begin inside windows: (window, first token) of each.

        Inside is after the first token of window i, ``starts[i]``, and before ``stops[i]``.
        """

    @property
    def masked(self) -> bool: ...

    def counted(self, places: Integers) -> npt.NDArray[np.bool_]: ...

    def touch(self, starts: Integers, stops: Integers, section: str = "tokens") -> None: ...

    def verify(
        self, threads: int | None = None, share: int = 0, of: int = 1, go_on: GoOn | None = None
    ) -> Any: ...
