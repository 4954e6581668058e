"""Conversations as tokens, compared with transformers."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import transformers
from support.chat import built_in
from support.instruction import llama2_tokenizer, llama3_tokenizer

from llamax.data.chat.encode import Encoder, Tokens
from llamax.data.chat.template_source import source_of
from llamax.data.chat.templates import BUILT_IN, Message, Sample, Span, Template, make_sample
from llamax.data.tokenizer.hf_export import export_tokenizer
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.runtime.errors import DataError

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


def test_every_answer_of_a_conversation_is_one() -> None:
    spans = built_in("human-assistant").spans(TALK)
    assert [span.text for span in spans if span.answer] == [
        " Nobody.</s>",
        " 철수 <\ufdd2|eot_id|></s>",
    ]


def decoded(encoder: Encoder, tokens: Tokens, keep: bool) -> str:
    return encoder.tokenizer.decode([int(i) for i in tokens.ids[tokens.counted == keep]])


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "llama3-chat"])
def test_tokens_of_llama2_give_the_text_back(tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(llama2_tokenizer(tmp_path))
    encoder = Encoder(tokenizer)
    template = encoder.template(name, BUILT_IN[name])
    rows = [
        make_sample("이름?", "컨텍스트 ½", "철수 🙂 입니다\n", "sys"),
        make_sample("Q", "", "A"),
        TALK,
    ]
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


NAMED = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{{ pad_token }}{{ mask_token }}{{ eos_token if message.role == 'assistant' }}{% endfor %}"
)


def same_ids(folder: Path, talk: list[Message]) -> None:
    """Assert that a folder's template gives the ids of transformers."""
    expected = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        talk, return_dict=False
    )
    encoder = Encoder(load_tokenizer(folder), bos=False, eos=False)
    template = encoder.template("own", source_of(str(folder)))
    (tokens,) = encoder.encode([template.spans(Sample(talk))])
    assert tokens.ids.tolist() == expected


@pytest.mark.parametrize(
    "config",
    [
        {"pad_token": "<|end_of_text|>"},
        {"pad_token": {"__type": "AddedToken", "content": "[PAD]"}, "mask_token": "<mask>"},
        {
            "pad_token": "<pad>",
            "added_tokens_decoder": {
                "507": {"content": "<pad>", "special": True, "rstrip": True, "lstrip": True}
            },
        },
    ],
    ids=["named", "added", "stripping"],
)
def test_named_tokens_are_those_of_transformers(tmp_path: Path, config: dict[str, object]) -> None:
    folder = llama3_tokenizer(tmp_path, NAMED)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    same_ids(folder, [*TALK.messages[1:4], {"role": "assistant", "content": "  Because. "}])


LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("scheme", ["prepend", "first", "always", "never"])
def test_spaces_after_special_tokens_are_those_of_transformers(tmp_path: Path, scheme: str) -> None:
    export_tokenizer(load_tokenizer(llama2_tokenizer(tmp_path)), tmp_path / "hub")
    path = tmp_path / "hub/tokenizer.json"
    settings = json.loads(path.read_text())
    if scheme != "prepend":
        metaspace = {"type": "Metaspace", "replacement": "▁", "split": False}
        settings |= {
            "normalizer": None,
            "pre_tokenizer": {**metaspace, "prepend_scheme": scheme},
        }
    path.write_text(json.dumps(settings))
    (tmp_path / "hub/tokenizer.model").unlink()
    (tmp_path / "hub/chat_template.jinja").write_text(LLAMA2)
    same_ids(tmp_path / "hub", TALK.messages[1:4] + [{"role": "assistant", "content": "if x"}])


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
    (tokens,) = encoder.encode([template.spans(make_sample("Q", "", "self.x"))])
    whole = encoder.tokenizer.encode("def self.x")
    assert tokens.ids.tolist() == whole
    assert decoded(encoder, tokens, True).strip() == "self.x"
    assert np.flatnonzero(tokens.counted)[0] == 1


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_edges_of_answers_change_no_token(tmp_path: Path, kind: str) -> None:
    """Wherever answers begin: before a space, after a line break, inside a word or a character."""
    make = llama2_tokenizer if kind == "sentencepiece" else llama3_tokenizer
    encoder = Encoder(load_tokenizer(make(tmp_path)), bos=False, eos=False)
    chance = random.Random(0)
    words = ["def", " self", "\n", "\n\n", "  ", "x", "### Answer\n", "가나", "🙂", "1", "."]
    samples = [
        [
            Span("".join(chance.choices(words, k=chance.randrange(1, 5))), bool(number % 2))
            for number in range(chance.randrange(1, 5))
        ]
        for _ in range(400)
    ]
    alone = [encoder.encode([spans])[0] for spans in samples]
    for spans, tokens, same in zip(samples, encoder.encode(samples), alone, strict=True):
        text = "".join(span.text for span in spans)
        assert tokens.ids.tolist() == encoder.tokenizer.encode(text)
        assert (tokens.ids == same.ids).all()
        assert (tokens.counted == same.counted).all()
        if len(spans) == 2:
            prompt = encoder.tokenizer.decode(tokens.ids[~tokens.counted].tolist())
            assert spans[0].text.startswith(prompt)


def test_llama3_chat_needs_its_tokens() -> None:
    with pytest.raises(DataError, match=r"needs the token <\|start_header_id\|>"):
        Template("llama3-chat", BUILT_IN["llama3-chat"], ("<s>",))


class Named:
    """Special tokens alone: <a> takes the space before it, <b> that behind it, <c> both."""

    special = {"<a>": 1, "<b>": 2, "<c>": 3, "<d>": 4}
    strips = {"<a>": (True, False), "<b>": (False, True), "<c>": (True, True)}
    bos_id = eos_id = None


@pytest.mark.timeout(300)  # once it took hours
def test_special_tokens_that_take_space_are_found_in_time() -> None:
    encoder = Encoder(Named())  # type: ignore[arg-type]
    space = " \n\u3000\t" * 100_000
    length = len(space)
    assert [*encoder._split(space)] == [(0, length, None)]
    taken = [*encoder._split(f"x{space}<a>{space}<b>{space}<d>")]
    assert taken[:3] == [(0, 1, None), (1, length + 4, 1), (length + 4, 2 * length + 4, None)]
    assert taken[3:] == [(2 * length + 4, 3 * length + 7, 2), (3 * length + 7, 3 * length + 10, 4)]
    joined = re.compile(r"\s*<a>|<b>\s*|\s*<c>\s*|<d>")
    chance = random.Random(0)
    for _ in range(2000):
        text = "".join(chance.choices(["<a>", "<b>", "<c>", "<d>", " ", "\n", "x", "<"], k=12))
        expected = [(match.start(), match.end()) for match in joined.finditer(text)]
        assert [part[:2] for part in encoder._split(text) if part[2]] == expected
