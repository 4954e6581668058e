"""The fast engine gives the ids of the engine that defines them, on any text."""

from __future__ import annotations

import base64
import json
import os
import pickle
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.corpora import mistral, python_sources, train_byte_level, train_unlike_llama
from tokenizers import Regex, pre_tokenizers

from llamax.data.prepare import pipeline
from llamax.data.prepare.file_kinds import kind_of
from llamax.data.prepare.row_range import RowRange
from llamax.data.prepare.text_chunks import TextChunk
from llamax.data.prepare.text_files import Source
from llamax.data.tokenizer import fast_engine
from llamax.data.tokenizer.cuts import TEKKEN_PATTERN
from llamax.data.tokenizer.fast_settings import Unsupported, of_engine, of_sentencepiece
from llamax.data.tokenizer.hf_export import export_tokenizer
from llamax.data.tokenizer.llama3 import LLAMA3_PATTERN
from llamax.data.tokenizer.sentencepiece_model import SentencePieceModel
from llamax.data.tokenizer.tiktoken_file import TikToken
from llamax.data.tokenizer.tokenizer import SentencePiece, Tokenizer, load_tokenizer
from llamax.data.tokenizer.train import train_sentencepiece

pytest.importorskip("gigatoken")

Judge = Callable[[str], list[int]]
KINDS = ["mistral", "mistral-v3", "trained", "tiktoken", "llama3", "qwen2", "tekken", "gpt2"]
KINDS += ["mistral-json", "metaspace"]
LONG_RUNS = 1_000_000  # characters without a space


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tokenizer that was sped up, and the engine that defines its ids."""
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


class Pair:
    """A tokenizer of a kind, sped up, and the ids by the package that defines them."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        path = make_tokenizer(kind, folder)
        self.tokenizer = load_tokenizer(path)
        assert self.tokenizer.speed_up() == ""
        self.judge = judge_of(path)

    def check(self, texts: list[str]) -> None:
        ours = self.tokenizer.encode_documents(texts)
        assert [ids.dtype.name for ids in ours] == ["uint32"] * len(texts)
        for text, ids in zip(texts, ours, strict=True):
            assert ids.tolist() == self.judge(text), ascii(text[:80])


