"""Random tokens in place of a dataset, to measure speed or to compile before there is data.

``data.path=random`` needs no file: every rank makes the same tokens, by integers alone.  They are
uniform over the vocabulary, so that a loss stays near ln(vocabulary), and a document ends after
each token with the same probability: the mean is like that of web pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llamax.config.data_path import RANDOM
from llamax.data.search import inside
from llamax.data.shuffle import Integers, mix
from llamax.data.token_file import GoOn, Header

TRAINING, VALIDATION = 2**23, 2**20  # tokens
MEAN = 1024  # tokens of a document
UNKNOWN = 2**8  # size of a vocabulary that is not given


class RandomStream:
    """``length`` random tokens below ``vocab_size``, in documents; ``seed`` tells streams apart."""

    path = Path(RANDOM)
    masked = False

    def __init__(self, length: int, vocab_size: int, seed: int) -> None:
        self.header = Header("", vocab_size or UNKNOWN)
        self.identity = f"{RANDOM} {length} {self.header.vocab_size} {seed}"
        numbers = mix(np.arange(seed * 2**32, seed * 2**32 + length, dtype=np.uint64))
        self.tokens: npt.NDArray[Any] = numbers % np.uint64(self.header.vocab_size)
        self.tokens = self.tokens.astype(self.header.dtype)
        begins = np.flatnonzero((numbers[1:] >> np.uint64(40)) % np.uint64(MEAN) == 0) + 1
        self.documents = np.array([0, *begins, length], np.uint64)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    def bounds(self, documents: Integers) -> tuple[Integers, Integers]:
        """The first token of each of these documents, and one after its last."""
        found = self.documents.astype(np.int64)
        return found[documents], found[documents + 1]

    def begins(self, starts: Integers, stops: Integers) -> tuple[Integers, Integers]:
        """The documents that begin inside windows: (window, first token) of each."""
        windows, documents = inside(self.documents, starts, stops)
        return windows, self.documents[documents].astype(np.int64)

    def counted(self, places: Integers) -> npt.NDArray[np.bool_]:
        """Every token counts in the loss."""
        return np.ones(places.shape, bool)

    def touch(self, starts: Integers, stops: Integers, section: str = "tokens") -> None:
        """No part of it is checked."""

    def verify(
        self, threads: int | None = None, share: int = 0, of: int = 1, go_on: GoOn | None = None
    ) -> None:
        """There is nothing to check."""
