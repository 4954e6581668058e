"""Chat templates with small special tokens, and templates that are refused."""

from __future__ import annotations

import time

import pytest

from llamax.data.chat.templates import BUILT_IN, Sample, Template, sample
from llamax.runtime.errors import DataError

SPECIALS = ("<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def built_in(name: str) -> Template:
    return Template(name, BUILT_IN[name], SPECIALS, "<s>", "</s>")


# ---- what a template may do wrong


def refused(words: str, source: str, row: Sample | None = None) -> None:
    began = time.perf_counter()
    with pytest.raises(DataError, match=words) as caught:
        Template("bad", source).spans(row or sample("Q", "C", "A"))
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - began < 60
