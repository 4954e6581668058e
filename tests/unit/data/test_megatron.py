"""Megatron's indexed files: read, written, damaged."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.megatron import DOCUMENTS, index_bytes, write_dataset

from llamax.data.batch_plan import BatchPlan
from llamax.data.dataset import open_dataset
from llamax.data.header import Header
from llamax.data.loader import Loader
from llamax.data.megatron import SAMPLED, IndexedFile, write_indexed
from llamax.data.packing import Packs
from llamax.data.token_file import TokenFile, TokenWriter
from llamax.runtime.errors import DataError, LinkError


def put(raw: bytes, place: int, value: int) -> bytes:
    """``raw`` with another int64 at a place."""
    return raw[:place] + struct.pack("<q", value) + raw[place + 8 :]


def token_file(path: Path, documents: list[list[int]], vocab_size: int) -> TokenFile:
    with TokenWriter(path, Header("t" * 64, vocab_size, 1, 2)) as writer:
        for document in documents:
            writer.add(np.array(document), np.array([len(document)]), 3)
    return TokenFile(path)


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_every_integer_type_reads_as_written(tmp_path: Path, code: int) -> None:
    file = IndexedFile(write_dataset(tmp_path / "d", DOCUMENTS, code))
    assert [file.sequence(i).tolist() for i in range(3)] == DOCUMENTS
    assert file.documents.tolist() == [0, 4, 6, 11]
    assert len(file) == 11
    assert file.header.bos_id == 1
    windows, begins = file.begins(np.array([0, 3, 4]), np.array([11, 6, 6]))
    assert list(zip(windows.tolist(), begins.tolist(), strict=True)) == [(0, 4), (0, 6), (1, 4)]


@pytest.mark.parametrize("code", [1, 2])
def test_bytes_read_too(tmp_path: Path, code: int) -> None:
    file = IndexedFile(write_dataset(tmp_path / "d", [[3, 4], [5]], code, modes=b"\x00\x00"))
    assert file.tokens.tolist() == [3, 4, 5]
    assert file.header.bos_id is None


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    flat = np.arange(10, dtype="<u2")
    (tmp_path / "d.bin").write_bytes(flat.tobytes())
    (tmp_path / "d.idx").write_bytes(index_bytes([2, 3, 4, 1], 2, 8, [0, 2, 2, 4]))
    file = IndexedFile(tmp_path / "d")
    assert file.documents.tolist() == [0, 5, 5, 10]
    every = np.arange(file.num_documents)
    assert [each.tolist() for each in file.bounds(every)] == [[0, 5, 5], [5, 5, 10]]
    windows, begins = file.begins(np.array([0, 4, 5]), np.array([10, 6, 10]))
    assert (windows.tolist(), begins.tolist()) == ([0, 0, 1, 1], [5, 5, 5, 5])
    for marks in ([0, 3, 2, 4], [0, 9, 2, 4], [0, -3, 2, 4]):
        (tmp_path / "d.idx").write_bytes(index_bytes([2, 3, 4, 1], 2, 8, marks))
        damaged = IndexedFile(tmp_path / "d")
        looks = [damaged.verify, lambda file=damaged: file.documents]
        looks += [lambda file=damaged: file.bounds(every)]
        if marks[1] > 0:  # else the search does not meet it
            looks += [lambda file=damaged: file.begins(np.array([0]), np.array([10]))]
        for look in looks:
            with pytest.raises(DataError, match=r"document \d ends before it begins or after"):
                look()


class Counted(np.ndarray):  # type: ignore[type-arg]
    """A table that counts the elements that are read."""

    numbers = 0

    def __getitem__(self, key: object) -> object:
        part = super().__getitem__(key)
        Counted.numbers += np.size(part)
        return np.asarray(part)


def test_marks_are_not_read_through_to_open_a_file_or_to_cut_windows(tmp_path: Path) -> None:
    count = 50_000
    file = IndexedFile(write_dataset(tmp_path / "d", [[1, 2]] * count))
    file.marks, file.pointers = file.marks.view(Counted), file.pointers.view(Counted)
    windows, begins = file.begins(np.array([0, 50_001]), np.array([4, 50_008]))
    assert begins.tolist() == [2, 50_002, 50_004, 50_006]
    assert windows.tolist() == [0, 1, 1, 1]
    assert [each.tolist() for each in file.bounds(np.array([7]))] == [[14], [16]]
    assert 0 < Counted.numbers < 300
    assert "documents" not in vars(file)


def test_what_is_written_is_the_layout(tmp_path: Path) -> None:
    parts = [
        token_file(tmp_path / "a.tokens", DOCUMENTS[:2], 400),
        token_file(tmp_path / "b.tokens", [[], DOCUMENTS[2]], 400),
    ]
    assert write_indexed(tmp_path / "d", parts, 400) == 3
    flat = np.array([token for document in DOCUMENTS for token in document], "<u2")
    assert (tmp_path / "d.bin").read_bytes() == flat.tobytes()
    assert (tmp_path / "d.idx").read_bytes() == index_bytes([4, 2, 5], 2, 8)
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize(("vocab_size", "name"), [(65_499, "<u2"), (65_500, "<i4")])
def test_the_type_follows_the_vocabulary(tmp_path: Path, vocab_size: int, name: str) -> None:
    part = token_file(tmp_path / "a.tokens", DOCUMENTS, vocab_size)
    write_indexed(tmp_path / "d", [part], vocab_size)
    assert IndexedFile(tmp_path / "d").dtype == np.dtype(name)


def test_a_loader_cuts_the_same_samples_from_either_format(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    documents = [generator.integers(3, 400, size).tolist() for size in (3, 17, 1, 40, 8, 31)]
    native = token_file(tmp_path / "a.tokens", documents, 400)
    write_indexed(tmp_path / "d", [native], 400)
    for separate in (True, False):
        one, other = (
            Loader(file, BatchPlan(1, 8, 4, 2), separate_documents=separate)
            for file in (native, IndexedFile(tmp_path / "d", vocab_size=400))
        )
        for _ in range(6):
            for a, b in zip(one.step(), other.step(), strict=True):
                for x, y in zip(a, b, strict=True):
                    assert (x is None and y is None) or x.equal(y)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda i, b: (i, b[:-2]), "has 42 bytes, but"),
        (lambda i, b: (i[:-8], b), "3 sequences and 4 document marks take"),
        (lambda i, b: (b"TNTIDX\x00\x00" + i[8:], b), "is not a Megatron index of kind mmap"),
        (lambda i, b: (i[:9] + struct.pack("<Q", 2) + i[17:], b), "has version 2 and dtype code 4"),
        (lambda i, b: (i[:17] + b"\x63" + i[18:], b), "dtype code 99"),
        (lambda i, b: (i[:-8] + struct.pack("<q", 2), b), "documents are sequences 0 to 2, but"),
        (
            lambda _, b: (index_bytes([4, 2, 5], 4, 4, []), b),
            "its documents are not marked, but it has 3",
        ),
        (lambda _, b: (index_bytes([4, -2, 9], 4, 4), b), "a sequence has -2 tokens"),
        (lambda i, b: (put(i, 46, 4), b), "sequence 0 does not begin where the one before it ends"),
        (lambda i, b: (put(i, 54, 2**40), b), "sequence 1 does not begin where the one before it"),
        (lambda i, b: (i[:17] + b"\x07" + i[18:], b), "holds float32 numbers, not tokens"),
        (lambda i, b: (b"", b), "is not a Megatron index"),
    ],
)
def test_files_that_disagree_are_one_line(tmp_path: Path, spoil: object, said: str) -> None:
    write_dataset(tmp_path / "d", DOCUMENTS)
    paths = [tmp_path / "d.idx", tmp_path / "d.bin"]
    for path, raw in zip(paths, spoil(*(p.read_bytes() for p in paths)), strict=True):  # type: ignore[operator]
        path.write_bytes(raw)
    with pytest.raises(DataError) as error:
        IndexedFile(tmp_path / "d")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "d") in str(error.value)


def test_a_missing_half_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", DOCUMENTS)
    (tmp_path / "d.bin").unlink()
    with pytest.raises(DataError, match=r"d\.bin: cannot be opened .* named by its prefix"):
        open_dataset(tmp_path / "d")


def test_sequences_must_lie_end_to_end(tmp_path: Path) -> None:
    count = SAMPLED + 9  # the first ones are looked at when the files are opened
    write_dataset(tmp_path / "d", [[1, 2]] * count)
    raw = (tmp_path / "d.idx").read_bytes()
    (tmp_path / "d.idx").write_bytes(put(raw, 34 + 4 * count + 8 * (SAMPLED + 2), 20))
    file = IndexedFile(tmp_path / "d", "read")
    every = np.arange(count)
    for look in (file.verify, lambda: file.documents, lambda: file.bounds(every)):
        with pytest.raises(DataError, match=f"sequence {SAMPLED + 2} does not begin where"):
            look()


def test_tokens_outside_the_vocabulary_are_found_when_asked(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", DOCUMENTS)
    with pytest.raises(DataError, match=r"token 300 near place 0 is outside model.vocab_size=256"):
        IndexedFile(tmp_path / "d", "read", 256).verify()
    IndexedFile(tmp_path / "d", "read", 301).verify()
    IndexedFile(tmp_path / "d", "read", 256).verify(go_on=lambda: False)
    late = IndexedFile(tmp_path / "d", "read", 256)
    late.touch(np.array([0]), np.array([4]))
    with pytest.raises(DataError, match="token 300"):
        late.touch(np.array([4]), np.array([8]))
    IndexedFile(tmp_path / "d", "off", 256).touch(np.array([4]), np.array([8]))
    write_dataset(tmp_path / "n", [[1, -5], [1, 2]])
    with pytest.raises(DataError, match="token -5"):
        IndexedFile(tmp_path / "n", "read", 256).verify()


# --- data.path -----------------------------------------------------------------------------------


def test_a_prefix_is_a_dataset_without_tokenizer(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path / "d", DOCUMENTS), vocab_size=400)
    assert dataset.fingerprint is None
    dataset.check_tokenizer("a" * 64, "other")
    dataset.check_vocabulary(400)
    held_out = token_file(tmp_path / "v.tokens", [[1, 450]], 500)
    with pytest.raises(DataError, match=r"v\.tokens: its tokenizer has 500 tokens, and model.voc"):
        replace(dataset, validation=held_out).check_vocabulary(400)
    with pytest.raises(DataError, match=r"name a Megatron dataset by its prefix, .*/d$"):
        open_dataset(tmp_path / "d.idx")
    (tmp_path / "mega").mkdir()
    write_dataset(tmp_path / "mega" / "train_text_document", DOCUMENTS)
    for path in ("mega/train", "mega"):
        with pytest.raises(DataError, match=r"; did you mean .*/mega/train_text_document\?$"):
            open_dataset(tmp_path / path)
    (folder := tmp_path / "saved").mkdir()
    (folder / "state.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"saved: is a folder that the package datasets wrote; prepare its"
    ):
        open_dataset(folder)


@pytest.mark.parametrize("name", ["d.bin", ".d.bin.partial", ".d.idx.partial"])
def test_a_link_is_not_followed(tmp_path: Path, name: str) -> None:
    part = token_file(tmp_path / "a.tokens", DOCUMENTS, 400)
    (tmp_path / "target").write_text("precious")
    (tmp_path / name).symlink_to("target")
    with pytest.raises(LinkError, match=f"{name} is a link to target; remove it"):
        write_indexed(tmp_path / "d", [part], 400)
    assert (tmp_path / name).is_symlink()
    assert (tmp_path / "target").read_text() == "precious"


def test_packing_computes_no_table_of_all_documents(tmp_path: Path) -> None:
    file = IndexedFile(write_dataset(tmp_path / "d", DOCUMENTS))
    packs = Packs(file, 8)
    assert sorted(d for i in range(len(packs)) for d in packs.documents(i).tolist()) == [0, 1, 2]
    assert packs.places == 8
    assert "documents" not in vars(file)
