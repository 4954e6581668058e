"""Names of repositories on the Hugging Face Hub, where a path could stand as well.

::

    org/name   org/name@REVISION   hf://org/name@REVISION          a model or tokenizer
    hf://datasets/org/name   hf://datasets/org/name@REVISION/PATH  a dataset, or a part of it

A path that exists is a path.  ``hf://`` always names the Hub: the spelling of huggingface_hub and
fsspec.  A revision is a branch, a tag or a commit; without one it is the main branch.

Source: the grammar of ``hf://`` in huggingface_hub 2.4, ``utils/_hf_uris.py``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import unquote

from llamax.runtime.errors import ConfigError

Kind = Literal["model", "dataset"]

COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
# First parts of a page's address on the Hub, which no owner of a repository can have.
RESERVED = {"models", "datasets", "spaces", "kernels", "buckets", "api", "docs"}
FILES = re.compile(  # names of files: of a mistyped path, not of a repository
    r".+\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|bz2|xz|zst|model|tiktoken|toml|bin|idx|safetensors|py|md)"
)
_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_REPO = rf"({_PART}/{_PART})"
_REVISION = r"(?:@(refs/(?:pr|convert)/[\w.-]+|[\w.%-]+))?"
_PLAIN = re.compile(rf"{_REPO}(?:@([\w.-]+(?:/[\w.-]+)*))?", re.ASCII)
_URI = re.compile(rf"hf:/{{1,2}}(?:(models|datasets)/)?{_REPO}{_REVISION}(?:/(.+))?", re.ASCII)


class HubName(NamedTuple):
    """A repository on the Hub; ``path``: a file or folder in it, of datasets alone."""

    kind: Kind
    repo: str
    revision: str = ""
    path: str = ""

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return bool(COMMIT.fullmatch(self.revision))

    @property
    def page(self) -> str:
        """The part of the repository's address after the host."""
        return self.repo if self.kind == "model" else f"datasets/{self.repo}"

    def __str__(self) -> str:
        scheme = "" if self.kind == "model" else "hf://"
        revision = f"@{self.revision}" if self.revision else ""
        return f"{scheme}{self.page}{revision}{f'/{self.path}' if self.path else ''}"


def hub_name(text: str | Path, kind: Kind = "model", within: Path = Path()) -> HubName | None:
    """The repository that a text names; None if it is a path.

    A relative path counts from ``within``.  Raises ConfigError for a text that begins with ``hf:``
    and names no repository of this kind.
    """
    text = str(text)
    if text.startswith("hf:"):
        return _from_uri(text, kind)
    if os.path.lexists(within / text) or FILES.fullmatch(text):
        return None
    match = _PLAIN.fullmatch(text)
    if match is None or text.partition("/")[0] in RESERVED or ".." in text or "--" in match[1]:
        return None
    return HubName(kind, match[1], match[2] or "")


def _from_uri(text: str, kind: Kind) -> HubName:
    match = _URI.fullmatch(text)
    form = "hf://datasets/org/name" if kind == "dataset" else "hf://org/name"
    if (
        match is None
        or ".." in unquote(text)
        or "--" in match[2]
        or (match[1] is None and match[2].partition("/")[0] in RESERVED)
    ):
        raise ConfigError(f"{text} names no repository of the Hub; write {form}@REVISION or {form}")
    scope, repo, revision, path = match.groups()
    stated = "dataset" if scope == "datasets" else "model"
    if stated != kind:
        raise ConfigError(f"{text} names a {stated}, and a {kind} is needed: {form}")
    if path and kind == "model":
        raise ConfigError(f"{text} names a file of a repository; write hf://{repo}")
    return HubName(kind, repo, unquote(revision or ""), path or "")
