"""Best-fit packing: an index of documents of any length in samples of one length.

::

    documents   aaaaaaaa bbbbb ccccc dd e          sample 0   aaaaaaaa dd   (room 10)
                sorted, longest first              sample 1   bbbbb ccccc
                                                   sample 2   e . . . . .

The longest document comes first; each goes into the fullest sample that still has room for it, or
into a new sample (best-fit decreasing).  A document of n tokens takes n - 1 places, because its
last token is only a label.  Samples with room are listed by the amount of room, and the amounts
that occur are sorted, so the best fit is the first at or above the document's size.

Documents are taken in the order of a permutation by ``seed``, WINDOW of them at a time, and the
index (which document lies in which sample) goes to a file that is mapped: memory does not grow with
the corpus.  Samples depend only on the dataset, the length and the seed; any of them can be read
directly, and every epoch permutes them anew.  So the ranks of a machine share one index of a large
dataset: the first one packs, the others wait and compare its hash (``runtime.node_files``).

``padded`` puts one document in each sample instead.

Sources: best-fit decreasing, Johnson 1973; for language models, Ding et al. 2024, "Fewer
Truncations Improve Language Modeling", section 3.
"""

from __future__ import annotations

import shutil
import tempfile
from array import array
from bisect import bisect_left, insort
from hashlib import sha256
from typing import IO, Literal

import numpy as np

from llamax.data.shuffle import Integers, permute
from llamax.data.stream import Stream
from llamax.runtime.errors import DataError
from llamax.runtime.node_files import START, private_file, shared_file
from llamax.runtime.units import count

WINDOW = 2**16  # documents that are packed together
SHARED = 2**16  # documents above which the ranks of a machine share an index
VERSION = 1  # of the rule that packs, and of the layout of an index
MEMBERS = START + 40  # where an index has its documents, after five counts
TooLong = Literal["truncate", "drop", "refuse"]
Way = Literal["best-fit", "padded"]


class Packs:
    """Which documents of a token file lie in which sample of ``length`` places.

    ``too_long``: what to do with longer documents; with ``answers``, a document that is truncated
    before its first answer is dropped.  ``len`` is the number of samples.  Raises DataError for a
    document that is refused, and if no document is left.
    """

    def __init__(
        self,
        file: Stream,
        length: int,
        too_long: TooLong = "truncate",
        way: Way = "best-fit",
        seed: int = 0,
        answers: bool = True,
    ) -> None:
        self.file, self.length, self.too_long, self.way = file, length, too_long, way
        self.seed, self._answers = seed, answers and file.masked
        file.touch(np.zeros(1, np.int64), np.full(1, file.num_documents + 1), "documents")
        if file.num_documents > SHARED:
            facts = (VERSION, file.identity, WINDOW, length, too_long, way, seed, self._answers)
            name = sha256(repr(facts).encode()).hexdigest()
            index = shared_file(f"packs-{name}", self._write)
        else:
            index = private_file(self._write)
        counts: list[int] = np.frombuffer(index, np.int64, 5, START).tolist()
        kept, samples, self.places, self.longer, self.answerless = counts
        self._members = np.frombuffer(index, np.uint32, kept, MEMBERS)
        self._ends = np.frombuffer(index, np.uint64, samples, len(index) - 8 * samples)

    def __len__(self) -> int:
        return len(self._ends)

    def documents(self, sample: int) -> Integers:
        """The documents of a sample."""
        start = int(self._ends[sample - 1]) if sample else 0
        return self._members[start : int(self._ends[sample])].astype(np.int64)

    @property
    def fill(self) -> float:
        """The share of places that hold a token of a document."""
        return self.places / (len(self) * self.length)

    def __str__(self) -> str:
        kept = self.longer - self.answerless if self.too_long == "truncate" else 0
        action = {"truncate": f"{kept:,} truncated", "drop": f"{self.longer:,} dropped"}
        lost = f" ({self.answerless:,} dropped: cut before the answer)" if self.answerless else ""
        return (
            f"{self.way} at {self.length}: {count(len(self._members), 'document')} in "
            f"{count(len(self), 'sample')}, {self.fill:.2%} filled; {self.longer:,} longer"
            + (f": {action[self.too_long]}{lost}" if self.longer else "")
        )

    def _write(self, index: IO[bytes]) -> None:
        """Write the index: five counts, the documents of all samples, where each sample ends."""
        self.places = self.longer = self.answerless = packed = 0
        total = self.file.num_documents
        index.seek(MEMBERS)
        with tempfile.TemporaryFile() as ends:
            for start in range(0, total, WINDOW):
                places = np.arange(start, min(start + WINDOW, total))
                documents, sizes = self._measure(permute(places, total, self.seed, 0))
                self.places += int(sizes.sum())
                if self.way == "padded":
                    counts = np.ones(len(documents), np.int64)
                else:
                    shorter_by = self.length - sizes
                    if self.length < 2**16:  # sorted by radix
                        shorter_by = shorter_by.astype(np.uint16)
                    longest_first = np.argsort(shorter_by, kind="stable")
                    order, counts = best_fit(sizes[longest_first], self.length)
                    documents = documents[longest_first[order]]
                index.write(documents.astype(np.uint32).data)
                ends.write((packed + np.cumsum(counts)).astype(np.uint64).data)
                packed += len(documents)
            if not packed:
                raise DataError(f"{self.file.path}: {self._nothing_left()}")
            index.write(bytes(-index.tell() % 8))
            samples = ends.tell() // 8
            ends.seek(0)
            shutil.copyfileobj(ends, index, 2**20)
        index.seek(START)
        found = [packed, samples, self.places, self.longer, self.answerless]
        index.write(np.array(found, np.int64).data)

    def _nothing_left(self) -> str:
        """Why no document is left, and what to do."""
        if not self.longer:
            return "no document has two tokens or more; prepare longer ones"
        cut = f"{self.answerless} of them without an answer in the part that would stay"
        return (
            f"no document is left for samples of {self.length} tokens: {self.longer} are longer, "
            f"{'dropped (data.too_long=drop)' if self.too_long == 'drop' else cut}; use a greater "
            "sequence length"
        )

    def _measure(self, documents: Integers) -> tuple[Integers, Integers]:
        """The documents that are kept, and the number of places that each takes."""
        starts, stops = self.file.bounds(documents)
        sizes = stops - starts - 1
        keep, long = sizes > 0, sizes > self.length
        self.longer += int(long.sum())
        if self.too_long == "refuse" and long.any():
            worst = int(documents[np.argmax(sizes)])
            longest = count(int(sizes.max()) + 1, "token")
            raise DataError(
                f"{self.file.path}: document {worst + 1} has {longest}, and "
                f"{int(long.sum())} of these are longer than data.sequence_length={self.length}; "
                "use a greater one, or data.too_long=truncate or drop"
            )
        if self.too_long == "drop":
            keep &= ~long
        elif self._answers:
            for i in np.flatnonzero(long):
                if not self.file.counted(
                    np.arange(starts[i] + 1, starts[i] + self.length + 1)
                ).any():
                    keep[i] = False
                    self.answerless += 1
        return documents[keep], np.minimum(sizes[keep], self.length)


