"""Rows of other programs as samples; the judge is transformers' own rendering of chat templates."""

from __future__ import annotations

from typing import Any

import pytest

from llamax.data.chat.templates import BUILT_IN, SHIELD, START, STOP, Template
from llamax.data.prepare.row_samples import EmptyAnswer, read_sample
from llamax.data.prepare.unread import MOST_KEYS, UnreadParts, unread_names
from llamax.runtime.errors import DataError

AGENT = (
    "{% if tools %}[tools]{{ tools | tojson }}[/tools]{% endif %}"
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
SPECIALS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
Q, A = {"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Elbe."}
CALL = {"type": "function", "function": {"name": "level", "arguments": {"river": "Elbe"}}}
TOOLS = [{"type": "function", "function": {"name": "level", "parameters": {"type": "object"}}}]


def agent(source: str = AGENT) -> Template:
    return Template("agent", source)


def plain() -> Template:
    return Template("human-assistant", BUILT_IN["human-assistant"])


def text_of(row: dict[str, Any], template: Template) -> str:
    sample = read_sample(row, {}, "", template)
    return template.text(sample).translate({ord(mark): None for mark in (START, STOP, SHIELD)})


def judged(messages: list[dict[str, Any]], tools: Any = None, source: str = AGENT) -> str:
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([messages], tools=tools, chat_template=source)
    return str(rendered[0])


def unread(row: dict[str, Any], template: Template) -> list[str]:
    sample = read_sample(row, {}, "", template)
    return UnreadParts(template).of(sample, "".join(s.text for s in template.spans(sample)))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [Q, A], "tools": TOOLS},
        {"messages": [Q, {**A, "tool_calls": [CALL]}, {"role": "tool", "content": "3 m"}, A]},
        {"messages": [Q, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
         "tools": TOOLS},
        {"messages": [Q, {**A, "reasoning_content": "Rivers."}]},
        {"messages": [Q, {**A, "tool_calls": [CALL, CALL], "reasoning_content": "Two."}]},
    ],
)  # fmt: skip
def test_what_a_template_reads_beside_the_content_is_rendered(row: dict[str, Any]) -> None:
    assert text_of(row, agent()) == judged(row["messages"], row.get("tools"))
    assert unread(row, agent()) == []


def test_tools_and_calls_as_json_text_and_as_turns() -> None:
    import json

    want = judged([Q, {"role": "assistant", "content": "", "tool_calls": [CALL]}], TOOLS)
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Name a river."},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
        ],
        "tools": json.dumps(TOOLS),
    }
    assert text_of(sharegpt, agent()) == want
    call = {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])}
    assert text_of({"messages": [Q, call], "tools": TOOLS}, agent()) == want
    filled = {**CALL, "function": {"name": "level", "arguments": {"river": "Elbe", "unit": None}}}
    row = {"messages": [Q, {"role": "assistant", "content": "", "tool_calls": [filled]}]}
    assert text_of({**row, "tools": TOOLS}, agent()) == want
    with pytest.raises(DataError, match="a field 'tools' that is neither a list nor JSON"):
        text_of({"messages": [Q, A], "tools": "level"}, agent())