def make_tokenizer(kind: str, folder: Path) -> Path:
    if kind == "mistral":
        return mistral()
    if kind == "mistral-v3":
        return mistral().with_name("mistral_instruct_tokenizer_240323.model.v3")
    if kind == "trained":
        korean = ["가나다 라마바 사아자 " * 20, "안녕하세요 반갑습니다 " * 20]
        return train_sentencepiece(python_sources(12) + korean, 1000, folder / "tokenizer.model")
    if kind == "mistral-json":
        export_tokenizer(load_tokenizer(mistral()), folder)
        (folder / "tokenizer.model").unlink()
        return folder / "tokenizer.json"
    if kind == "metaspace":
        path = make_tokenizer("mistral-json", folder)
        value = json.loads(path.read_text())
        value["normalizer"] = None
        value["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
        path.write_text(json.dumps(value))
        return path
    ranks = train_byte_level(folder / "small.tiktoken")
    if kind == "tiktoken":
        return ranks
    export_tokenizer(load_tokenizer(ranks), folder)
    engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    patterns = {"qwen2": LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"), "tekken": TEKKEN_PATTERN}
    if kind in patterns:
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(patterns[kind]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif kind == "gpt2":
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    engine.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def judge_of(path: Path) -> Judge:
    """The ids of a text by the package that defines them, names of special tokens being text."""
    if path.suffix == ".json":
        hub = tokenizers.Tokenizer.from_file(str(path))
        hub.encode_special_tokens = True
        return lambda text: hub.encode(text, add_special_tokens=False).ids
    if path.suffix == ".tiktoken":
        lines = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        encoding = tiktoken.Encoding(
            "judge", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        return encoding.encode_ordinary
    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    return lambda text: list(model.encode(text))


words = st.sampled_from(
    ["def", "self.x", "  ", "    ", " " * 17, " " * 300, "\n", "\n\n    ", "\t", "▁", "▁▁", "don't",
     "1234", "===", "--", "가나다", "日本語", "é", "e\u0301", "ß", "😀", "\u200b", "<s>", "<0x41>",
     "[INST]", "<|eot_id|>", "'LL", "\u017f", "\r\n", "\u3000"]
)  # fmt: skip
# Lone surrogates are no text: nothing that was UTF-8 holds them.
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ascii_text = st.text(st.characters(max_codepoint=127), max_size=60)
texts = st.lists(
    st.one_of(anything, ascii_text, st.lists(st.one_of(words, anything), max_size=12).map("".join)),
    max_size=8,
)


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


# ---- tokenizers that the fast engine would read differently


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"model_type": "unigram"}, "is not a BPE"),
        ({"byte_fallback": False}, "has no bytes to fall back on"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text"),
        ({"remove_extra_whitespaces": True}, "removes extra spaces"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces at the end of pieces"),
        ({"user_defined_symbols": ["<a tool>", "\n\n"]}, "has user-defined pieces with spaces"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_models_go_to_sentencepiece(
    tmp_path: Path, settings: dict[str, object], why: str
) -> None:
    path = train_unlike_llama(tmp_path, **settings)
    tokenizer = SentencePiece(path, path.read_bytes())
    assert tokenizer.speed_up() == why
    texts = ["", "a  b <a tool>\n\nx", *python_sources(3)]
    ours = tokenizer.encode_documents(texts)
    assert [ids.tolist() for ids in ours] == [*map(judge_of(path), texts)]


@pytest.mark.parametrize(
    "settings",
    [
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["<tool>", "\n\n"]},
        {"split_by_whitespace": False},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_models_unlike_llama_are_exact(tmp_path: Path, settings: dict[str, object]) -> None:
    path = train_unlike_llama(tmp_path, **settings)
    tokenizer = SentencePiece(path, path.read_bytes())
    assert tokenizer.speed_up() == ""
    texts = ["", " ", "a  b<tool> <tool>", "▁x", "a\n\n\nb\n\n <tool><tool>", *python_sources(6)]
    ours = tokenizer.encode_documents(texts)
    assert [ids.tolist() for ids in ours] == [*map(judge_of(path), texts)]


def _piece(text: str, score: float, kind: int) -> bytes:
    raw = text.encode()
    body = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score) + b"\x18"
    body += bytes([kind])
    return b"\x0a" + bytes([len(body)]) + body


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([("ab", -1.0, 1), ("bc", -2.0, 1)], ""),
        ([("ab", -1.0, 1), ("bc", -1.0, 1)], "has several pieces of one score"),
        ([("ab", -1.0, 1), ("zyx", -2.0, 1)], ""),
        ([("ab", -1.0, 1), ("bc", -2.0, 5)], "has unused pieces"),
        ([("▁▁", -9.0, 1), ("▁▁▁", -9.0, 1), ("▁a", -2.0, 1)], ""),
        ([("▁▁", -9.0, 1), ("▁▁▁", -9.0, 1), ("▁a", -10.0, 1)], ""),
    ],
    ids=["distinct", "equal scores", "unreachable", "unused", "runs last", "runs first"],
)
def test_each_condition_is_checked(
    pieces: list[tuple[str, float, int]], why: str, tmp_path: Path
) -> None:
    """On small hand-made vocabularies."""
    raw = _piece("<unk>", 0.0, 2)
    raw += b"".join(_piece(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256))
    raw += b"".join(_piece(*piece) for piece in pieces)
    raw += b"".join(_piece(c, -50.0 - i, 1) for i, c in enumerate("abcxyz▁"))
    raw += b"\x12\x05\x18\x02\x98\x02\x01" + b"\x1a\x04\x18\x01\x20\x00"
    tokenizer = SentencePiece(tmp_path / "t.model", raw)
    assert tokenizer.speed_up() == why
    own = sentencepiece.SentencePieceProcessor(model_proto=raw)
    texts = ["abc bca", "   a    abc", "aab  bcc  ", "zyx xyz", *(" " * n + "a" for n in range(30))]
    assert [ids.tolist() for ids in tokenizer.encode_documents(texts)] == own.encode(texts)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model": {"type": "Unigram"}}, "is not a BPE"),
        ({"model": {"new": 1}}, "has an unknown setting model.new"),
        ({"model": {"dropout": 0.1}}, "has model.dropout"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "has model.end_of_word_suffix"),
        ({"model": {"vocab": {"a": 0}}}, "lacks tokens of single bytes"),
        ({"normalizer": {"type": "NFC"}}, "normalizes text"),
        ({"pre_tokenizer": None}, "splits text by another pattern than those of GPT-2"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "use_regex": False}}, "splits text by another pattern"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {
                            "type": "Split",
                            "pattern": {"Regex": LLAMA3_PATTERN},
                            "behavior": "Isolated",
                            "invert": True,
                        },
                        {**BYTE_LEVEL, "use_regex": False},
                    ],
                }
            },
            "splits text by another pattern",
        ),
        (
            {"added_tokens": [{"content": "<x>", "special": False, "rstrip": True}]},
            "has added tokens that depend on the text around them",
        ),
        ({"model": {"byte_fallback": True}}, "splits text in a way of its own"),
        (
            {"model": {"byte_fallback": True, "ignore_merges": False}, "pre_tokenizer": None},
            "has no bytes to fall back on",
        ),
        (
            {"model": {"byte_fallback": True, "ignore_merges": True}, "pre_tokenizer": None},
            "has model.ignore_merges",
        ),
        (
            {
                "model": {"byte_fallback": True},
                "pre_tokenizer": None,
                "normalizer": {"type": "Lowercase"},
            },
            "normalizes text",
        ),
    ],
)
def test_settings_that_the_engine_would_ignore(
    change: dict[str, dict[str, object]], why: str, tmp_path: Path
) -> None:
    value = json.loads(make_tokenizer("gpt2", tmp_path).read_text())
    assert of_engine(value)["model"] == value["model"]
    model = {**value["model"], **change.pop("model", {})}
    with pytest.raises(Unsupported, match=why):
        of_engine({**value, "model": model, **change})


