"""Chat templates with small special tokens, and templates that are refused."""

from __future__ import annotations

import pytest

from llamax.data.chat.templates import BUILT_IN, Sample, Template, make_sample
from llamax.runtime.errors import DataError

SPECIALS = ("<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def built_in(name: str) -> Template:
    """A built-in template over the special tokens above."""
    return Template(name, BUILT_IN[name], SPECIALS, {"bos_token": "<s>", "eos_token": "</s>"})


def refused(words: str, source: str, row: Sample | None = None) -> None:
    """Assert that a template is refused in one line that matches."""
    with pytest.raises(DataError, match=words) as caught:
        Template("bad", source).spans(row or make_sample("Q", "C", "A"))
    assert "\n" not in str(caught.value)