def test_a_template_that_tests_for_no_content_gets_none() -> None:
    source = (
        "{% for m in messages %}{% if m['content'] is none %}CALL{{ m.tool_calls | tojson }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = [Q, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    assert text_of({"messages": messages}, agent(source)) == judged(messages, source=source)


def test_what_no_template_reads_is_named() -> None:
    row = {
        "messages": [Q, {**A, "tool_calls": [CALL], "reasoning_content": "R", "weight": 1}],
        "tools": TOOLS,
        "id": 7,
        "note": "",
        "other": None,
    }
    names = ["id", "messages[].tool_calls", "messages[].reasoning_content", "messages[].weight"]
    assert sorted(unread(row, plain())) == sorted([*names, "tools"])
    assert unread(row, agent()) == ["id", "messages[].weight"]
    assert unread_names({"a": 1, "b": 1200}) == "b (1,200 rows), a (1 row)"
    deaf = agent("{% for m in messages if m.role != 'system' %}{{ m.content }}|{% endfor %}")
    assert unread({"messages": [Q, A], "system": "German."}, deaf) == [
        "messages[].content of system"
    ]
    with pytest.raises(EmptyAnswer, match="beside tool_calls, which template human-assistant") as e:
        unread({"messages": [Q, {"role": "assistant", "tool_calls": [CALL]}]}, plain())
    assert e.value.unread == ("messages[].tool_calls",)


@pytest.mark.parametrize("value", [0, 0.0, False, "no", 1])
def test_a_key_that_says_no_is_reported_too(value: object) -> None:
    assert unread({"messages": [Q, {**A, "weight": None}]}, agent()) == []
    assert unread({"messages": [Q, {**A, "weight": value}]}, agent()) == ["messages[].weight"]


def test_a_template_reads_columns_by_name() -> None:
    template = Template("t", "{{ category }}: {{ instruction }} {{ answer }}")
    row = {"instruction": "Q", "answer": "A", "category": "c", "system": "s", "context": "x"}
    assert text_of(row, template) == "c: Q A"
    assert unread(row, template) == ["system", "context"]
    switched = AGENT + "{% if thinking %}T{% endif %}"
    row = {"messages": [Q, A], "chat_template_kwargs": {"thinking": True}}
    assert text_of(row, agent(switched)).endswith("T")
    assert unread(row, plain()) == ["chat_template_kwargs"]


@pytest.mark.parametrize("key", ["messages", "conversations", "conversation"])
def test_the_system_column_is_the_first_message(key: str) -> None:
    want = text_of({"messages": [{"role": "system", "content": "German."}, Q, A]}, plain())
    assert text_of({key: [Q, A], "system": "German."}, plain()) == want
    assert text_of({key: [Q, A], "system_prompt": "German."}, plain()) == want
    own = {key: [{"role": "system", "content": "German."}, Q, A]}
    assert unread({**own, "system": "German."}, plain()) == []
    assert unread({**own, "system": "French."}, plain()) == ["system"]
    sample = read_sample({key: [Q, A], "s": "German."}, {"system": "s"}, "Default.", plain())
    assert sample.messages[0]["content"] == "German."
    sample = read_sample({key: [Q, A], "system": ""}, {}, "Default.", plain())
    assert sample.messages[0]["content"] == "Default."
    with pytest.raises(DataError, match=r"has no field for the system .looked for s;"):
        read_sample({key: [Q, A]}, {"system": "s"}, "", plain())


def test_null_keys_and_columns_are_absent() -> None:
    want = text_of({"messages": [Q, A]}, plain())
    nulls: dict[str, Any] = {"from": None, "value": None, "tool_calls": None}
    pairs = (("human", Q), ("gpt", A))
    turns = [{"from": r, "value": m["content"], "role": None, "content": None} for r, m in pairs]
    for row in (
        {"messages": [{**Q, **nulls}, {**A, **nulls}]},
        {"messages": turns},
        {"messages": None, "conversations": turns},
        {"conversations": None, "messages": [Q, A], "instruction": None, "system": None},
        {"messages": None, "instruction": None, "question": Q["content"], "input": None,
         "answer": None, "output": A["content"]},
        {"messages": [], "instruction": Q["content"], "output": A["content"]},
    ):  # fmt: skip
        assert text_of(row, plain()) == want
        assert unread(row, plain()) == []


@pytest.mark.parametrize(
    ("user", "assistant"),
    [("User", "Assistant"), ("human", "gpt"), ("Human", "chatgpt"), ("USER", "model"),
     ("user", "bot"), ("prompter", "assistant"), ("human", "ai"), ("user ", "Bard")],
)  # fmt: skip
def test_roles_of_other_programs(user: str, assistant: str) -> None:
    want = text_of({"messages": [Q, A]}, plain())
    turns = [{"from": user, "value": Q["content"]}, {"from": assistant, "value": A["content"]}]
    row = {"system": "", "mask": "User", "conversations": turns}
    assert text_of(row, plain()) == want
    assert unread(row, plain()) == []
    assert unread({**row, "mask": "Assistant"}, plain()) == ["mask"]


def test_tool_turns_and_unknown_roles() -> None:
    want = text_of({"messages": [Q, A, {"role": "tool", "content": "3 m"}, A]}, agent())
    for role in ("observation", "function", "Tool", "ipython"):
        row = {"messages": [Q, A, {"role": role, "content": "3 m"}, A]}
        assert text_of(row, agent()) == want
    known = AGENT + "{% if messages[0].role == 'critic' %}!{% endif %}"
    row = {"messages": [{"role": "critic", "content": "Hm"}, A]}
    assert text_of(row, agent(known)).startswith("[critic]Hm")
    with pytest.raises(DataError, match="a turn of role 'critic' in 'messages', which is unknown"):
        text_of(row, agent())
    with pytest.raises(EmptyAnswer, match=r"has no answer .roles in 'messages': user"):
        text_of({"messages": [Q]}, agent())


def test_history_is_earlier_turns() -> None:
    first = [Q["content"], A["content"]]
    row = {"instruction": "Longer?", "input": "", "output": "The Danube.", "system": "S"}
    want = text_of(
        {"messages": [{"role": "system", "content": "S"}, Q, A,
                      {"role": "user", "content": "Longer?"},
                      {"role": "assistant", "content": "The Danube."}]},
        plain(),
    )  # fmt: skip
    assert text_of({**row, "history": [first]}, plain()) == want
    assert text_of({**row, "history": [Q, A]}, plain()) == want
    assert unread({**row, "history": []}, plain()) == []
    dolly = Template("dolly", BUILT_IN["dolly"])
    assert unread({**row, "history": [first]}, dolly) == ["system", "history"]
    with pytest.raises(DataError, match=r"'history' that is not a list of .question, answer"):
        text_of({**row, "history": ["one"]}, plain())


def test_contents_that_are_no_text() -> None:
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a river."}]
    row = {"messages": [{"role": "user", "content": parts}, A]}
    assert text_of(row, plain()) == text_of({"messages": [Q, A]}, plain())
    parts[0] = {"type": "image", "text": ""}
    with pytest.raises(DataError, match="a part of type 'image' in 'messages'; only text"):
        text_of(row, plain())
    for turn, words in (
        ({"role": "user", "content": 7}, "a content is int, not text"),
        ({"role": "user"}, "a turn of 'user' has no text"),
        ({"speaker": "x"}, "found speaker"),
        ("text", "not a list of"),
        ({"input": "Q", "output": "A", "id": 1}, "a key 'id' beside input and output"),
    ):
        with pytest.raises(DataError, match=words):
            text_of({"messages": [turn, A]}, plain())
    pair = {"conversation": [{"system": "", "input": Q["content"], "output": A["content"]}]}
    assert text_of(pair, plain()) == text_of({"messages": [Q, A]}, plain())


@pytest.mark.parametrize("answer", [{"content": ""}, {}, {"content": " ", "tool_calls": []}])
def test_an_empty_answer_without_calls_is_one_line(answer: dict[str, Any]) -> None:
    row = {"messages": [Q, {"role": "assistant", **answer}]}
    with pytest.raises(EmptyAnswer, match=r"has an empty answer$") as caught:
        read_sample(row, {}, "", Template("llama2-chat", BUILT_IN["llama2-chat"]))
    assert caught.value.unread == ()


@pytest.mark.timeout(300)
def test_a_message_of_very_many_keys_is_not_looked_at_for_ever() -> None:
    row = {"messages": [Q | {f"key {number}": 1 for number in range(100_000)}, A]}
    found = unread(row, plain())
    assert found[0] == "messages[].key 0"
    assert len(found) <= MOST_KEYS
