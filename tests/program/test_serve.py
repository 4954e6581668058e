"""``llamax serve`` as its clients see it: openai, huggingface_hub, and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import openai
import pytest
import torch
import transformers
from support.served import Server, served
from support.served_models import ADAPTERS, client_of, make_served, metric, post, serving

import llamax

PROMPTS = [
    "import os",
    "def main(",
    "class A:\n    def f(self):\n        return",
    "x",
    " = ".join("abc"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    make_served(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as server:
        yield server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return client_of(server)


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[tuple[str, str], str]:
    """What ``llamax.load(...).generate`` answers: (model, prompt) -> text."""
    return {
        (name, prompt): text
        for name in ("hub", *ADAPTERS)
        for prompt, text in zip(
            PROMPTS,
            llamax.load(folder / name).generate(PROMPTS, temperature=0, max_new_tokens=24),
            strict=True,
        )
    }


def test_answers_are_those_of_generate(
    client: openai.OpenAI, answers: dict[tuple[str, str], str]
) -> None:
    for (name, prompt), text in answers.items():
        reply = client.completions.create(
            model=name, prompt=prompt, temperature=0, max_tokens=24, logprobs=1
        )
        assert reply.choices[0].text == text
        assert reply.usage is not None
        assert reply.usage.completion_tokens == len(reply.choices[0].logprobs.tokens)  # type: ignore[union-attr]
    assert len({answers[name, PROMPTS[0]] for name in ("hub", *ADAPTERS)}) == 3


def test_concurrent_clients_of_several_models_get_the_same(
    server: Server, answers: dict[tuple[str, str], str]
) -> None:
    """64 clients at once, streamed and not, over 5 slots with 64 in the queue."""

    async def ask(client: openai.AsyncOpenAI, number: int) -> tuple[str, str]:
        (name, prompt), text = list(answers.items())[number % len(answers)]
        if number % 2:
            reply = await client.completions.create(
                model=name, prompt=prompt, temperature=0, max_tokens=24
            )
            return reply.choices[0].text, text
        pieces = await client.completions.create(
            model=name, prompt=prompt, temperature=0, max_tokens=24, stream=True
        )
        return "".join([piece.choices[0].text async for piece in pieces]), text

    async def ask_all() -> list[tuple[str, str]]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(64)))

    for got, expected in asyncio.run(ask_all()):
        assert got == expected
    assert metric(server, "llamax_requests_active") == 0


def test_a_conversation_is_formatted_by_the_chat_template(
    client: openai.OpenAI, folder: Path
) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi </s>"},
    ]
    expected = llamax.load(folder / "hub").generate(messages, temperature=0, max_new_tokens=9)
    reply = client.chat.completions.create(
        model="hub", messages=messages, temperature=0, max_tokens=9, logprobs=True, top_logprobs=3
    )
    choice = reply.choices[0]
    assert choice.message.content == expected
    assert choice.logprobs is not None
    for entry in choice.logprobs.content or ():
        assert (
            entry.logprob
            == entry.top_logprobs[0].logprob
            == max(t.logprob for t in entry.top_logprobs)
        )
    stream = client.chat.completions.create(
        model="hub",
        messages=messages,
        temperature=0,
        max_tokens=9,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    for index in range(2):
        parts = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == expected
        assert [part.finish_reason for part in parts][-1] == choice.finish_reason
    assert chunks[-1].usage is not None
    assert reply.usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * reply.usage.completion_tokens


def test_logprobs_are_those_of_transformers(client: openai.OpenAI, folder: Path) -> None:
    reply = client.completions.create(
        model="hub", prompt=[1, 30, 45], temperature=0, max_tokens=5, logprobs=5
    )
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "hub")
    made = model.generate(
        torch.tensor([[1, 30, 45]]),
        do_sample=False,
        max_new_tokens=5,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = [float(step.log_softmax(-1).max()) for step in made.logits]
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == pytest.approx(expected, abs=1e-4)


def test_a_request_without_a_length_gets_what_the_server_has_room_for(
    server: Server, folder: Path
) -> None:
    """The interfaces' own lengths, 16 and 100 tokens, are no wish of the client."""
    long = "x " * 60  # 122 of 128 tokens with BOS
    status, content = post(
        server, "/v1/completions", json.dumps({"prompt": long, "temperature": 0}).encode()
    )
    assert status == 200, content
    assert json.loads(content)["usage"]["total_tokens"] == 128
    body = {"inputs": long, "parameters": {"details": True}}
    status, content = post(server, "/generate", json.dumps(body).encode())
    assert status == 200, content
    assert json.loads(content)["details"]["generated_tokens"] == 128 - 122
    with served(folder / "hub", "--max-new-tokens=3") as limited:
        for path, body in (
            ("/v1/completions", {"prompt": "x", "temperature": 0}),
            ("/generate", {"inputs": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ):
            status, content = post(limited, path, json.dumps(body).encode())
            assert status == 200, content


def test_top_logprobs_hold_the_drawn_token_and_the_most_likely_of_equal_texts(
    client: openai.OpenAI,
) -> None:
    """Halves of characters have one text, U+FFFD."""
    wish: dict[str, Any] = {"model": "hub", "prompt": "x", "max_tokens": 40, "seed": 1}
    for top, temperature in ((0, 1.0), (2, 2.0), (5, 2.0)):
        choice = client.completions.create(logprobs=top, temperature=temperature, **wish).choices[0]
        found = choice.logprobs
        assert found is not None
        rows = zip(
            found.tokens or (), found.token_logprobs or (), found.top_logprobs or (), strict=True
        )
        for number, (token, logprob, best) in enumerate(rows):
            assert token in best, number
            assert best[token] >= logprob
            assert list(best.values()) == sorted(best.values(), reverse=True)
            assert 1 <= len(best) <= top + 1
    assert any("\ufffd" in best for best in found.top_logprobs or ())


def test_tokens_join_to_the_text_and_their_offsets_go_on_in_a_stream(
    client: openai.OpenAI, answers: Any
) -> None:
    wish: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "logprobs": 2}
    for (name, prompt), text in answers.items():
        reply = client.completions.create(model=name, prompt=prompt, **wish)
        whole = reply.choices[0].logprobs
        assert whole is not None
        assert whole.tokens is not None
        assert "\ufffd" in text or "".join(whole.tokens) == text
        ends = [sum(map(len, whole.tokens[:i])) for i in range(len(whole.tokens))]
        assert whole.text_offset == ends
        pieces = client.completions.create(model=name, prompt=prompt, stream=True, **wish)
        logprobs = [piece.choices[0].logprobs for piece in pieces]
        assert [at for each in logprobs if each for at in each.text_offset or ()] == ends


def test_bytes_of_tokens_join_to_the_message(client: openai.OpenAI) -> None:
    for name in ("hub", *ADAPTERS):
        choice = client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": "Hi"}],
            temperature=0,
            max_tokens=24,
            logprobs=True,
        ).choices[0]
        assert choice.logprobs is not None
        entries = choice.logprobs.content or ()
        joined = bytes(byte for entry in entries for byte in entry.bytes or ())
        assert joined.decode(errors="replace") == choice.message.content


