"""A summary of a dataset folder, in a few lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llamax.data.dataset import read_index
from llamax.data.megatron import IndexedFile, indexed_prefix, is_prefix
from llamax.data.packing import Packs
from llamax.data.prepare.chunks import SPLITS
from llamax.data.prepare.pipeline import Prepared
from llamax.data.prepare.unread import MOST_NAMES, unread_names
from llamax.data.stream import Stream
from llamax.data.token_file import TokenFile
from llamax.runtime.errors import DataError
from llamax.runtime.units import count


def unigram_entropy(file: Stream) -> tuple[float, int]:
    """Entropy of the split's single tokens, in nats, and the number of different tokens in it."""
    counts = np.zeros(file.header.vocab_size, np.int64)
    for start in range(0, len(file), 2**22):
        counts += np.bincount(file.tokens[start : start + 2**22], minlength=len(counts))
        if isinstance(file, TokenFile):
            file.release()
    seen = counts[counts > 0]
    p = seen / seen.sum()
    return float(-(p * np.log(p)).sum()), len(seen)


def describe(out: Path, length: int = 0) -> str:
    """A summary of the dataset in ``out``.

    With ``length``, a number of tokens, also how well documents pack into samples of that length.
    Raises DataError for a length below 0.
    """
    if length < 0:
        raise DataError(f"`length={length}` is below 0; use 0 (no packing) or more")
    lines = [f"made {out}"]
    index = read_index(out / "dataset.json")
    if index.get("indexed"):
        return "\n".join([*lines, *_describe_indexed(out, str(index["key"]))])
    for split in SPLITS:
        path = out / f"{split}.tokens"
        if path.exists():
            file = TokenFile(path, "off")
            entropy, kinds = unigram_entropy(file)
            head = file.header
            lines.append(
                f"  {split + '.tokens':18} {count(head.documents, 'document')}, "
                f"{count(head.tokens, 'token')}, {head.text_bytes / head.tokens:.2f} bytes/token"
            )
            lines.append(
                f"  {'':18} unigram entropy {entropy:.3f} nats, "
                f"{kinds / head.vocab_size:.1%} of the vocabulary"
            )
            if head.counted is not None:
                lines.append(
                    f"  {'':18} {head.counted / head.tokens:.1%} of the tokens are answers"
                )
            if length:
                lines.append(f"  {'':18} {Packs(file, length)}")
        elif split != "test":
            lines.append(f"  {split + '.tokens':18} {_no_document(split)}")
    return "\n".join(lines)


def describe_rows(made: Prepared) -> str:
    """How many rows became how many samples, and how fast."""
    dropped = made.inputs - made.documents
    note = f", {dropped:,} with an empty answer dropped" if dropped > 0 else ""
    rate = made.inputs / made.seconds
    return f"{count(made.inputs, 'row')}{note}, in {made.seconds:.1f} s: {rate:,.0f} rows/s"


def describe_files(made: Prepared) -> str:
    """How many files were taken, and the names of those that were left."""
    kinds = ", ".join(f"{number:,} of {kind}" for kind, number in sorted(made.taken.items()))
    line = f"took {count(sum(made.taken.values()), 'file')}"
    line += f" ({kinds})" if len(made.taken) > 1 else ""
    if made.left:
        names = Counter(Path(name).name + "/" * name.endswith("/") for name in made.left)
        shown = list(names.items())[:MOST_NAMES]
        each = [name if times == 1 else f"{times:,} x {name}" for name, times in shown]
        more = len(made.left) - sum(times for _, times in shown)
        line += f", left {len(made.left):,}: {', '.join(each)}"
        line += f" and {more:,} more" if more else ""
    return line


def describe_unread(made: Prepared) -> str:
    """The columns and keys that were not read, in a line; empty if there are none."""
    return f"not read: {unread_names(made.unread)}" if made.unread else ""


def _describe_indexed(out: Path, key: str) -> Iterator[str]:
    for split in SPLITS:
        prefix = indexed_prefix(out, split, key)
        if is_prefix(prefix):
            file = IndexedFile(prefix, "off")
            yield (
                f"  {prefix.name} .bin and .idx: {count(len(file.lengths), 'document')}, "
                f"{count(len(file), 'token')} in {file.dtype.name}"
            )
        elif split != "test":
            yield f"  {prefix.name}: {_no_document(split)}"


def _no_document(split: str) -> str:
    hint = "; a larger --validation holds out more" if split == "validation" else ""
    return f"none: no document fell into it{hint}"
