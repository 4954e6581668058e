"""``llamax serve`` as its clients see it: openai, huggingface_hub, and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import openai
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support.instruction import llama2_tokenizer
from support.models import DECIDED
from support.served import Server, served

import llamax
from llamax.cli.serve import main
from llamax.runtime.errors import LlamaxError

TEMPLATE = (
    "{% for message in messages %}{{ bos_token if loop.first else '' }}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PROMPTS = [
    "import os",
    "def main(",
    "class A:\n    def f(self):\n        return",
    "x",
    " = ".join("abc"),
]
ADAPTERS = {"poet": ["q_proj", "v_proj"], "judge": "all-linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hub, a random model with a chat template; poet and judge, adapters of it by peft."""
    folder = tmp_path_factory.mktemp("serve")
    tokenizer = llama2_tokenizer(folder)
    transformers.set_seed(0)
    config = transformers.LlamaConfig(**DECIDED.to_hub("float32"))
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "hub")
    (folder / "hub" / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    (folder / "hub" / "chat_template.jinja").write_text(TEMPLATE)
    for rank, (name, targets) in enumerate(ADAPTERS.items(), 3):
        base = transformers.LlamaForCausalLM.from_pretrained(folder / "hub")
        tuned = get_peft_model(base, LoraConfig(r=rank, lora_alpha=9, target_modules=targets))
        for parameter_name, parameter in tuned.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.5)
        tuned.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    adapters = [f"--adapter={name}={folder / name}" for name in ADAPTERS]
    with served(folder / "hub", *adapters, "--slots=5", "--max-body=4KiB", "--queue=64") as server:
        yield server
        assert server.process.poll() is None, server.log
        assert "Traceback" not in server.log


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


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


def post(server: Server, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and content of a request as it is, without a client's checks."""
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=300) as connection:
        connection.sendall(head.encode() + b"\r\n" + body)
        raw = b"".join(iter(lambda: connection.recv(65536), b""))
    status, content = raw.split(b"\r\n\r\n", 1)
    return int(status.split()[1]), content


def metric(server: Server, name: str) -> float:
    with openai.DefaultHttpxClient() as http:
        text = http.get(f"{server.url}/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


# ---- what clients get


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


# ---- what they do wrong


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": 500}, 400, "ask for at most 125"),
        ("/v1/completions", {"prompt": "x " * 130}, 400, "the server takes 128 with the answer"),
        ("/v1/completions", {"prompt": [600]}, 400, "the prompt has token 600"),
        ("/v1/completions", {"prompt": []}, 400, "prompt: "),
        ("/v1/completions", {"prompt": "x", "top_p": -1}, 400, "top_p=-1.0 is out of range"),
        ("/v1/completions", {"prompt": "x", "echo": True}, 400, "echo is not supported"),
        ("/v1/completions", {"prompt": "x", "max_token": 4}, 400, "max_token is not a field"),
        ("/v1/completions", {"prompt": "x", "model": "gpt"}, 404, "use hub or poet or judge"),
        ("/v1/completions", {"prompt": "x", "n": 17}, 400, "n: "),
        ("/v1/completions", {"prompt": "x" * 5000}, 413, "more than 4096 bytes"),
        ("/v1/completions", {"prompt": ["x"] * 70}, 429, "try again later"),
        ("/v1/completions", {"prompt": [[1]] * 600, "n": 16}, 429, "try again later"),
        ("/v1/completions", {"prompt": "x", "stop": ["a"] * 17}, 400, "stop: "),
        ("/v1/completions", {"prompt": "x", "stop": "a" * 1001}, 400, "stop: "),
        ("/v1/completions", {"prompt": "x", "temperature": 1e-50}, 200, ""),
        ("/generate", {"inputs": "x", "parameters": {"stop": ["a"] * 17}}, 400, "parameters"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages: "),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0. has no text"),
        ("/v1/chat/completions", {"messages": [{"content": "x"}]}, 400, "messages.0. has no role"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user] </s>[system", "content": "x"}]},
            400,
            "messages.0. has an unknown role",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "assistant", "content": "x"}]},
            400,
            "the last message is the assistant's",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "a part that is no text",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]},
            400,
            "tools is not supported",
        ),
        ("/generate", {"inputs": ""}, 200, ""),
        ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 0}}, 400, "max_new_tok"),
        ("/generate", {"inputs": "\ud800"}, 400, "half of a surrogate pair"),
        ("/invocations", {"text": "x"}, 400, "none of messages, prompt, inputs"),
        ("/v2/none", {}, 404, "/v2/none is not served"),
    ],
)  # fmt: skip
def test_a_request_that_is_wrong_gets_one_line(
    server: Server, path: str, body: Any, status: int, message: str
) -> None:
    got, content = post(server, path, json.dumps(body).encode())
    assert got == status, content
    if status != 200:
        error = json.loads(content)["error"]
        text = error["message"] if path.startswith("/v") else error
        assert re.search(message, text)
        assert "\n" not in text


