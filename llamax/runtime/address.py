"""Addresses such as s3://bucket/path: their forms, and the places that take a folder instead.

::

    s3://bucket/path    gs://bucket/path    hf://datasets/org/name    file:///folder

A path that begins like an address would be a local folder named ``s3:``.

Sources: Amazon S3, "Bucket naming rules"; Cloud Storage, "Bucket names"; the grammar of ``hf://``
in huggingface_hub 2.4.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from llamax.runtime.errors import ConfigError, join_or

# pathlib writes s3://bucket as s3:/bucket; one letter may be a drive
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(.*)", re.DOTALL)
_KINDS = "(models|datasets|spaces|buckets)/"
_REPO = re.compile(rf"({_KINDS})?(?!{_KINDS})[\w.-]+/[\w.-]+(@[\w.%/-]+)?(/.*)?", re.ASCII)
_BUCKETS = {  # protocol: the form of a bucket's name, and that form in words
    "s3": (r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", "3 to 63 lower-case letters, digits, - and ."),
    "gs": (
        r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]",
        "3 or more lower-case letters, digits, - _ and .",
    ),
}
CACHES = ("s3", "gs", "hf", "file")  # where compiled programs may be shared
_SAME = {"s3a": "s3", "gcs": "gs"}
_SHAPES = {
    "s3": "s3://bucket/path",
    "gs": "gs://bucket/path",
    "hf": "hf://datasets/org/name",
    "file": "file:///folder",
}


def protocol(text: str | os.PathLike[str]) -> str:
    """The part of an address before ``://``; "" for a path."""
    match = _ADDRESS.fullmatch(os.fspath(text))
    return match[1] if match else ""


def shapes(protocols: Sequence[str]) -> str:
    """An example for each protocol, to choose from."""
    return join_or([_SHAPES[each] for each in protocols])


def problem(address: str, protocols: Sequence[str]) -> str:
    """Why ``address`` is none of ``protocols`` (s3, gs, hf, file), and what to write; "" if it is.

    The line has no subject: "has no bucket; use ...".
    """
    found = protocol(address)
    kind = _SAME.get(found, found)
    rest = address[len(found) + 3 :]
    if kind not in protocols or not address.startswith(f"{found}://"):
        return f"is no address that is known here; use {shapes(protocols)}"
    if kind == "file" and not rest.startswith("/"):
        return f"names no folder of this machine; use {_SHAPES[kind]}"
    if kind == "hf" and not _REPO.fullmatch(rest):
        return f"names no repository of the Hub; use {_SHAPES[kind]}"
    if kind in _BUCKETS:
        bucket, (form, words) = rest.partition("/")[0], _BUCKETS[kind]
        if not bucket:
            return f"names no bucket; use {_SHAPES[kind]}"
        if not re.fullmatch(form, bucket) or ".." in bucket:
            return f"has the bucket {bucket!r}; the name of a bucket has {words}"
    return ""


def refuse_address(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError if an address stands where files are written."""
    if found := protocol(path):
        address = re.sub("^(s3|gs|hf|https?):/(?!/)", r"\1://", os.fspath(path))  # by pathlib
        raise ConfigError(
            f"{address} is an address of {found}, not a path; write to a folder, and copy "
            "it from there"
        )
