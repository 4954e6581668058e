"""Conversations that are already text, in the form of a template, as messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.instruction import llama2_tokenizer, llama3_tokenizer, prepare, write_rows

from llamax.data.chat.encode import Encoder
from llamax.data.chat.template_source import source_of
from llamax.data.chat.templates import BUILT_IN, Sample, Template
from llamax.data.chat.written_turns import written_turns
from llamax.data.dataset import open_dataset
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.runtime.errors import DataError

TURNS = [
    ("user", "서울에서 냉면 맛있는 집?"),
    ("assistant", "1. 을지로.\n\n2. 마포. 🙂"),
    ("user", "<b>고마워</b>"),
    ("assistant", "네, <또> 물어보세요 ½"),
]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]
SYSTEM = {"role": "system", "content": "친절하게\n답하세요."}


def template_of(name: str, folder: Path) -> Template:
    make = llama3_tokenizer if name == "llama3-chat" else llama2_tokenizer
    tokenizer = load_tokenizer(make(folder))
    return Encoder(tokenizer).template(name, source_of(name))


@pytest.mark.parametrize("name", ["usr-bot", "human-assistant", "llama2-chat", "llama3-chat"])
def test_the_text_of_a_template_is_split_into_its_messages(name: str, tmp_path: Path) -> None:
    template = template_of(name, tmp_path)
    text = "".join(span.text for span in template.spans(Sample(MESSAGES)))
    text = re.sub("[\ue000-\uf8ff\ufdd0-\ufdef]", "", text)
    assert written_turns(text, template) == MESSAGES
    assert written_turns(f"<s>{text}</s>" if "llama3" not in name else text, template) == MESSAGES


@pytest.mark.parametrize("name", ["usr-bot", "human-assistant"])
def test_what_stands_before_the_first_turn_is_the_system_text(name: str, tmp_path: Path) -> None:
    template = template_of(name, tmp_path)
    text = "".join(span.text for span in template.spans(Sample([SYSTEM, *MESSAGES])))
    assert written_turns(text, template) == [SYSTEM, *MESSAGES]


def test_a_template_of_another_program(tmp_path: Path) -> None:
    file = tmp_path / "guanaco.jinja"
    file.write_text(
        "{% for m in messages %}### {{ 'Human' if m.role == 'user' else 'Assistant' }}: "
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    template = Template("guanaco", source_of(str(file)))
    text = "### Human: 안녕?### Assistant: 네.### Human: 왜?### Assistant: 그냥."
    contents = [message["content"] for message in written_turns(text, template)]
    assert contents == ["안녕?", "네.", "왜?", "그냥."]


@pytest.mark.parametrize("end", ["", "</s>"])
def test_questions_that_end_with_eos_in_the_template_alone(end: str) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}Assistant:{% generation %} "
        "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}"
        "Human: {{ m.content }}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    template = Template("ends", source, ("</s>",), {"eos_token": "</s>"})
    text = f"Human: 안녕?{end}\nAssistant: 네.{end}\n"
    assert [message["content"] for message in written_turns(text, template)] == ["안녕?", "네."]


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("usr-bot", BUILT_IN["usr-bot"], "no turn in the form of template usr-bot, .*<usr> or"),
        ("flat", "{% for m in messages %}{{ m.content }} {% endfor %}", "has no markers"),
        ("last", "{{ messages[-1].content }}", "has no markers"),
    ],
)
def test_refusals(name: str, source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        written_turns("Human: 안녕", Template(name, source))


def test_prepare_makes_the_same_of_texts_and_of_messages(tmp_path: Path) -> None:
    tokenizer = llama2_tokenizer(tmp_path)
    texts = [
        {"source": "a", "text": "<usr> 안녕?\n<bot> 네.\n<usr> 누구?\n<bot> 챗봇입니다."},
        {"source": "b", "text": "<usr> 몇 시?\n<bot> 두 시."},
    ]
    rows = [
        {"messages": [{"role": r, "content": t} for r, t in turns]}
        for turns in (
            [("user", "안녕?"), ("bot", "네."), ("user", "누구?"), ("bot", "챗봇입니다.")],
            [("user", "몇 시?"), ("bot", "두 시.")],
        )
    ]
    options = ["--template", "usr-bot", "--tokenizer", tokenizer, "--validation", "0"]
    one = write_rows(tmp_path / "texts.jsonl", texts)
    two = write_rows(tmp_path / "messages.jsonl", rows)
    first = prepare(tmp_path / "1", one, *options, "--field", "messages=text")
    second = prepare(tmp_path / "2", two, *options)
    assert (first / "train.tokens").read_bytes() == (second / "train.tokens").read_bytes()
    assert open_dataset(first).prompt is not None
