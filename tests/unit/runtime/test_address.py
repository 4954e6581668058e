"""Addresses: what is one, and what stands where files are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llamax.checkpoint.atomic import new_folder
from llamax.data.prepare.output_folder import make_parts_folder
from llamax.inference.generate import new_file
from llamax.runtime.address import problem, protocol, refuse_address
from llamax.runtime.errors import ConfigError
from llamax.runtime.files import replace_output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/path", "s3"),
        ("s3:/bucket", "s3"),
        (Path("s3://bucket/path"), "s3"),
        ("hf://org/name", "hf"),
        ("git+ssh://x", "git+ssh"),
        ("c:/x", ""),
        ("a:b", ""),
        ("runs/s3://x", ""),
        ("/s3:/x", ""),
        ("./s3:/x", ""),
        ("", ""),
    ],
)
def test_the_protocol_of_an_address(text: str | Path, expected: str) -> None:
    assert protocol(text) == expected


def test_a_bucket_has_a_name_that_its_store_takes() -> None:
    for name in ("abc", "a.b-1", "1" * 63):
        assert problem(f"s3://{name}/x", ["s3"]) == problem(f"s3a://{name}", ["s3"]) == ""
    for name in ("ab", "A" * 3, "1" * 64, "-ab", "ab-", "a..b", "a_b"):
        assert problem(f"s3://{name}/x", ["s3"]).startswith(f"has the bucket {name!r}; the name of")
    assert problem("gs://a_b", ["gs"]) == ""
    assert problem("gs://bucket", ["s3"]) == (
        "is no address that is known here; use s3://bucket/path"
    )


def into_a_folder(path: Path) -> None:
    with new_folder(path):
        pass


@pytest.mark.parametrize(
    "write",
    [
        refuse_address,
        into_a_folder,
        lambda path: make_parts_folder(path, "", "text", False),
        lambda path: replace_output(path, b"", lambda before: True),
        new_file,
    ],
)
def test_nothing_is_written_to_a_folder_named_like_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^s3://bucket/x is an address of s3, not a path; write"):
        write(Path("s3://bucket/x"))
    assert [*tmp_path.iterdir()] == []
