"""Training a sentencepiece tokenizer on texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from llamax.runtime.errors import DataError
from llamax.runtime.files import write_atomic


def train_sentencepiece(texts: Iterable[str], vocab_size: int, out: str | Path) -> Path:
    """Train a tokenizer with the settings of Llama 2's, and write it to ``out``.

    BPE with byte fallback, single digits, no normalization (identity), runs of spaces kept.
    Texts are fed line by line.  Raises DataError if there is too little text for ``vocab_size``,
    and whatever ``texts`` raises.
    """
    import sentencepiece

    model: list[bytes] = []

    class Sink:
        def write(self, raw: bytes) -> None:
            model.append(raw)

    failed: list[BaseException] = []

    def lines() -> Iterator[str]:
        # The engine swallows what its iterator raises, and goes on or fails with less text.
        try:
            for text in texts:
                yield from (line for line in text.split("\n") if line)
        except BaseException as error:
            failed.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=Sink(),
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            character_coverage=0.9999,
            max_sentence_length=16384,
            input_sentence_size=1_000_000,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if not failed:
            raise DataError(
                f"no tokenizer of {vocab_size} pieces can be trained on this text {_why(error)}"
            ) from None
    if failed:
        raise failed[0]
    write_atomic(Path(out), b"".join(model))
    return Path(out)


def _why(error: Exception) -> str:
    """Why a tokenizer cannot be trained, in words of the engine, a bracket, and what to do."""
    said = " ".join(str(error).split())
    if most := re.search(r"set it to a value <= (\d+)", said):
        return f"(it has fewer different pieces); use {most[1]} or fewer, or more text"
    if least := re.search(r"\d+ vs (\d+)", said):
        return f"(its characters alone are {least[1]}); use {least[1]} or more"
    # The reason stands between the engine's file, line and condition, and its advice.
    reason = said.rpartition("] ")[2].partition(". ")[0]
    return f"({reason}); use another size (300 or more), or more text"
