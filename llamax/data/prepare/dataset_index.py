"""dataset.json: what a folder of tokens was made of.

It is written last, so a folder that has it is a whole dataset; a second ``prepare`` of the same
inputs finds by it that nothing is left to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from llamax.data.dataset import read_index
from llamax.data.megatron import IndexedFile, indexed_prefix, is_prefix
from llamax.data.prepare.chunks import SPLITS, Settings, header_of
from llamax.data.prepare.hub_dataset import FROM_HUB
from llamax.data.prepare.instruction_rows import InstructSettings
from llamax.data.prepare.template_file import write_template
from llamax.data.prepare.text_chunks import TextSettings
from llamax.data.token_file import TokenFile
from llamax.data.tokenizer.hf_tokenizer import HuggingFace
from llamax.data.tokenizer.special_tokens import files_beside
from llamax.data.tokenizer.tokenizer import SentencePiece, Tokenizer
from llamax.runtime.errors import DataError
from llamax.runtime.files import copy_file, write_atomic

Format = Literal["llamax", "megatron"]


def write_index(
    out: Path,
    settings: Settings,
    tokenizer: Tokenizer,
    identity: str,
    trained: str | None,
    format: Format,
    unread: Mapping[str, int],
    from_hub: Sequence[str],
) -> None:
    """Write the tokenizer's files and, last, dataset.json."""
    copy_file(tokenizer.path, out / _tokenizer_name(tokenizer))
    if isinstance(tokenizer, HuggingFace | SentencePiece):
        for path in files_beside(tokenizer.path):
            copy_file(path, out / path.name)
    header = header_of(settings, tokenizer)
    fields = {name: getattr(header, name) for name in ("vocab_size", "bos_id", "eos_id")}
    index = {
        "identity": identity,
        **_plain(settings),
        "tokenizer_file": _tokenizer_name(tokenizer),
        "trained": trained,
        "indexed": fields if format == "megatron" else None,
        "unread": dict(unread),
        FROM_HUB: list(from_hub),
        "prompt": write_template(out, settings, tokenizer),
    }
    write_atomic(out / "dataset.json", (json.dumps(index, indent=2) + "\n").encode())


def _tokenizer_name(tokenizer: Tokenizer) -> str:
    """The name under which a dataset keeps a tokenizer's file."""
    if isinstance(tokenizer, SentencePiece):
        return "tokenizer.model"
    return "tokenizer.json" if isinstance(tokenizer, HuggingFace) else "tokenizer.tiktoken"


def already_made(out: Path, settings: Settings, identity: str, format: Format) -> bool:
    """Whether ``out`` holds this very dataset; DataError if it holds another."""
    marker = out / "dataset.json"
    if not marker.exists():
        return False
    index = read_index(marker)
    if ("megatron" if index.get("indexed") else "llamax") != format:
        raise DataError(
            f"{out}: holds this or another dataset in the other format; choose another `out`, or "
            "remove that folder"
        )
    for key, value in _plain(settings).items():
        if (other := index.get(key)) != value:
            raise DataError(
                f"{out}: holds another dataset, with {key}={_short(other)} instead of "
                f"{_short(value)}; choose another `out`, or remove that folder"
            )
    if index.get("identity") != identity:
        raise DataError(
            f"{out}: holds a dataset of other text, or of an earlier state of this text; choose "
            "another `out`, or remove that folder"
        )
    return True


def count_documents(out: Path, key: str, format: Format) -> int:
    """The number of documents of all splits."""
    if format == "megatron":
        prefixes = [indexed_prefix(out, split, key) for split in SPLITS]
        return sum(len(IndexedFile(path, "off").marks) - 1 for path in prefixes if is_prefix(path))
    paths = [out / f"{split}.tokens" for split in SPLITS]
    return sum(TokenFile(path, "off").header.documents for path in paths if path.exists())


def _plain(settings: Settings) -> dict[str, object]:
    """Settings as JSON gives them back."""
    assert isinstance(settings, TextSettings | InstructSettings)
    return dict(json.loads(json.dumps(asdict(settings))))


def _short(value: object) -> str:
    if isinstance(value, list):  # fields and their columns
        return ",".join("=".join(map(str, pair)) for pair in value) or "none"
    return text if len(text := str(value)) <= 40 else f"{text[:37]!r}..."
