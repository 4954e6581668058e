"""Rows, tokenizers and datasets of questions and answers that tests share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from llamax.cli.prepare import main
from llamax.data.tokenizer.train import train_sentencepiece
from support.corpora import python_sources

ROWS = [
    {"instruction": "Who wrote Hamlet?", "context": "", "response": "Shakespeare."},
    {
        "instruction": "What is it?",
        "context": "A cat sat.\nIt purred.",
        "response": "A cat.\n\nYes",
    },
    {"instruction": "이름이 뭐예요?", "context": "그는 철수다. 🙂", "response": "철수입니다. ½"},
    {"instruction": " spaces ", "response": "  kept\t"},
]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A JSONL file."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def sums(count: int, longest: int = 40) -> list[dict[str, Any]]:
    """Rows of different lengths that a tiny model can learn."""
    rows = []
    for i in range(count):
        words = " ".join(str((i * 7 + j) % 10) for j in range(1 + (i * 13) % longest))
        rows.append({"instruction": f"Repeat {i % 10}: {words}", "response": f"{i % 10} {i % 3}"})
    return rows


def llama2_tokenizer(folder: Path, pieces: int = 600) -> Path:
    """A small sentencepiece model made as Llama 2's is."""
    return train_sentencepiece(python_sources(8), pieces, folder / "tokenizer.model")


def llama3_tokenizer(folder: Path, template: str = "") -> Path:
    """A small byte-level BPE with Llama 3's special tokens, as a Hugging Face folder."""
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    names += ["<|eot_id|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    engine.train_from_iterator(python_sources(5), trainer)
    engine.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    bos = (names[0], engine.token_to_id(names[0]))
    engine.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A", pair=f"{names[0]} $A {names[0]}:1 $B:1", special_tokens=[bos]
    )
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[0],
        "eos_token": names[1],
        **({"chat_template": template} if template else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def prepare(out: Path, *args: object) -> Path:
    """A dataset made by ``llamax prepare``."""
    assert main([*map(str, args), "--out", str(out), "--workers", "1"]) == 0
    return out
