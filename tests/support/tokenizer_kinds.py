"""A dozen kinds of tokenizer as Hugging Face folders have them, each small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from llamax.data.tokenizer.llama3 import LLAMA3_PATTERN

TEXT = (
    "The Elbe and the Rhine are rivers. Name a river. Größe, été, 水. Question: what is one? "
    "Answer: two\n def self.x(y):\n\n    return 'it''s'\n" * 30
)
SPECIAL = ("<|bot|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}{{ '[' + m.role + '] ' + m.content + (eos_token if "
    "m.role == 'assistant' else '') }}{% endfor %}"
)
BOT = {"bos_token": "<|bot|>", "eos_token": "<|eos|>"}
S = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_level(prefix_space: bool = False) -> Tokenizer:
    engine = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    byte = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=prefix_space)
    engine.pre_tokenizer = byte if prefix_space else pre_tokenizers.Sequence([split, byte])
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, show_progress=False, initial_alphabet=alphabet)
    engine.train_from_iterator([TEXT], trainer)
    return engine


def metaspace(scheme: str) -> Tokenizer:
    """With the space of a text's beginning from a normaliser ("prepend"), or by a scheme."""
    engine = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    normaliser = scheme == "prepend"
    if normaliser:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        engine.normalizer = normalizers.Sequence(steps)
    inside = "never" if normaliser else scheme
    engine.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=inside, split=True)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, special_tokens=pieces)
    engine.train_from_iterator([TEXT], trainer)
    written = json.loads(engine.to_str())
    added = [token for token in written["added_tokens"] if not token["content"].startswith("<0x")]
    before = None if normaliser else written["pre_tokenizer"]
    engine = Tokenizer.from_str(
        json.dumps({**written, "added_tokens": added, "pre_tokenizer": before})
    )
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return engine


def words() -> Tokenizer:
    found = sorted({*TEXT.split(), *".,:?!'()"})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *found])}
    engine = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    return special(engine, ("<unk>", "<s>", "</s>"))


def special(engine: Tokenizer, names: tuple[str, ...] = SPECIAL, strips: bool = False) -> Tokenizer:
    engine.add_special_tokens(
        [AddedToken(name, normalized=False, lstrip=strips, rstrip=strips) for name in names]
    )
    return engine


def around(engine: Tokenizer, bos: str, eos: str = "") -> Tokenizer:
    """With BOS, and perhaps EOS, put around every text."""
    names = [name for name in (bos, eos) if name]
    engine.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}".strip(),
        special_tokens=[(name, engine.token_to_id(name)) for name in names],
    )
    return engine


def kinds() -> dict[str, tuple[Tokenizer, dict[str, Any]]]:
    """Engine and tokenizer_config.json of each kind."""
    turns = ("<|im_start|>", "<|im_end|>")
    im = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    chat, no_system = {"chat_template": CHATML}, {"chat_template": NO_SYSTEM}
    return {
        "bytes": (around(special(byte_level()), "<|bot|>"), BOT | chat),
        "bytes, BOS not added": (special(byte_level()), im | chat),
        "bytes, no BOS": (special(byte_level()), {"eos_token": "<|eos|>"} | chat),
        "bytes, no system text": (around(special(byte_level()), "<|bot|>"), BOT | no_system),
        "bytes, EOS added": (around(special(byte_level()), "<|bot|>", "<|eos|>"), BOT),
        "bytes, tokens strip": (around(special(byte_level(), strips=True), "<|bot|>"), BOT | chat),
        "bytes, space before": (around(special(byte_level(True)), "<|bot|>"), BOT),
        "metaspace, normaliser": (around(special(metaspace("prepend"), turns), "<s>"), S | chat),
        "metaspace, first": (around(special(metaspace("first"), turns), "<s>"), S | chat),
        "metaspace, always": (special(metaspace("always"), turns), S | no_system),
        "metaspace, never": (around(special(metaspace("never")), "<s>"), S | chat),
        "words": (around(words(), "<s>"), S | {"clean_up_tokenization_spaces": True}),
    }


def write_kind(name: str, folder: Path) -> Tokenizer:
    """The files of a kind in a new folder, and its engine."""
    engine, config = kinds()[name]
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    whole = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(whole))
    return engine
