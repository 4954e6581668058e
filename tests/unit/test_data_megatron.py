"""Megatron's .bin and .idx, byte by byte, and blends of datasets.

The files here are written by hand, after the layout; ``benchmarks/megatron.py`` runs Megatron's own
code beside ours where it is given.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from llamax.cli import inspect
from llamax.data.blended_loader import PERIOD, Blend, turns
from llamax.data.dataset import Mixture, open_dataset
from llamax.data.loader import Loader
from llamax.data.megatron import DTYPES, SAMPLED, IndexedFile, indexed_prefix, write_indexed
from llamax.data.token_file import Header, TokenFile, TokenWriter
from llamax.runtime.errors import DataError
from llamax.runtime.files import sha256

DOCUMENTS = [[1, 5, 9, 2], [1, 7], [1, 300, 8, 8, 2]]


def index(lengths: list[int], width: int, code: int, marks: list[int] | None = None) -> bytes:
    """An .idx file, spelled out."""
    marks = list(range(len(lengths) + 1)) if marks is None else marks
    pointers = np.cumsum([0, *lengths])[:-1] * width
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(lengths), len(marks))
        + np.array(lengths, "<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + np.array(marks, "<i8").tobytes()
    )


def put(raw: bytes, place: int, value: int) -> bytes:
    """``raw`` with another int64 at a place."""
    return raw[:place] + struct.pack("<q", value) + raw[place + 8 :]


def write(prefix: Path, documents: list[list[int]], code: int = 4, modes: bytes = b"") -> Path:
    """A dataset of one sequence a document."""
    dtype = np.dtype(DTYPES[code])
    lengths = [len(document) for document in documents]
    flat = np.array([token for document in documents for token in document])
    prefix.with_name(f"{prefix.name}.bin").write_bytes(flat.astype(dtype).tobytes())
    idx = index(lengths, dtype.itemsize, code) + modes
    prefix.with_name(f"{prefix.name}.idx").write_bytes(idx)
    return prefix


def token_file(path: Path, documents: list[list[int]], vocab_size: int) -> TokenFile:
    with TokenWriter(path, Header("t" * 64, vocab_size, 1, 2)) as writer:
        for document in documents:
            writer.add(np.array(document), np.array([len(document)]), 3)
    return TokenFile(path)


@pytest.mark.parametrize("code", [3, 4, 5, 8])
def test_every_integer_type_reads_as_written(tmp_path: Path, code: int) -> None:
    file = IndexedFile(write(tmp_path / "d", DOCUMENTS, code))
    assert [file.sequence(i).tolist() for i in range(3)] == DOCUMENTS
    assert file.documents.tolist() == [0, 4, 6, 11]
    assert len(file) == 11
    assert file.header.bos_id == 1
    offsets, unit = file.boundaries
    assert (offsets // np.uint64(unit)).tolist() == [0, 4, 6]


@pytest.mark.parametrize("code", [1, 2])
def test_bytes_read_too(tmp_path: Path, code: int) -> None:
    file = IndexedFile(write(tmp_path / "d", [[3, 4], [5]], code, modes=b"\x00\x00"))
    assert file.tokens.tolist() == [3, 4, 5]
    assert file.header.bos_id is None


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    flat = np.arange(10, dtype="<u2")
    (tmp_path / "d.bin").write_bytes(flat.tobytes())
    (tmp_path / "d.idx").write_bytes(index([2, 3, 4, 1], 2, 8, [0, 2, 2, 4]))
    file = IndexedFile(tmp_path / "d")
    assert file.documents.tolist() == [0, 5, 5, 10]
    assert file.boundaries == (file.documents, 1)
    for marks in ([0, 3, 2, 4], [0, 9, 2, 4], [0, -3, 2, 4]):
        (tmp_path / "d.idx").write_bytes(index([2, 3, 4, 1], 2, 8, marks))
        damaged = IndexedFile(tmp_path / "d")
        with pytest.raises(DataError, match=r"document \d ends before it begins, at sequence"):
            damaged.boundaries  # noqa: B018


def test_what_is_written_is_the_layout(tmp_path: Path) -> None:
    parts = [
        token_file(tmp_path / "a.tokens", DOCUMENTS[:2], 400),
        token_file(tmp_path / "b.tokens", [[], DOCUMENTS[2]], 400),
    ]
    assert write_indexed(tmp_path / "d", parts, 400) == 3
    flat = np.array([token for document in DOCUMENTS for token in document], "<u2")
    assert (tmp_path / "d.bin").read_bytes() == flat.tobytes()
    assert (tmp_path / "d.idx").read_bytes() == index([4, 2, 5], 2, 8)
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
            Loader(file, 1, 8, 4, 2, separate_documents=separate)
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
            lambda _, b: (index([4, 2, 5], 4, 4, []), b),
            "its documents are not marked, but it has 3",
        ),
        (lambda _, b: (index([4, -2, 9], 4, 4), b), "a sequence has -2 tokens"),
        (lambda i, b: (put(i, 46, 4), b), "sequence 0 does not begin where the one before it ends"),
        (lambda i, b: (put(i, 54, 2**40), b), "sequence 1 does not begin where the one before it"),
        (lambda i, b: (i[:17] + b"\x07" + i[18:], b), "holds float32 numbers, not tokens"),
        (lambda i, b: (b"", b), "is not a Megatron index"),
    ],
)
def test_files_that_disagree_are_one_line(tmp_path: Path, spoil: object, said: str) -> None:
    write(tmp_path / "d", DOCUMENTS)
    paths = [tmp_path / "d.idx", tmp_path / "d.bin"]
    for path, raw in zip(paths, spoil(*(p.read_bytes() for p in paths)), strict=True):  # type: ignore[operator]
        path.write_bytes(raw)
    with pytest.raises(DataError) as error:
        IndexedFile(tmp_path / "d")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "d") in str(error.value)


def test_a_missing_half_is_named(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    (tmp_path / "d.bin").unlink()
    with pytest.raises(DataError, match=r"d\.bin: cannot be opened .* named by its prefix"):
        open_dataset(tmp_path / "d")


def test_sequences_must_lie_end_to_end(tmp_path: Path) -> None:
    count = SAMPLED + 9  # the first ones are looked at when the files are opened
    write(tmp_path / "d", [[1, 2]] * count)
    raw = (tmp_path / "d.idx").read_bytes()
    (tmp_path / "d.idx").write_bytes(put(raw, 34 + 4 * count + 8 * (SAMPLED + 2), 20))
    file = IndexedFile(tmp_path / "d", "read")
    for look in (file.verify, lambda: file.documents):
        with pytest.raises(DataError, match=f"sequence {SAMPLED + 2} does not begin where"):
            look()


def test_tokens_outside_the_vocabulary_are_found_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    with pytest.raises(DataError, match=r"token 300 near place 0 is outside model.vocab_size=256"):
        IndexedFile(tmp_path / "d", "read", 256).verify()
    IndexedFile(tmp_path / "d", "read", 301).verify()
    IndexedFile(tmp_path / "d", "read", 256).verify(go_on=lambda: False)
    late = IndexedFile(tmp_path / "d", "read", 256)
    late.touch(np.array([0]), np.array([4]))
    with pytest.raises(DataError, match="token 300"):
        late.touch(np.array([4]), np.array([8]))
    IndexedFile(tmp_path / "d", "off", 256).touch(np.array([4]), np.array([8]))
    write(tmp_path / "n", [[1, -5], [1, 2]])
    with pytest.raises(DataError, match="token -5"):
        IndexedFile(tmp_path / "n", "read", 256).verify()


# --- data.path -----------------------------------------------------------------------------------


def test_a_prefix_is_a_dataset_without_tokenizer(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path / "d", DOCUMENTS), vocab_size=400)
    assert dataset.fingerprint is None
    dataset.check_tokenizer("a" * 64, "other")
    dataset.check_vocabulary(400)
    with pytest.raises(DataError, match=r"name a Megatron dataset by its prefix, .*/d$"):
        open_dataset(tmp_path / "d.idx")
    with pytest.raises(DataError, match=r"is no dataset .* there is no e.idx"):
        open_dataset(tmp_path / "e")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("0.5 {d} 0.5", "a weight has no dataset"),
        ("0.5 {d} half {d}", "'half' is no weight above 0"),
        ("0.5 {d} -1 {d}", "'-1' is no weight above 0"),
        ("0.5 {d} 0.5 {d}x", "is no dataset"),
        ("0 {d} 1 {d}x", "'0' is no weight above 0"),
        ("0.2 {d} 0.3 {d}", "d is there twice, and would give each sample twice; write it once"),
    ],
)
def test_a_blend_that_cannot_be_is_one_line(tmp_path: Path, words: str, said: str) -> None:
    prefix = write(tmp_path / "d", DOCUMENTS)
    with pytest.raises(DataError) as error:
        open_dataset(words.format(d=prefix))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_blend_opens_its_parts(tmp_path: Path) -> None:
    one, other = (write(tmp_path / name, DOCUMENTS) for name in "de")
    split = open_dataset(f"3 {one} 1 {other}").train
    assert isinstance(split, Mixture)
    assert split.weights == (3.0, 1.0)
    assert len(split) == 22
    assert split.path == one


def test_inspect_says_what_a_prefix_is(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d.v1", DOCUMENTS)
    for path in (prefix, Path(f"{prefix}.bin"), Path(f"{prefix}.idx")):
        found = dict(inspect.describe(path))
        assert found["Megatron data"] == prefix
        assert found["d.v1"] == "11 tokens, 3 documents, int32"
        assert found["tokenizer"] == "not named"
        assert "verified" not in found
    found = dict(inspect.describe(prefix, verify=True))
    assert found["verified"] == "that sequences lie end to end; the format keeps no checksums"


def test_inspect_says_what_prepare_made(tmp_path: Path) -> None:
    tokenizer, header = tmp_path / "tokenizer.model", {"vocab_size": 301}
    tokenizer.write_bytes(b"a tokenizer")
    said = {"tokenizer_file": tokenizer.name, "tokenizer": sha256(tokenizer), "key": "text"}
    (tmp_path / "dataset.json").write_text(json.dumps({**said, "indexed": header}))
    for split in ("train", "validation"):
        write(indexed_prefix(tmp_path, split, "text"), DOCUMENTS)
    found = dict(inspect.describe(tmp_path, verify=True))
    assert found["train"] == found["validation"] == "11 tokens, 3 documents, int32"
    assert (found["vocabulary"], found["tokenizer"]) == (301, sha256(tokenizer))
    assert str(found["files"]).startswith("4, ")
    assert "tokens are in the vocabulary" in str(found["verified"])
    write(indexed_prefix(tmp_path, "validation", "text"), [[7, 301]])
    with pytest.raises(DataError, match=r"token 301 .* is outside"):
        dict(inspect.describe(tmp_path, verify=True))


# --- blends --------------------------------------------------------------------------------------


def blend(tmp_path: Path, weights: list[float], rank: int = 0, of: int = 1, **more: int) -> Blend:
    """Parts whose tokens are 1000, 1001, ... and 2000, 2001, ...; samples of 2 tokens."""
    parts = []
    for number, size in ((1, 41), (2, 101)):
        path = tmp_path / f"p{number}"
        if not path.with_name(f"{path.name}.idx").exists():
            write(path, [list(range(1000 * number, 1000 * number + size))])
        file = IndexedFile(path)
        parts.append(Loader(file, 5, 2, 8, 8 // of, rank, of, separate_documents=False))
    return Blend(parts, weights, 8 // of, rank, of, more.get("consumed", 0))


def test_turns_keep_every_stretch_in_proportion() -> None:
    table = turns([0.7, 0.2, 0.1])
    for stop in (10, 100, 1000, PERIOD):
        counts = np.bincount(table[:stop], minlength=3) / stop
        assert np.abs(counts - [0.7, 0.2, 0.1]).max() * stop < 1.0001


def test_a_blend_takes_each_part_in_its_own_order_without_repeats(tmp_path: Path) -> None:
    mixed = blend(tmp_path, [0.25, 0.75])
    chosen = mixed.order(np.arange(80))
    first = chosen[chosen < 20]  # the first part has 20 samples, and gives 20 of 80
    assert sorted(first.tolist()) == list(range(20))
    second = chosen[chosen >= 20] - 20
    assert len(set(second.tolist()[:50])) == 50  # all of the second before any comes again
    assert first.tolist() == mixed.parts[0].order(np.arange(20)).tolist()


def test_rows_come_from_where_the_order_says(tmp_path: Path) -> None:
    mixed = blend(tmp_path, [0.5, 0.5])
    (batch,) = mixed.step()
    chosen = mixed.order(np.arange(8))
    for row, sample in enumerate(chosen.tolist()):
        start = 1000 + 2 * sample if sample < 20 else 2000 + 2 * (sample - 20)
        assert batch.ids[row].tolist() == [start, start + 1]
        assert batch.labels[row].tolist() == [start + 1, start + 2]


def test_a_blend_is_the_same_on_any_number_of_ranks_and_resumes(tmp_path: Path) -> None:
    whole = blend(tmp_path, [0.3, 0.7])
    steps = [whole.step()[0].ids.tolist() for _ in range(5)]
    shares = [blend(tmp_path, [0.3, 0.7], rank, 2) for rank in range(2)]
    for wanted in steps:
        assert [row for share in shares for row in share.step()[0].ids.tolist()] == wanted
    resumed = blend(tmp_path, [0.3, 0.7], consumed=24)
    assert resumed.step()[0].ids.tolist() == steps[3]


def test_periods_follow_each_other(tmp_path: Path) -> None:
    mixed = blend(tmp_path, [0.3, 0.7])
    k = np.arange(PERIOD - 40, PERIOD + 40)
    counts = [int((mixed.order(k) < 20).sum()), 0.3 * 80]
    assert counts[0] == pytest.approx(counts[1], abs=1.5)
    # The n-th sample of a part, over the edge of the period, goes on where it was.
    nth = int((mixed.order(np.arange(PERIOD)) < 20).sum())
    after = mixed.order(np.arange(PERIOD, PERIOD + 40))
    own = mixed.parts[0].order(np.arange(nth, nth + 40))
    assert after[after < 20].tolist() == own[: (after < 20).sum()].tolist()


def test_validation_goes_through_one_part_after_the_other(tmp_path: Path) -> None:
    parts = [
        Loader(IndexedFile(write(tmp_path / f"v{n}", [list(range(9))])), 0, 2, 4, 4, shuffle=False)
        for n in range(2)
    ]
    mixed = Blend(parts, [0.9, 0.1], 4, 0, 1, 0)
    assert mixed.order(np.arange(10)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -1, -1]
    assert sum(int((batch.labels >= 0).sum()) for (batch,) in mixed.epoch()) == 16
