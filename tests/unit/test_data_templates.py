"""Templates: the text of every built-in one, parity with transformers, and hostile ones."""

from __future__ import annotations

import json
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import transformers
from support.instruction import llama2_tokenizer, llama3_tokenizer

from llamax.data.chat import jinja_sandbox
from llamax.data.chat.encode import Encoder, Tokens
from llamax.data.chat.templates import BUILT_IN, Sample, Template, sample, source_of
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.runtime.errors import DataError

SPECIALS = ("<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = Sample(
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Nobody."},
        {"role": "user", "content": "  Why? "},
        {"role": "assistant", "content": "철수 <|eot_id|>"},
    ]
)


def built_in(name: str) -> Template:
    return Template(name, BUILT_IN[name], SPECIALS, "<s>", "</s>")


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
    row = sample("Q", "C", "A", "S")
    assert [(span.text, span.answer) for span in template.spans(row)] == [
        (prompt, False),
        (answer, True),
    ]
    assert template.prompt(sample("Q", "C", system="S"))[0].text == prompt


def test_context_appears_only_where_there_is_one() -> None:
    assert built_in("dolly").prompt(sample("Q"))[0].text == "### Instruction\nQ\n\n### Answer\n"
    assert "Input" not in built_in("alpaca").prompt(sample("Q"))[0].text
    assert built_in("human-assistant").prompt(sample("Q"))[0].text == "Human: Q\n\nAssistant:"


def test_every_answer_of_a_conversation_is_one() -> None:
    spans = built_in("human-assistant").spans(TALK)
    assert [span.text for span in spans if span.answer] == [
        " Nobody.</s>",
        " 철수 <\ufdd2|eot_id|></s>",
    ]


@pytest.mark.parametrize("marked", [True, False])
def test_a_template_without_marks_is_asked_twice(marked: bool) -> None:
    source = "{{ instruction }} -> {{ answer }}!"
    if marked:
        source = "{{ instruction }} -> {% generation %}{{ answer }}!{% endgeneration %}"
    template = Template("own", source)
    assert template.spans(sample("Q", "", "A")) == [("Q -> ", False), ("A!", True)]
    assert template.prompt(sample("Q"))[0].text == "Q -> "