def test_pieces_and_added_tokens_that_it_does_not_know() -> None:
    model = SentencePieceModel.from_bytes(mistral().read_bytes())
    assert of_sentencepiece(model, [])["model"]["type"] == "BPE"
    with pytest.raises(Unsupported, match="has added tokens in texts"):
        of_sentencepiece(model, ["<tool>"])


def test_an_engine_that_differs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_tokenizer("tiktoken", tmp_path)
    tokenizer = load_tokenizer(path)
    ranks = path.read_bytes().splitlines()
    a, b = ranks[300].split()[0], ranks[301].split()[0]
    ranks[300:302] = [b + b" 300", a + b" 301"]  # the file changed after it was read
    path.write_bytes(b"\n".join(ranks) + b"\n")
    assert "gigatoken encodes" in (why := tokenizer.speed_up())
    assert "differently" in why
    path.write_bytes(
        b"\n".join([*ranks[:300], base64.b64encode(b"\xfe\xfd\xfc\xfb\xfa") + b" 300"])
    )
    assert tokenizer.speed_up().startswith("gigatoken cannot read it: ")
    monkeypatch.setattr(fast_engine, "find_spec", lambda name: None)
    assert tokenizer.speed_up() == "the package gigatoken is not installed"


@pytest.mark.parametrize(("name", "kib", "fast"), [
    ("a.txt", 1100, True), ("a.txt", 900, False), ("a.txt.gz", 300, True), ("a.txt.gz", 200, False),
    ("a.parquet", 300, True), ("a.arrow", 300, False),
])  # fmt: skip
def test_the_engine_is_loaded_for_inputs_that_hold_enough_text(
    tmp_path: Path, name: str, kib: int, fast: bool
) -> None:
    (path := tmp_path / name).touch()
    os.truncate(path, kib * 2**10)
    rows = RowRange(str(path), kind_of(path), 0, 1, 0, 1, "") if kind_of(path) else None
    source = rows or Source(str(path), 0, kib * 2**10, "")
    tokenizer = load_tokenizer(train_byte_level(tmp_path / "ranks.tiktoken"))
    assert isinstance(tokenizer, TikToken)
    pipeline._speed_up(tokenizer, [TextChunk((source,))])
    assert (tokenizer.fast is not None) == fast