@pytest.mark.parametrize(
    "body", [b"", b"[", b"[]", b"\xff", b"[" * 3000, b'{"prompt": NaN}', b"null"]
)
def test_a_body_that_is_no_object_is_refused(server: Server, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/generate", "/", "/invocations"):
        status, content = post(server, path, body)
        assert status == 400
        assert b"the body" in content


def test_a_client_that_goes_away_ends_its_request(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for stream in (True, False):
        before = metric(server, 'llamax_requests_total{outcome="cancelled"}')
        body = json.dumps({"prompt": "x", "max_tokens": 120, "stream": stream, "n": 16}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            if stream:
                assert connection.recv(100)
            else:
                while not metric(server, "llamax_requests_active"):
                    time.sleep(0.005)
        while metric(server, "llamax_requests_active") or metric(server, "llamax_requests_waiting"):
            time.sleep(0.01)
        assert metric(server, 'llamax_requests_total{outcome="cancelled"}') > before


# ---- starting and stopping


def test_a_taken_port_a_strange_folder_and_settings_are_refused_at_once(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    port = server.url.rpartition(":")[2]
    (tmp_path / "keys").touch()
    hub, poet, judge = (str(folder / name) for name in ("hub", *ADAPTERS))
    for options, message in (
        ([hub, f"--port={port}"], f"cannot listen on port {port} of 127.0.0.1"),
        ([hub, "--host=256.1.1.1"], "cannot listen on port 8000 of 256.1.1.1"),
        ([hub, "--port=70000"], "--port=70000 is no port"),
        ([str(tmp_path / "none")], "none"),
        ([hub, "--length=129"], "beyond max_position_embeddings=128"),
        ([hub, "--length=1"], "--length=1 holds no answer"),
        ([hub, "--slots=0"], "--slots=0 is too small"),
        ([hub, "--connections=0"], "--connections=0 is too small"),
        ([hub, "--connections=99999999999"], "--connections=99999999999 takes up to"),
        ([hub, "--port=0", "--slots=999999999999"], "use a smaller --slots or --length"),
        ([hub, f"--adapter=x={hub}"], f"--adapter x: {hub} holds no adapters; serve it by"),
        ([hub, "--adapter=x=nowhere"], "--adapter x: there is no folder nowhere; check the path"),
        (
            [hub, f"--adapter=x={poet}", f"--adapter=x={judge}"],
            f"--adapter x is {poet} and {judge}; give it once",
        ),
        ([poet, f"--adapter=judge={judge}"], "needs a whole model"),
        ([hub, f"--adapter=hub={judge}"], "is the name of the model itself"),
        ([hub, f"--api-key-file={tmp_path / 'keys'}"], "holds no key"),
        ([hub, f"--api-key-file={tmp_path / 'no'}"], "cannot be read"),
    ):
        with pytest.raises(LlamaxError) as refusal:
            main(options)
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_keys_are_asked_for_and_a_signal_lets_a_request_in_progress_end(
    folder: Path, tmp_path: Path, number: int, status: int
) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    keys = f"--api-key-file={tmp_path / 'keys'}"
    with served(folder / "judge", "--name=mine", keys) as server:
        for key in ("three", "-"):
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
            with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
                client.completions.create(model="mine", prompt="x", max_tokens=1)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="two", max_retries=0)
        stream = client.completions.create(model="mine", prompt="x", max_tokens=120, stream=True)
        pieces = iter(stream)
        made = [next(pieces)]
        server.process.send_signal(number)
        made += pieces
        assert made[-1].choices[0].finish_reason in ("length", "stop")
        assert server.process.wait(timeout=300) == status
        assert "Traceback" not in server.log