def decoded(encoder: Encoder, tokens: Tokens, keep: bool) -> str:
    return encoder.tokenizer.decode([int(i) for i in tokens.ids[tokens.counted == keep]])


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "llama3-chat"])
def test_tokens_of_llama2_give_the_text_back(tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(llama2_tokenizer(tmp_path))
    encoder = Encoder(tokenizer)
    template = encoder.template(name, BUILT_IN[name])
    rows = [sample("이름?", "컨텍스트 ½", "철수 🙂 입니다\n", "sys"), sample("Q", "", "A"), TALK]
    for row in rows if template.chat else rows[:2]:
        (tokens,) = encoder.encode([template.spans(row)])
        text = "".join(span.text for span in template.spans(row)).replace("\ufdd2", "")
        turns = text.replace("</s><s>", " ")  # Llama 2 encodes each turn as a text of its own
        plain = turns.replace("<s>", "").replace("</s>", "")
        assert tokenizer.decode(tokens.ids.tolist()) == plain
        assert tokens.ids[0] == tokenizer.bos_id
        assert tokens.ids[-1] == tokenizer.eos_id
        assert tokens.counted[-1]
        assert not tokens.counted[0]
        assert (tokens.ids == tokenizer.bos_id).sum() == max(1, text.count("<s>"))
        (prompt,) = encoder.encode(
            [template.prompt(row._replace(messages=row.messages[:-1]))], True
        )
        assert (tokens.ids[: len(prompt.ids)] == prompt.ids).all()
        if len(row.messages) < 4:
            assert not tokens.counted[: len(prompt.ids)].any()
            assert tokens.counted[len(prompt.ids) :].all()


@pytest.mark.parametrize("source", [CHATML, BUILT_IN["llama3-chat"]], ids=["chatml", "llama3"])
def test_tokens_are_those_of_transformers(tmp_path: Path, source: str) -> None:
    folder = llama3_tokenizer(tmp_path, source)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(load_tokenizer(folder))
    template = encoder.template("own", source_of(str(folder)))
    talk = [*TALK.messages[:4], {"role": "assistant", "content": "Because: 1 + 1"}]
    expected = theirs.apply_chat_template(talk, return_dict=True)["input_ids"]
    (tokens,) = encoder.encode([template.spans(Sample(talk))])
    mine = tokens.ids.tolist()
    if source is CHATML:
        assert mine[0] == encoder.bos  # the template writes none
        mine = mine[1:]
    assert mine == expected
    answers = [span.text for span in template.spans(Sample(talk)) if span.answer]
    end = "<|im_end|>\n" if source is CHATML else "<|eot_id|>"
    assert answers == [f"Nobody.{end}", f"Because: 1 + 1{end}"]
    prompt = theirs.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    (ours,) = encoder.encode([template.prompt(Sample(talk[:-1]))], prompts=True)
    assert ours.ids.tolist()[source is CHATML :] == prompt


def test_transformers_finds_the_same_answers(tmp_path: Path) -> None:
    folder = llama3_tokenizer(tmp_path, BUILT_IN["llama3-chat"])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(load_tokenizer(folder))
    talk = TALK.messages[:4] + [{"role": "assistant", "content": "Because."}]
    found = theirs.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    (tokens,) = encoder.encode(
        [encoder.template("llama3-chat", BUILT_IN["llama3-chat"]).spans(Sample(talk))]
    )
    assert tokens.counted.astype(int).tolist() == found["assistant_masks"]


def test_a_special_token_in_a_field_stays_text(tmp_path: Path) -> None:
    encoder = Encoder(load_tokenizer(llama3_tokenizer(tmp_path)))
    template = encoder.template("llama3-chat", BUILT_IN["llama3-chat"])
    (tokens,) = encoder.encode([template.spans(TALK)])
    eot = encoder.tokenizer.special["<|eot_id|>"]
    assert (tokens.ids == eot).sum() == 5
    said = encoder.tokenizer.decode([int(i) for i in tokens.ids])
    assert "철수 <|eot_id|>" in said


def test_a_token_across_the_edge_belongs_to_the_answer(tmp_path: Path) -> None:
    encoder = Encoder(load_tokenizer(llama2_tokenizer(tmp_path)), bos=False, eos=False)
    template = encoder.template("own", "def {% generation %}{{ answer }}{% endgeneration %}")
    (tokens,) = encoder.encode([template.spans(sample("Q", "", "self.x"))])
    whole = encoder.tokenizer.encode("def self.x")
    assert tokens.ids.tolist() == whole
    assert decoded(encoder, tokens, True).strip() == "self.x"
    assert np.flatnonzero(tokens.counted)[0] == 1


# ---- what a template may do wrong


def refused(words: str, source: str, row: Sample | None = None) -> None:
    began = time.perf_counter()
    with pytest.raises(DataError, match=words) as caught:
        Template("bad", source).spans(row or sample("Q", "C", "A"))
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - began < 60


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}{{ answer }}", "bad: is refused: access"),
        ("{{ answer.__init__.__globals__ }}", "bad: is refused: access"),
        ("{{ messages.append(1) }}{{ answer }}", "bad: is refused"),
        ("{{ 'a' * 10**9 }}{{ answer }}", "bad: is refused"),
        ("{{ [0] * 9999999 }}{{ answer }}", "bad: is refused: a sequence of 1"),
        ("{{ 9 ** 9 ** 9 }}{{ answer }}", "bad: is refused"),
        ("{{ 3 ** 99 }}{{ answer }}", "bad: is refused: .* too large"),
        ("{{ 9999999 * 9999999 * 9999999 }}{{ answer }}", "bad: is refused: a number is above"),
        ("{% for i in range(999999) %}{% endfor %}{{ answer }}", "Range too big|refused"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
            "{{ answer }}",
            "bad: is refused: it computed for",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
            "{% endfor %}{{ answer }}",
            "bad: is refused: it (wants too much|computed)",
        ),
        ("{{ 'a' | center(2000000000) }}{{ answer }}", "bad: is refused: it (wants|computed)"),
        ("{{ 'ab' | center(20000000) }}{{ answer }}", "bad: is refused: it (wrote|computed)"),
        ("{{ messages | tojson(indent=99) }}", "bad: is refused: tojson"),
        (
            "{% include '/etc/passwd' %}{{ answer }}",
            "bad: the template fails: TypeError: no loader",
        ),
        ("{{ raise_exception('not\nthis') }}{{ answer }}", "bad: the template says: not this"),
        ("{% if %}", r"bad: the template says \(line 1\)"),
        ("{{ answer.nothing.more }}", "bad: the template says: .*nothing"),
        ("{{ answer + 1 }}", "bad: the template fails: TypeError"),
        ("just text", "bad: yields nothing of a row"),
        ("{% if answer == '' %}{{ answer }}{% endif %}x", "bad: yields no answer|otherwise"),
        ("{% generation %}{% endgeneration %}{{ answer }}", "bad: yields no answer"),
        ("{{ messages | length }}", "otherwise once it goes on"),
        ("x" * 1_000_001, "has 1000001 characters"),
    ],
)
def test_bad_templates_are_one_line(
    source: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jinja_sandbox, "CPU_S", 0.2)
    refused(words, source)


def test_a_good_template_survives_the_walls() -> None:
    source = "{% for i in range(3) %}{{ i * 2 }}{% endfor %}{{ strftime_now('%Y') | length }}"
    assert Template("good", source + "{{ answer }}").spans(sample("Q", "", "A"))[0].text == "0244"


def test_a_mark_in_a_field_is_refused() -> None:
    refused(r"U\+FDD0", "{{ answer }}", sample("Q", "", "A\ufdd0"))


def test_llama3_chat_needs_its_tokens() -> None:
    with pytest.raises(DataError, match=r"needs the token <\|start_header_id\|>"):
        Template("llama3-chat", BUILT_IN["llama3-chat"], ("<s>",))


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


def test_an_alarm_at_any_moment_leaves_the_limits_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    monkeypatch.setattr(jinja_sandbox, "CPU_S", 0.001)
    for turns in range(0, 60_000, 400):
        with suppress(DataError):
            jinja_sandbox.Program(f"{{% for i in range({turns}) %}}{{% endfor %}}x", "here").render(
                {}
            )
        now = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
        assert now == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
