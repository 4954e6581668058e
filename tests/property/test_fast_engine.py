"""The fast engine gives the ids of the engine that defines them, on any text."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from support.corpora import mistral, python_sources

from llamax.data.tokenizer import fast_engine
from llamax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer

pytest.importorskip("gigatoken")
from support.engine_pairs import KINDS, Pair, texts

KINDS += ["mistral-json", "metaspace"]
LONG_RUNS = 1_000_000  # characters without a space


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tokenizer that was sped up, and the engine that defines its ids."""
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


@given(texts=texts)
@example(texts=["", " ", "▁", "\0", "  a", "a  ", "a" * 5000, " " * 1000 + "x"])
@settings(max_examples=60)
def test_any_text(pair: Pair, texts: list[str]) -> None:
    pair.check(texts)


@pytest.mark.parametrize("character", list(" \n\t-=#*_.\"'a0▁가"))
def test_runs_of_one_character(pair: Pair, character: str) -> None:
    pair.check(
        [
            left + character * n + right
            for n in range(45)
            for left in ("", "x", " ")
            for right in ("", "y", "1")
        ]
    )


def test_python_sources(pair: Pair) -> None:
    pair.check(python_sources(60))


def test_real_text(pair: Pair, shared_data: Path) -> None:
    plays = (shared_data / "tinyshakespeare/input.txt").read_text(encoding="utf-8")
    korean = (shared_data / "korean_chatbot/ChatbotData.csv").read_text(encoding="utf-8")
    sums = (shared_data / "gsm8k/test.jsonl").read_text(encoding="utf-8")
    pair.check([plays[:200_000], *korean.splitlines()[:3000], *sums.splitlines()[:300]])


def test_every_block_of_unicode(pair: Pair) -> None:
    """Also characters newer than an engine: they are letters to one and unknown to another."""
    draw = random.Random(0)
    documents = []
    for start in [*range(0, 0x34000, 0x100), *range(0xE0000, 0xE0200, 0x100)]:
        codes = [chr(c) for c in range(start, start + 0x100) if not 0xD800 <= c < 0xE000]
        if codes:
            mixed = "".join(draw.choices([*codes, " ", "\n", "a", "1", "."], k=400))
            documents += ["".join(codes), " ".join(codes), mixed]
    pair.check(documents)


def test_random_bytes(pair: Pair) -> None:
    draw = random.Random(0)
    bytes_ = [draw.randbytes(draw.randrange(1, 3000)) for _ in range(60)]
    pair.check([raw.decode(errors="replace") for raw in bytes_])
    pair.check([raw.decode("latin-1") for raw in bytes_])


def test_names_of_special_tokens_are_text(pair: Pair) -> None:
    draw = random.Random(0)
    names = [*pair.tokenizer.special][:20] + ["<s>", "</s>", "<unk>", "[INST]", "<|eot_id|>"]
    documents = [f"{a}{name}{b}" for name in names for a in ("", " ", "x") for b in ("", " ", "y")]
    documents += ["".join(draw.choices([*names, " ", "a", "\n", "<"], k=25)) for _ in range(200)]
    pair.check(documents)
    ids = [i for part in pair.tokenizer.encode_documents(documents) for i in part.tolist()]
    assert set(pair.tokenizer.special.values()).isdisjoint(ids)


def test_a_million_characters_without_a_space(pair: Pair) -> None:
    draw = random.Random(0)
    if "json" in pair.kind or pair.kind == "metaspace":
        count = LONG_RUNS // 20  # the judge takes a second for each 50,000
    else:
        count = LONG_RUNS
    pair.check(["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=count))])


def test_texts_that_do_not_begin_a_document(pair: Pair) -> None:
    """After a special token, and after a cut: the same as without the fast engine."""
    slow = load_tokenizer(pair.tokenizer.path)
    documents = ["", " ", "a  b", "  x", "▁x", "one two\n\n three", "[INST] a", *python_sources(3)]
    for fast, expected in zip(
        pair.tokenizer.encode_after(documents), slow.encode_after(documents), strict=True
    ):
        assert fast.tolist() == expected.tolist()
    for text in documents:
        assert pair.tokenizer.encode_rest(text).tolist() == slow.encode_rest(text).tolist()


def test_another_process_has_the_fast_engine_too(pair: Pair) -> None:
    texts = ["a  b", "<s>x", *python_sources(2)]
    twin: Tokenizer = pickle.loads(pickle.dumps(pair.tokenizer))
    assert [ids.tolist() for ids in twin.encode_documents(texts)] == [*map(pair.judge, texts)]
    assert not {"engine", "_engine"} & vars(twin).keys(), "only the fast engine was loaded"
    assert (twin.fingerprint, twin.special) == (pair.tokenizer.fingerprint, pair.tokenizer.special)
    assert twin.encode("a  b") == pair.judge("a  b")


# ---- memory


DISTINCT_WORDS = """
import random, sys
from pathlib import Path
from llamax.data.tokenizer import fast_engine
from llamax.data.tokenizer.tokenizer import load_tokenizer

fast_engine.CACHE_BYTES = int(sys.argv[2])
tokenizer = load_tokenizer(Path(sys.argv[1]))
assert tokenizer.speed_up() == ""
draw, peak, start = random.Random(0), 0, fast_engine.resident_bytes()
for _ in range(80):
    text = " ".join(f"{draw.getrandbits(60):x}" for _ in range(60_000))
    tokenizer.encode_documents([text])
    peak = max(peak, fast_engine.resident_bytes() - start)
print(peak)
"""


@pytest.mark.skipif(not fast_engine.resident_bytes(), reason="needs /proc")
def test_distinct_words_do_not_fill_the_memory() -> None:
    """Measured in a new process: a heap that other tests have used grows by other amounts."""
    limit = 32 * 2**20
    command = [sys.executable, "-c", DISTINCT_WORDS, str(mistral()), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # It peaks at 4 to 5 times the limit; without one, 4.8 million words take more than 600 MB.
    assert int(done.stdout) < 8 * limit, f"{int(done.stdout) / 2**20:.0f} MiB"