def test_a_client_sends_the_message_of_an_answer_back(client: openai.OpenAI) -> None:
    """As a conversation goes on: clients add what they got, with the fields that are null."""
    messages: Any = [{"role": "user", "content": "Hi"}]
    ask: dict[str, Any] = {"model": "hub", "temperature": 0, "max_tokens": 5}
    message = client.chat.completions.create(messages=messages, **ask).choices[0].message
    again = {"role": "user", "content": "And?"}
    plain = [*messages, {"role": "assistant", "content": message.content}, again]
    expected = client.chat.completions.create(messages=plain, **ask).choices[0].message.content
    for sent in (message, message.model_dump(), {**message.model_dump(), "tool_calls": []}):
        reply = client.chat.completions.create(messages=[*messages, sent, again], **ask)
        assert reply.choices[0].message.content == expected


def test_a_model_is_found_by_its_name(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"hub", *ADAPTERS}
    for name, model in listed.items():
        assert client.models.retrieve(name) == model
    assert client.models.retrieve("tgi").id == "hub"
    with pytest.raises(openai.NotFoundError, match="use hub or poet or judge"):
        client.models.retrieve("gpt")


def test_a_seed_gives_the_draws_of_generate(client: openai.OpenAI, folder: Path) -> None:
    settings: dict[str, Any] = {"temperature": 0.9, "top_p": 0.8}
    expected = llamax.load(folder / "hub").generate(
        "import os", seed=7, max_new_tokens=12, **settings
    )
    reply = client.completions.create(
        model="hub", prompt="import os", seed=7, max_tokens=12, n=2, **settings
    )
    assert reply.choices[0].text == expected != reply.choices[1].text
    drawn = {
        client.completions.create(model="hub", prompt="x", temperature=1, max_tokens=9)
        .choices[0]
        .text
        for _ in range(3)
    }
    assert len(drawn) == 3, "requests without a seed differ"


def test_an_answer_ends_before_a_stop_text(client: openai.OpenAI, answers: Any) -> None:
    text = answers["hub", "import os"]
    stop = text[len(text) // 2 :][:2]
    reply = client.completions.create(
        model="hub", prompt="import os", temperature=0, max_tokens=24, stop=[stop]
    )
    assert reply.choices[0].text == text[: text.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_clients_of_tgi_are_answered(
    server: Server, answers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    text = answers["hub", "import os"]
    client = huggingface_hub.InferenceClient(server.url)
    assert client.text_generation("import os", max_new_tokens=24) == text
    details = client.text_generation("import os", max_new_tokens=24, details=True)
    assert details.details is not None
    assert details.details.finish_reason == "length"
    assert details.details.generated_tokens == len(details.details.tokens) == 24
    assert "".join(client.text_generation("import os", max_new_tokens=24, stream=True)) == text
    *_, last = client.text_generation("import os", max_new_tokens=24, stream=True, details=True)
    assert last.generated_text == text
    full = client.text_generation("import os", max_new_tokens=24, return_full_text=True)
    assert full == f"import os{text}"
    chat = client.chat_completion(
        [{"role": "user", "content": "Hi"}], max_tokens=4, temperature=0.0
    )
    assert chat.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("body", "read"),
    [
        (
            {"inputs": "import os", "parameters": {"max_new_tokens": 24}},
            lambda r: r[0]["generated_text"],
        ),
        (
            {"prompt": "import os", "max_tokens": 24, "temperature": 0},
            lambda r: r["choices"][0]["text"],
        ),
    ],
)
def test_sagemaker_invokes_either_interface(
    server: Server, answers: Any, body: Any, read: Any
) -> None:
    status, content = post(server, "/invocations", json.dumps(body).encode())
    assert (status, read(json.loads(content))) == (200, answers["hub", "import os"])


def test_names_of_special_tokens_are_tokens_in_texts_and_text_in_messages(
    server: Server, client: openai.OpenAI
) -> None:
    """As TGI and vLLM do it: whoever sends a text has formatted it already, BOS included."""
    plain = client.completions.create(model="hub", prompt="<s>import os", max_tokens=1)
    assert plain.usage is not None
    assert (
        plain.usage.prompt_tokens
        == client.completions.create(
            model="hub", prompt="import os", max_tokens=1
        ).usage.prompt_tokens
    )  # type: ignore[union-attr]
