"""Manifests of Kubernetes as text."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llamax.launch import kubernetes

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)


SCALARS = st.one_of(TEXT, st.integers(), st.booleans())


DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner), st.dictionaries(TEXT, inner)), max_leaves=6
)


@settings(max_examples=60)
@given(st.dictionaries(TEXT, DOCUMENTS, min_size=1, max_size=4))
def test_a_manifest_reads_back_as_it_was_written(document: dict[str, Any]) -> None:
    assert yaml.safe_load(kubernetes.dump(document)) == document


@pytest.mark.parametrize(
    "text",
    [
        "a\nb\n",
        "a\nb\n\n",
        "a\n\n b\n",
        " a\nb\n",
        "a\nb",
        "\na\n",
        "a\n\n",
        "no",
        "1e3",
        "é\nb\n",
        "-",
    ],
)
def test_a_manifest_keeps_any_text(text: str) -> None:
    manifest = {"b": [{"a": text}, text], "a": text}
    assert yaml.safe_load(kubernetes.dump(manifest)) == manifest
    assert list(yaml.safe_load(kubernetes.dump(manifest))) == ["b", "a"]


@pytest.mark.parametrize("text", ["1e3", "0o7", "12", "1_0", "y", "No", "on", "null", "~", ""])
def test_text_that_a_yaml_version_reads_as_another_type_is_quoted(text: str) -> None:
    assert kubernetes.dump({"a": text}) == f'a: "{text}"\n'


def test_a_manifest_is_block_style_without_anchors_and_scripts_are_literal_blocks() -> None:
    shared = {"gpu": "8"}
    manifest = {"limits": shared, "requests": shared, "command": ["bash", "cd x\n\nls\n"], "e": {}}
    assert kubernetes.dump(manifest) == (
        'limits:\n  gpu: "8"\nrequests:\n  gpu: "8"\n'
        "command:\n  - bash\n  - |\n    cd x\n\n    ls\ne: {}\n"
    )
