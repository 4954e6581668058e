"""The packed-token file: what goes in comes out, and no damage goes unseen."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llamax.data import token_file
from llamax.data.header import BLOCK_BYTES, HEADER_BYTES, Header
from llamax.data.token_file import TokenFile, TokenWriter
from llamax.runtime.errors import DataError, LinkError


def write(path: Path, lengths: list[int], vocab_size: int = 32000, seed: int = 0) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(0, vocab_size, sum(lengths)).astype(np.uint32)
    with TokenWriter(path, Header("f" * 64, vocab_size, 1, 2)) as writer:
        writer.add(tokens, np.array(lengths), 3 * len(tokens))
    return tokens


@pytest.fixture
def damaged(tmp_path: Path):
    """Writes a file of several blocks with one byte changed at a place, and returns its path."""
    path = tmp_path / "x.tokens"
    write(path, [5, 0, 700_000, 3] + [1] * 200_000)
    whole = path.read_bytes()

    def damage(at: int, bit: int = 0) -> Path:
        raw = bytearray(whole)
        raw[at] ^= 1 << bit
        path.write_bytes(raw)
        return path

    damage.size = len(whole)
    damage.sections = TokenFile(path).header.sections
    return damage


@pytest.mark.parametrize("vocab_size", [300, 2**16, 2**16 + 1, 200_000])
def test_round_trip(tmp_path: Path, vocab_size: int) -> None:
    lengths = [3, 0, 4000, 1]
    tokens = write(tmp_path / "x.tokens", lengths, vocab_size)
    file = TokenFile(tmp_path / "x.tokens")
    assert file.tokens.dtype.itemsize == (2 if vocab_size <= 2**16 else 4)
    np.testing.assert_array_equal(file.tokens, tokens)
    np.testing.assert_array_equal(file.documents, [0, 3, 3, 4003, 4004])
    head = file.header
    assert (head.tokens, head.documents, head.text_bytes) == (4004, 4, 12012)
    assert (head.bos_id, head.eos_id, head.tokenizer) == (1, 2, "f" * 64)


def test_written_piece_by_piece_is_the_same_file(tmp_path: Path) -> None:
    lengths = [400_000, 300_000, 7, 250_000]
    tokens = write(tmp_path / "a.tokens", lengths)
    with TokenWriter(tmp_path / "b.tokens", Header("f" * 64, 32000, 1, 2)) as writer:
        start = 0
        for length in lengths:
            writer.add(tokens[start : start + length], np.array([length]), 3 * length)
            start += length
    assert (tmp_path / "a.tokens").read_bytes() == (tmp_path / "b.tokens").read_bytes()


def test_no_document_is_a_file_too(tmp_path: Path) -> None:
    write(tmp_path / "x.tokens", [])
    file = TokenFile(tmp_path / "x.tokens")
    assert len(file) == 0
    assert file.documents.tolist() == [0]


def test_every_place_is_guarded(damaged) -> None:
    """One flipped bit anywhere is refused: at the edges of every part, and at random."""
    edges = {0, 7, 8, 11, 12, 200, HEADER_BYTES - 1, HEADER_BYTES, damaged.size - 1}
    for start, size in damaged.sections.values():
        edges |= {start - 1, start, start + size // 2, start + size - 1}
    edges |= {HEADER_BYTES + BLOCK_BYTES - 1, HEADER_BYTES + BLOCK_BYTES}
    edges |= set(np.random.default_rng(1).integers(0, damaged.size, 40).tolist())
    for at in sorted(edges):
        with pytest.raises(DataError, match=r"x\.tokens.*(damaged|llamax prepare)") as caught:
            TokenFile(damaged(at, at % 8))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (0, "is not a token file"),
        (100, "header does not match"),
        (HEADER_BYTES + BLOCK_BYTES + 5, r"bytes 1052672 to 2101248 \(tokens\)"),
        (-1, "checksum table"),
    ],
)
def test_damage_is_reported_with_its_place(damaged, place: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        TokenFile(damaged(place % damaged.size))


def test_document_offsets_are_named(damaged) -> None:
    start, size = damaged.sections["documents"]
    with pytest.raises(DataError, match="document offsets"):
        TokenFile(damaged(start + size - 8))


@pytest.mark.parametrize("change", [-1, -BLOCK_BYTES, 1])
def test_another_length_is_refused(damaged, change: int) -> None:
    path = damaged(0)
    raw = damaged(0, 0).read_bytes()
    raw = bytes([raw[0] ^ 1]) + raw[1:]
    path.write_bytes(raw[:change] if change < 0 else raw + b"\0")
    with pytest.raises(DataError, match=rf"has {len(raw) + change} bytes .* says {len(raw)}"):
        TokenFile(path, verify="off")


@pytest.mark.parametrize("size", [0, 5, 100, HEADER_BYTES - 1])
def test_a_file_cut_within_its_header_is_refused(damaged, size: int) -> None:
    path = damaged(0)
    path.write_bytes(b"llamax1\n"[:size] + path.read_bytes()[8:size])
    with pytest.raises(DataError, match=r"x\.tokens"):
        TokenFile(path)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.tokens: cannot be opened .* llamax prepare"):
        TokenFile(tmp_path / "no.tokens")


def test_reading_checks_only_what_it_touches(damaged) -> None:
    file = TokenFile(damaged(HEADER_BYTES + BLOCK_BYTES + 7), verify="read")
    half = BLOCK_BYTES // 2
    file.touch(np.array([0, 100]), np.array([50, half]))
    with pytest.raises(DataError, match="bytes 1052672 to"):
        file.touch(np.array([half - 1]), np.array([half + 1]))


def test_reading_checks_documents_in_their_own_place(damaged) -> None:
    start, size = damaged.sections["documents"]
    file = TokenFile(damaged(start + size - 1), verify="read")
    file.touch(np.array([0]), np.array([10]))
    with pytest.raises(DataError, match="document offsets"):
        file.touch(np.array([0]), np.array([len(file.documents)]), "documents")


def test_off_checks_nothing_but_the_header(damaged) -> None:
    file = TokenFile(damaged(HEADER_BYTES + 5), verify="off")
    file.touch(np.array([0]), np.array([len(file)]))


def test_verify_returns_its_rate(damaged, monkeypatch: pytest.MonkeyPatch) -> None:
    path = damaged(0)
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    file = TokenFile(path, verify="read")
    blocks, clock = len(file._unseen), iter((100.0, 104.0))
    monkeypatch.setattr(token_file, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert blocks > 1
    assert file.verify(threads=2) == blocks * BLOCK_BYTES / 4


def test_a_check_that_nobody_waits_for_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x.tokens", [2_000_000])
    file, asked = TokenFile(tmp_path / "x.tokens", verify="read"), []
    check, shutdown, cancelled = file._check, ThreadPoolExecutor.shutdown, threading.Event()

    def check_later(block: int) -> None:
        assert block == 0 or cancelled.wait(300)
        check(block)

    def cancel(pool: ThreadPoolExecutor, wait: bool = True, cancel_futures: bool = False) -> None:
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        cancelled.set()
        shutdown(pool, wait=wait)

    monkeypatch.setattr(file, "_check", check_later)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", cancel)
    file.verify(threads=1, go_on=lambda: bool(asked.append(1)))
    assert len(asked) == 1
    assert file._unseen.any(), "what was not checked is not trusted"


def test_a_token_outside_the_vocabulary_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="token 300 is outside the vocabulary of 300"),
        TokenWriter(tmp_path / "x.tokens", Header("f", 300)) as writer,
    ):
        writer.add(np.array([1, 300]), np.array([2]), 2)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_writer_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    write(tmp_path / "x.tokens", [9])
    before = (tmp_path / "x.tokens").read_bytes()
    with pytest.raises(ZeroDivisionError), TokenWriter(tmp_path / "x.tokens", Header("f", 9)):
        1 / 0  # noqa: B018
    assert (tmp_path / "x.tokens").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_the_header_can_be_read_by_eye(tmp_path: Path) -> None:
    write(tmp_path / "x.tokens", [9])
    text = (tmp_path / "x.tokens").read_bytes()[:HEADER_BYTES]
    said = json.loads(re.search(rb"\{.*\}", text)[0])
    assert (said["dtype"], said["tokens"], said["vocab_size"]) == ("uint16", 9, 32000)


@pytest.mark.parametrize("name", ["x.tokens", ".x.tokens.partial", ".x.tokens.offsets"])
def test_a_link_is_not_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / name).symlink_to("target")
    with pytest.raises(LinkError, match=f"{name} is a link to target; remove it"):
        write(tmp_path / "x.tokens", [3])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "target"])
    assert (tmp_path / "target").read_text() == "precious"
