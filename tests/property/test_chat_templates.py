"""Chat templates in the styles that are published, rendered as transformers renders them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import Tokenizer, models

from llamax.data.chat.encode import Encoder
from llamax.data.chat.templates import SHIELD, Sample, Template
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.runtime.errors import DataError

NAMED = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": {"content": "<cls>", "__type": "AddedToken"},
    "tool_token": "<tool>",
    "extra_special_tokens": {"image": "<image>", "end_of_turn_token": "<turn|>"},
}
TEMPLATES = {
    "turns with trimmed texts": """
        {{- bos_token }}
        {%- for message in messages %}
            {%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}
                {{- raise_exception('a role is not known: ' + message['role']) }}
            {%- endif %}
            {{- '<|' + message['role'] + '|>' + '\n' }}
            {{- message['content'] | trim + eos_token + '\n' }}
        {%- endfor %}
        {%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}""",
    "break and continue": """{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% if loop.index0 > 4 %}{% break %}{% endif %}
{{ message.role }}: {{ message.content }}{{ pad_token }}
{% endfor %}
{% if add_generation_prompt %}assistant:{% endif %}""",
    "every named token": """{{ bos_token ~ cls_token ~ tool_token ~ image ~ end_of_turn_token }}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}{{ sep_token }}{{ eos_token }}{% endfor %}""",
    "namespace and slices": """{% set ns = namespace(system='', turns=0, last=none) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{%- for m in rest %}{% set ns.turns = ns.turns + 1 %}
    {%- if loop.last %}{% set ns.last = m.content %}{% endif %}
{{ loop.index }}/{{ rest | length }} {{ m.role | upper }} {{ m.content | replace('a', 'b') }}
{%- endfor %}
<{{ ns.system | default('none', true) }}|{{ ns.turns }}|{{ messages[::-1][0].role }}>
{{- ns.last }}""",
    "tools as JSON": """{% macro shown(tool) %}{{ tool | tojson(indent=2) }}{% endmacro %}
{%- if tools is defined and tools is not none and tools %}{% for tool in tools %}
{{ shown(tool) }}
{{ tool | tojson(ensure_ascii=true, sort_keys=true) }}|{{ tool | tojson(separators=(',', ':')) }}
{%- endfor %}{% endif %}
{% for m in messages %}{{ m.role }}:{% if m.tool_calls %}
{% for call in m.tool_calls %}<tool>{{ call.function.name }} {{ call.function.arguments | tojson }}
{% endfor %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}""",
    "documents": """{% if documents %}{% for d in documents %}# {{ d['title'] }}
{{ d.text | indent(2) }}
{% endfor %}{% endif %}{% for m in messages %}
{{- m.content }}{{ '\n' if not loop.last }}{% endfor %}""",
    "reasoning": """{% for m in messages %}
{%- if m.role == 'assistant' and m.reasoning_content is string %}
<think>{{ m.reasoning_content.strip('\n') }}</think>{{ m.content.split('</think>')[-1].lstrip() }}
{% else %}{{ m.role }} {{ m.content }}{% endif %}{% endfor %}""",
    "marked answers": """{% for m in messages %}{% if m.role == 'assistant' %}A:
{%- generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}
{% else %}{{ m.role[0] | upper }}: {{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}""",
    "statements in marked answers": """{% set end = '.' %}{% for m in messages %}
{%- if m.role == 'assistant' %}{% generation %}{% set end = '!' %}
{%- for c in m.content %}{% if loop.index > 3 %}{% break %}{% endif %}{{ c }}{% endfor %}
{{ end }}{{ loop.index }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}
{{- end }}{% endfor %}""",
    "alternation": """{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('roles alternate') }}
{% endif %}
{{ '[INST] ' ~ m.content ~ ' [/INST]' if m.role == 'user' else ' ' ~ m.content ~ eos_token }}
{% endfor %}""",
    "filters and tests": """{% set roles = messages | map(attribute='role') | unique | list %}
{{ roles | join(',') }}
{% for m in messages | selectattr('role', 'equalto', 'user') %}
{{ m.content | length }} {{ m.content is string }} {{ m.content[:3] | tojson }}
{{ (m | items | list)[0][0] }}
{% endfor %}{{ {'a': 1, 'b': [true, none, 0.5]} | tojson }}{{ dict(x=1) }}""",
    "date": """
{%- if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}
Today: {{ date_string }}
{% for m in messages %}{{ m.content }}{{ '\\n' }}{% endfor %}""",
}  # fmt: skip
WORDS = ["a", "Größe", " two", "x\n", "<b>&'\"", "\\u00e9", "</think>", "", "\n\nend ", "水"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
TOOL = {"type": "function", "function": {"name": "größe", "parameters": {"b": [1], "a": "<é>"}}}


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    talk: list[dict[str, Any]] = []
    if draw(st.booleans()):
        talk.append({"role": "system", "content": draw(texts)})
    for _ in range(draw(st.integers(1, 3))):
        talk.append({"role": "user", "content": draw(texts)})
        answer = {"role": "assistant", "content": draw(texts)}
        key = draw(st.sampled_from(["", "reasoning_content", "thinking", "reasoning"]))
        talk.append({**answer, key: draw(texts)} if key else answer)
        if draw(st.integers(0, 3)) == 0:
            call = {"name": "f", "arguments": {"q": draw(texts)}}
            talk[-1]["tool_calls"] = [{"type": "function", "function": call}]
    return talk[: draw(st.integers(1, len(talk)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with named tokens, some of them with names of its own."""
    folder = tmp_path_factory.mktemp("named")
    engine = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    engine.add_special_tokens(["<s>", "</s>", "<pad>", "<cls>", "<tool>", "<image>", "<turn|>"])
    engine.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def outcome(render: Any) -> str | None:
    """The text, or None where the template refuses the conversation."""
    try:
        return str(render()).replace(SHIELD, "")
    except (DataError, ValueError, TypeError, TemplateError):
        return None


@pytest.mark.parametrize("name", TEMPLATES)
@given(talk=conversations(), tools=st.booleans(), documents=st.booleans())
@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_a_template_renders_as_with_transformers(
    folder: Path, name: str, talk: list[dict[str, Any]], tools: bool, documents: bool
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    template = Encoder(load_tokenizer(folder)).template(name, TEMPLATES[name])
    more: dict[str, Any] = {"tools": [TOOL]} if tools else {}
    more |= {"documents": [{"title": "T", "text": "one\ntwo"}]} if documents else {}
    options: dict[str, Any] = {"chat_template": TEMPLATES[name], "tokenize": False, **more}
    row = Sample(talk, variables=more)

    def marked(text: str) -> str:
        return text.replace("\ufdd0", "").replace("\ufdd1", "")

    assert outcome(lambda: marked(template.text(row))) == outcome(
        lambda: theirs.apply_chat_template(talk, **options)
    )
    for prompt in (True, False):
        wanted = outcome(
            lambda prompt=prompt: theirs.apply_chat_template(
                talk, add_generation_prompt=prompt, continue_final_message=not prompt, **options
            )
        )
        if wanted is None and not prompt:
            continue  # transformers looks for the last message's text, and may find it changed
        if wanted and not prompt:  # and leaves its mark where a text is written twice
            wanted = re.sub("CONTINUE_FINAL_MESSAGE_TAG ?", "", wanted)
        assert outcome(lambda prompt=prompt: template.conversation(talk, prompt, more)) == wanted


def test_columns_set_no_tokens_and_no_functions(folder: Path) -> None:
    encoder = Encoder(load_tokenizer(folder))
    source = (
        "{{ image ~ tool_token ~ sep_token ~ tone }}{% for i in range(1) %}{{ answer }}{% endfor %}"
    )
    template = encoder.template("columns", source)
    assert template.columns == {"tone"}


def test_the_last_message_must_be_in_the_text() -> None:
    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    with pytest.raises(DataError, match="leaves out the last message"):
        Template("first", "{{ messages[0].content }}").conversation(talk, False)
    parts = [{"type": "text", "text": "one "}, {"type": "image"}]
    template = Template("parts", "{% for p in messages[-1].content %}{{ p.text }}.{% endfor %}")
    assert template.conversation([{"role": "user", "content": parts}], False) == "one "
    with pytest.raises(DataError, match="has no text that could be continued"):
        template.conversation([{"role": "user", "content": None}], False)
