"""A dataset folder, as ``llamax prepare`` makes it: token files and their tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llamax.data.files import sha256
from llamax.data.tokens import TokenFile, Verify
from llamax.errors import DataError


@dataclass(frozen=True)
class Dataset:
    """An open dataset; ``validation`` is None if no document fell into it."""

    folder: Path
    train: TokenFile
    validation: TokenFile | None
    tokenizer_path: Path

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer that made the tokens."""
        return self.train.header.tokenizer

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise DataError if the tokens come from another tokenizer than a checkpoint's."""
        if fingerprint != self.fingerprint:
            raise DataError(
                f"{self.folder}: made with tokenizer {self.fingerprint[:12]}, but the checkpoint "
                f"was trained on tokenizer {fingerprint[:12]}; prepare the data with that one"
            )

    def verify(self, share: int = 0, of: int = 1) -> None:
        """Check the ``share``-th of ``of`` parts of the checksums; DataError where one is wrong."""
        for file in (self.train, self.validation):
            if file is not None:
                file.verify(share=share, of=of)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError if a model of ``vocab_size`` cannot embed every token."""
        own = self.train.header.vocab_size
        if own > vocab_size:
            raise DataError(
                f"{self.folder}: its tokenizer has {own} tokens, and model.vocab_size={vocab_size} "
                f"is fewer; set model.vocab_size={own} or more, or prepare with another tokenizer"
            )


def open_dataset(folder: str | Path, verify: Verify = "start") -> Dataset:
    """The dataset in a folder.

    Raises DataError where it is missing, unfinished or damaged, or where tokens and tokenizer do
    not belong together.
    """
    folder = Path(folder)
    marker = folder / "dataset.json"
    if not marker.is_file():
        what = "is not finished" if (folder / ".parts").is_dir() else "is no dataset"
        raise DataError(
            f"{folder}: {what} (has no dataset.json); run llamax prepare --out {folder}"
        )
    tokenizer = folder / json.loads(marker.read_text())["tokenizer_file"]
    if not tokenizer.is_file():
        raise DataError(f"{tokenizer}: is missing; copy it back, or run llamax prepare again")
    files = {}
    for split in ("train", "validation"):
        path = folder / f"{split}.tokens"
        if split == "train" or path.exists():
            files[split] = TokenFile(path, verify)
            if files[split].header.tokenizer != sha256(tokenizer):
                raise DataError(
                    f"{path}: was not made with {tokenizer} (fingerprints "
                    f"{files[split].header.tokenizer[:12]} and {sha256(tokenizer)[:12]}); copy the "
                    "tokenizer back, or run llamax prepare again"
                )
    return Dataset(folder, files["train"], files.get("validation"), tokenizer)
