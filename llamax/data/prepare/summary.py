"""What a dataset folder holds, in a few lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llamax.data.megatron import IndexedFile, indexed_prefix, is_prefix
from llamax.data.packing import Packs
from llamax.data.prepare.chunks import SPLITS
from llamax.data.token_file import Stream, TokenFile


def unigram_entropy(file: Stream) -> tuple[float, int]:
    """Entropy of the split's tokens taken one by one, in nats, and how many kinds occur."""
    counts = np.zeros(file.header.vocab_size, np.int64)
    for start in range(0, len(file), 2**22):
        counts += np.bincount(file.tokens[start : start + 2**22], minlength=len(counts))
    seen = counts[counts > 0]
    p = seen / seen.sum()
    return float(-(p * np.log(p)).sum()), len(seen)


def describe(out: Path, length: int = 0) -> str:
    """What a dataset folder holds, in a few lines; ``length``: what it is packed at, in tokens."""
    lines = [f"made {out}"]
    said = json.loads((out / "dataset.json").read_text())
    if said.get("indexed"):
        return "\n".join([*lines, *_describe_indexed(out, str(said["key"]))])
    for split in SPLITS:
        path = out / f"{split}.tokens"
        if path.exists():
            file = TokenFile(path, "off")
            entropy, kinds = unigram_entropy(file)
            head = file.header
            lines.append(
                f"  {split + '.tokens':18} {head.documents:,} documents, {head.tokens:,} tokens, "
                f"{head.text_bytes / head.tokens:.2f} bytes/token, unigram entropy {entropy:.3f} "
                f"nats, {kinds / head.vocab_size:.1%} of the vocabulary"
            )
            if head.counted is not None:
                lines.append(
                    f"  {'':18} {head.counted / head.tokens:.1%} of the tokens are answers"
                )
            if length:
                lines.append(f"  {'':18} {Packs(file, length)}")
        elif split != "test":
            lines.append(f"  {split}.tokens: none, no document fell into it")
    return "\n".join(lines)


def _describe_indexed(out: Path, key: str) -> Iterator[str]:
    for split in SPLITS[:2]:
        prefix = indexed_prefix(out, split, key)
        if is_prefix(prefix):
            file = IndexedFile(prefix, "off")
            yield (
                f"  {prefix.name} .bin and .idx: {len(file.lengths):,} documents, "
                f"{len(file):,} tokens in {file.dtype.name}"
            )
        else:
            yield f"  {prefix.name}: none, no document fell into it"
