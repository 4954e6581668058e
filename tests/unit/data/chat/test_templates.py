"""Chat templates: the built-in ones, and where templates come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.chat import built_in, refused

from llamax.data.chat.template_source import source_of
from llamax.data.chat.templates import Template, make_sample
from llamax.runtime.errors import DataError


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("dolly", "### Instruction\nQ\n\n### Context\nC\n\n### Answer\n", "A"),
        (
            "alpaca",
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nQ\n\n### Input:\nC\n\n### Response:\n",
            "A",
        ),
        ("usr-bot", "S\n<usr> Q\n\nC\n<bot>", " A</s>"),
        ("human-assistant", "S\n\nHuman: Q\n\nC\n\nAssistant:", " A</s>"),
        ("llama2-chat", "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ\n\nC [/INST]", " A </s>"),
        (
            "llama3-chat",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nQ\n\nC<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "A<|eot_id|>",
        ),
    ],
)
def test_built_in_templates(name: str, prompt: str, answer: str) -> None:
    template = built_in(name)
    row = make_sample("Q", "C", "A", "S")
    assert [(span.text, span.answer) for span in template.spans(row)] == [
        (prompt, False),
        (answer, True),
    ]
    assert template.prompt(make_sample("Q", "C", system="S"))[0].text == prompt


def test_context_appears_only_where_there_is_one() -> None:
    assert (
        built_in("dolly").prompt(make_sample("Q"))[0].text == "### Instruction\nQ\n\n### Answer\n"
    )
    assert "Input" not in built_in("alpaca").prompt(make_sample("Q"))[0].text
    assert built_in("human-assistant").prompt(make_sample("Q"))[0].text == "Human: Q\n\nAssistant:"


@pytest.mark.parametrize("marked", [True, False])
def test_a_template_without_marks_is_asked_twice(marked: bool) -> None:
    source = "{{ instruction }} -> {{ answer }}!"
    if marked:
        source = "{{ instruction }} -> {% generation %}{{ answer }}!{% endgeneration %}"
    template = Template("own", source)
    assert template.spans(make_sample("Q", "", "A")) == [("Q -> ", False), ("A!", True)]
    assert template.prompt(make_sample("Q"))[0].text == "Q -> "


def test_a_mark_in_a_field_is_refused() -> None:
    refused(r"U\+FDD0", "{{ answer }}", make_sample("Q", "", "A\ufdd0"))


def test_where_templates_come_from(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ answer }}")
    assert source_of(str(tmp_path / "own.jinja")) == "{{ answer }}"
    config = tmp_path / "tokenizer_config.json"
    for given in ("T", [{"name": "tools", "template": "x"}, {"name": "default", "template": "T"}]):
        config.write_text(json.dumps({"chat_template": given}))
        assert source_of(str(config)) == source_of(str(tmp_path)) == "T"
    for text, words in (("{}", "has no chat_template"), ("{", "is not JSON")):
        config.write_text(text)
        with pytest.raises(DataError, match=words):
            source_of(str(config))
    with pytest.raises(DataError, match=r"dollie is neither built in \(dolly, alpaca"):
        source_of("dollie")