def best_fit(sizes: Integers, room: int) -> tuple[Integers, Integers]:
    """The documents in the order of samples, and how many each sample has.

    ``sizes``, 1 to ``room``, in descending order.  Documents of one size go in together: the
    fullest sample that fits takes as many as fit, and is then the fullest for the next; so samples
    with the same room take equal shares, the last one the rest.
    """
    chosen: list[int] = []  # samples, in the order in which documents go into them
    takers: list[int] = []  # so many of them take
    shares: list[int] = []  # so many documents each,
    fewer: dict[int, int] = {}  # but the one at this place so many more, a negative number
    with_room: list[list[int]] = [[] for _ in range(room + 1)]
    amounts: list[int] = []  # of room that some sample has, ascending
    count = 0
    starts = np.flatnonzero(np.diff(sizes, prepend=0))
    lengths = np.diff(starts, append=len(sizes))
    for size, left in zip(sizes[starts].tolist(), lengths.tolist(), strict=True):
        while left > 0:
            place = bisect_left(amounts, size)
            free = amounts[place] if place < len(amounts) else room
            fitting = free // size
            wanted = -(-left // fitting)
            if place < len(amounts):
                samples = with_room[free][-wanted:]
                samples.reverse()
                del with_room[free][-wanted:]
                if not with_room[free]:
                    del amounts[place]
            else:
                samples = [*range(count, count + wanted)]
                count += wanted
            chosen += samples
            takers.append(len(samples))
            shares.append(fitting)
            left -= len(samples) * fitting
            remaining = free - fitting * size
            if left < 0:  # the last has room for as many more
                fewer[len(chosen) - 1] = left
                more = remaining - left * size
                if not with_room[more]:
                    insort(amounts, more)
                with_room[more].append(samples.pop())
            if remaining and samples:
                if not with_room[remaining]:
                    insort(amounts, remaining)
                with_room[remaining] += samples
    times = np.repeat(np.array(shares, np.int64), np.array(takers, np.int64))
    times[[*fewer]] += np.array([*fewer.values()], np.int64)
    owner = np.repeat(np.array(array("q", chosen)), times)  # an array is read faster than a list
    narrow = owner.astype(np.uint16) if count <= 2**16 else owner  # sorted by radix
    return np.argsort(narrow, kind="stable"), np.bincount(owner, minlength=count)
