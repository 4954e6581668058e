"""The folder that becomes a dataset, and ``.parts`` in it, which holds what is not joined yet.

``.parts`` has a marker, so that what a killed program left is used again, and no file or folder of
the user is replaced or removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llamax.data.megatron import indexed_prefix
from llamax.data.prepare.chunks import SPLITS
from llamax.data.tokenizer.special_tokens import FILES
from llamax.runtime.address import refuse_address
from llamax.runtime.errors import DataError
from llamax.runtime.files import make_folder, write_atomic
from llamax.runtime.hub_files import CHAT_TEMPLATE
from llamax.runtime.logging import logger

PARTS, MARKER = ".parts", "made-by-llamax-prepare"
TOKENIZERS = ("tokenizer.model", "tokenizer.json", "tokenizer.tiktoken")


def make_parts_folder(out: Path, tokenizer: str | os.PathLike[str], key: str, rows: bool) -> Path:
    """Make ``out/.parts`` unless it exists; its path.

    ``tokenizer``: the file or folder that is copied to ``out``, "" if it is trained; ``key``: the
    key of the text; ``rows``: whether the dataset gets a chat template of its own.

    Raises DataError if the dataset would replace a file that llamax prepare did not make, or if
    ``.parts`` is another program's, and ConfigError for an address.
    """
    refuse_address(out)
    parts = out / PARTS
    try:
        if not (parts / MARKER).is_file():
            if parts.is_dir() and any(parts.iterdir()):
                raise DataError(
                    f"{parts} was not made by llamax prepare; remove it or choose another `out`"
                )
            if not (out / "dataset.json").exists():
                _refuse_to_replace(out, _kept(out, tokenizer, rows), key)
            make_folder(parts)
            write_atomic(parts / MARKER, b"")
    except OSError as error:
        raise DataError(f"{out}: cannot be made ({error.strerror}); choose another `out`") from None
    return parts


@contextmanager
def keeping(parts: Path) -> Iterator[None]:
    """If a mistake in the inputs ends the block, say what is kept; remove ``parts`` if nothing is.

    The folder around it goes too if it holds nothing else.
    """
    try:
        yield
    except DataError:
        finished = [path for path in parts.iterdir() if path.suffix in (".tokens", ".model")]
        if finished:
            logger.info("%s keeps what is done, and the same command goes on from there", parts)
        else:
            shutil.rmtree(parts)
            with suppress(OSError):
                parts.parent.rmdir()
        raise


def _kept(out: Path, tokenizer: str | os.PathLike[str], rows: bool) -> set[str]:
    """The names in ``out`` of the tokenizer that is used, if it lies there: it stays as it is."""
    if not tokenizer or not out.is_dir():
        return set()
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
    if not folder.is_dir() or not folder.samefile(out):
        return set()
    return {*TOKENIZERS, *FILES} - ({CHAT_TEMPLATE} if rows else set())


def _refuse_to_replace(out: Path, kept: set[str], key: str) -> None:
    indexed = [indexed_prefix(out, split, key).name for split in SPLITS]
    names = [f"{split}.tokens" for split in SPLITS]
    names += [f"{name}{suffix}" for name in indexed for suffix in (".idx", ".bin")]
    for name in (*names, *TOKENIZERS, *FILES):
        if name not in kept and os.path.lexists(out / name):
            raise DataError(
                f"{out / name} exists already, and {out} is not a dataset; remove it or choose "
                "another `out`"
            )
