"""Random tokens in place of a dataset, to measure speed or to compile before there is data.

``data.path=random`` needs no file: every rank makes the same tokens, by integers alone.  They are
uniform over the vocabulary, so that a loss stays near ln(vocabulary), and a document ends after
each token with the same probability: the mean is like that of web pages.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llamax.config.data_path import RANDOM
from llamax.data.header import Header
from llamax.data.shuffle import mix
from llamax.data.stream import Stream

TRAINING, VALIDATION = 2**23, 2**20  # tokens
MEAN = 1024  # tokens of a document
UNKNOWN = 2**8  # size of a vocabulary that is not given


class RandomStream(Stream):
    """``length`` random tokens below ``vocab_size``, in documents; ``seed`` tells streams apart."""

    path = Path(RANDOM)

    def __init__(self, length: int, vocab_size: int, seed: int) -> None:
        self.header = Header("", vocab_size or UNKNOWN)
        self.identity = f"{RANDOM} {length} {self.header.vocab_size} {seed}"
        numbers = mix(np.arange(seed * 2**32, seed * 2**32 + length, dtype=np.uint64))
        self.tokens = (numbers % np.uint64(self.header.vocab_size)).astype(self.header.dtype)
        begins = np.flatnonzero((numbers[1:] >> np.uint64(40)) % np.uint64(MEAN) == 0) + 1
        self.documents = np.array([0, *begins, length], np.uint64)
