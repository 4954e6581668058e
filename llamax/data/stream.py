"""Documents end to end, from which samples are cut: what token files and other datasets share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llamax.data.header import Header
from llamax.data.search import inside
from llamax.data.shuffle import Integers

GoOn = Callable[[], bool]


class Stream:
    """The tokens of all documents, and where each document lies.

    Tokens [documents[i], documents[i + 1]) are document i.  ``masked``: whether the stream says
    which tokens count in the loss.  ``identity`` is the same for equal streams, so that what was
    computed from one serves again.
    """

    path: Path
    header: Header
    identity: str
    tokens: npt.NDArray[Any]
    documents: npt.NDArray[np.uint64]
    masked = False

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    def bounds(self, documents: Integers) -> tuple[Integers, Integers]:
        """The first token of each of these documents, and one after its last."""
        both = np.stack([documents, documents + 1], 1)  # neighbours in memory, read together
        starts, stops = self.documents[both].astype(np.int64).T
        return starts, stops

    def begins(self, starts: Integers, stops: Integers) -> tuple[Integers, Integers]:
        """The documents that begin inside windows: (window, first token) of each.

        Inside is after the first token of window i, ``starts[i]``, and before ``stops[i]``.
        """
        windows, documents = inside(self.documents, starts, stops)
        return windows, self.documents[documents].astype(np.int64)

    def counted(self, places: Integers) -> npt.NDArray[np.bool_]:
        """Whether the tokens at ``places`` (any shape) count in the loss."""
        return np.ones(places.shape, bool)

    def touch(self, starts: Integers, stops: Integers, section: str = "tokens") -> None:
        """Check elements starts[i]:stops[i] of a section before they are read, where it can be."""

    def verify(self, share: int = 0, of: int = 1, go_on: GoOn | None = None) -> object:
        """Check part ``share`` of ``of`` of the stream, if it can be; see ``Dataset.verify``."""
