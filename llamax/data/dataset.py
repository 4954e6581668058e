"""A dataset folder: ``train.tokens``, perhaps ``validation.tokens``, and the tokenizer of both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llamax.data.tokens import TokenFile, Verify
from llamax.errors import DataError


@dataclass(frozen=True)
class Dataset:
    """The token files of a folder, open."""

    folder: Path
    train: TokenFile
    validation: TokenFile | None

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer that made the tokens."""
        return self.train.header.tokenizer

    def check_vocabulary(self, vocab_size: int) -> None:
        """DataError where a model of ``vocab_size`` ids could not embed every token."""
        needed = self.train.header.vocab_size
        if needed > vocab_size:
            raise DataError(
                f"{self.folder}: its tokenizer has {needed} ids but model.vocab_size={vocab_size}; "
                f"use model.vocab_size={needed} or more, or the model's own tokenizer"
            )

    def check_tokenizer(self, fingerprint: str) -> None:
        """DataError where the tokens come from another tokenizer than ``fingerprint``."""
        if fingerprint != self.fingerprint:
            raise DataError(
                f"{self.folder}: made with tokenizer {self.fingerprint[:12]}, but the checkpoint "
                f"was trained on tokenizer {fingerprint[:12]}; prepare the data with that one"
            )


def open_dataset(folder: str | Path, verify: Verify = "start") -> Dataset:
    """The dataset in ``folder``; ``verify`` as for ``TokenFile``.

    Raises DataError where there is none, a file is damaged, or its files do not belong together.
    """
    folder = Path(folder)
    if not (folder / "train.tokens").is_file():
        raise DataError(
            f"{folder}: holds no train.tokens; make a dataset with llamax prepare --out {folder}"
        )
    train = TokenFile(folder / "train.tokens", verify)
    validation = None
    if (folder / "validation.tokens").is_file():
        validation = TokenFile(folder / "validation.tokens", verify)
        if validation.header.tokenizer != train.header.tokenizer:
            raise DataError(
                f"{folder}: train.tokens and validation.tokens come from two tokenizers; "
                "make both again with llamax prepare"
            )
    return Dataset(folder, train, validation)
