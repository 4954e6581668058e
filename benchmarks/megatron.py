"""Compare our .bin and .idx files with those of Megatron's own code, on the same documents.

    python benchmarks/megatron.py [MEGATRON_LM] [--documents 300]

MEGATRON_LM is a clone of Megatron-LM.  Random documents of each vocabulary go through Megatron's
``IndexedDatasetBuilder`` and through ours, and the files are compared byte by byte; then each side
reads what the other wrote, sequence by sequence.  Files of every dtype, of documents of several
sequences, and merged by ``add_index`` are read by both as well.  Without a clone llamax alone
writes and reads its files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llamax.data.header import Header
from llamax.data.megatron import IndexedFile, write_indexed
from llamax.data.token_file import TokenFile, TokenWriter

VOCABULARIES = (600, 32_000, 65_499, 65_500, 128_256)


def megatron(repository: Path) -> Any:
    """Megatron's module, from its file; what it imports for object stores is left out."""
    absent = {
        "megatron.core.datasets.object_storage_utils": (
            "ObjectStorageConfig S3Config cache_index_file dataset_exists get_index_cache_path "
            "get_object_storage_access is_object_storage_path parse_s3_path"
        ),
        "megatron.core.msc_utils": "MultiStorageClientFeature maybe_msc",
        "megatron.core.utils": "log_single_rank",
    }
    for name in ("megatron", "megatron.core", "megatron.core.datasets"):
        sys.modules[name] = types.ModuleType(name)
    for name, words in absent.items():
        sys.modules[name] = types.ModuleType(name)
        for word in words.split():
            setattr(sys.modules[name], word, lambda *_, **__: False)
    off = types.SimpleNamespace(is_enabled=lambda: False)
    sys.modules["megatron.core.msc_utils"].MultiStorageClientFeature = off  # type: ignore[attr-defined]
    sys.modules["megatron.core.msc_utils"].maybe_msc = types.SimpleNamespace(open=open)  # type: ignore[attr-defined]
    path = repository / "megatron/core/datasets/indexed_dataset.py"
    module = types.ModuleType("indexed_dataset")
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    return module


def documents(count: int, vocab_size: int) -> list[np.ndarray]:
    """Random documents of 1 to 200 tokens."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 200, count)
    return [generator.integers(0, vocab_size, length) for length in lengths]


def theirs(module: Any, prefix: Path, docs: list[np.ndarray], dtype: Any, pieces: int = 1) -> None:
    """Documents written by Megatron's builder, each of so many sequences."""
    builder = module.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in docs:
        lengths = [len(part) for part in np.array_split(document, pieces) if len(part)]
        builder.add_document(torch.from_numpy(document), lengths)
    builder.finalize(f"{prefix}.idx")


def ours(folder: Path, docs: list[np.ndarray], vocab_size: int) -> Path:
    """The same documents in three parts, joined by ours."""
    parts = []
    for number in range(3):
        mine = docs[number * len(docs) // 3 : (number + 1) * len(docs) // 3]
        path = folder / f"{number}.tokens"
        with TokenWriter(path, Header("", vocab_size)) as writer:
            for document in mine:
                writer.add(document, np.array([len(document)]), 0)
        parts.append(TokenFile(path))
    write_indexed(folder / "ours", parts, vocab_size)
    return folder / "ours"


def agree(module: Any, prefix: Path) -> int:
    """Sequences and documents, read by both; how many sequences were compared."""
    file, other = IndexedFile(prefix), module.IndexedDataset(str(prefix))
    file.verify()
    assert len(other) == len(file.lengths)
    for number in range(len(other)):
        assert np.array_equal(other[number], file.sequence(number))
    assert np.array_equal(other.document_indices, file.marks)
    starts = np.concatenate([[0], np.cumsum(other.sequence_lengths)])[other.document_indices]
    assert np.array_equal(starts, file.documents.astype(np.int64))
    return len(other)


def alone(count: int) -> None:
    """Our own files, written and read by us."""
    print("Megatron-LM is not given: nothing is compared with its files")
    for vocab_size in VOCABULARIES:
        with tempfile.TemporaryDirectory() as name:
            docs = documents(count, vocab_size)
            file = IndexedFile(ours(Path(name), docs, vocab_size))
            file.verify()
            for number, document in enumerate(docs):
                assert np.array_equal(file.sequence(number), document)
        print(f"vocabulary {vocab_size}: {len(docs)} sequences written and read by llamax")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("megatron", type=Path, nargs="?", help="a clone of Megatron-LM")
    parser.add_argument("--documents", type=int, default=300)
    options = parser.parse_args()
    if options.megatron is None:
        alone(options.documents)
        return
    module = megatron(options.megatron)
    for vocab_size in VOCABULARIES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            docs = documents(options.documents, vocab_size)
            theirs(module, folder / "theirs", docs, module.DType.optimal_dtype(vocab_size))
            ours(folder, docs, vocab_size)
            for suffix in (".bin", ".idx"):
                one, other = (
                    (folder / f"{who}{suffix}").read_bytes() for who in ("ours", "theirs")
                )
                assert one == other, f"{suffix} differs at vocabulary {vocab_size}"
            count = agree(module, folder / "ours")
        print(f"vocabulary {vocab_size}: .bin and .idx equal, {count} sequences read by both")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype in (np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16):
            prefix = folder / np.dtype(dtype).name
            theirs(module, prefix, documents(options.documents, 100), dtype, pieces=3)
            print(f"{prefix.name}: {agree(module, prefix)} sequences of 3 a document, read by both")
        merged = module.IndexedDatasetBuilder(f"{folder / 'merged'}.bin", dtype=np.int32)
        for _ in range(2):
            merged.add_index(str(folder / "int32"))
        merged.finalize(f"{folder / 'merged'}.idx")
        print(f"merged twice: {agree(module, folder / 'merged')} sequences, read by both")


if __name__ == "__main__":
    main()
