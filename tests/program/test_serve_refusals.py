"""What ``llamax serve`` refuses, and how it ends: wrong requests and options, keys, signals."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support.served import Server, served
from support.served_models import ADAPTERS, client_of, make_served, metric, post, serving

from llamax.cli.serve import main
from llamax.runtime.errors import LlamaxError


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


# ---- what they do wrong


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": 500}, 400, "ask for at most 125"),
        ("/v1/completions", {"prompt": "x " * 130}, 400, "the server takes 128 with the answer"),
        ("/v1/completions", {"prompt": [600]}, 400, "the prompt has token 600"),
        ("/v1/completions", {"prompt": []}, 400, "prompt: send a text or a list of texts, or ids"),
        ("/v1/completions", {"prompt": [[]]}, 400, "prompt: send a text or a list of texts, or i"),
        ("/v1/completions", {"prompt": ["a", [1]]}, 400, "prompt: send a text or a list of texts"),
        ("/v1/completions", {"prompt": "x", "skip_special_tokens": True}, 200, ""),
        ("/v1/completions", {"prompt": "x", "skip_special_tokens": False}, 400, "not supported"),
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
        (
            "/v1/chat/completions",
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            400,
            "messages.0.: tool_calls is not supported",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            400,
            "a part that is no text",
        ),
        ("/v1/completions", {"model": None, "prompt": None}, 200, ""),
        ("/v1/completions", {"prompt": "x", "max_tokens": 1, "seed": -(2**63)}, 200, ""),
        ("/generate", {"inputs": "x", "parameters": {"seed": 2**64 - 1}}, 200, ""),
        ("/generate", {"inputs": "x", "parameters": {"top_n_tokens": 2}}, 400, "^top_n_tokens is"),
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


def test_a_refusal_names_the_field_as_its_param(client: openai.OpenAI) -> None:
    for field in ("logit_bias", "max_token", "best_of", "temperature"):
        with pytest.raises(openai.BadRequestError) as refusal:
            client.completions.create(model="hub", prompt="x", extra_body={field: [2]})
        assert refusal.value.param == field


def test_a_wrong_method_is_told_the_right_one(server: Server) -> None:
    with openai.DefaultHttpxClient() as http:
        for method in ("GET", "OPTIONS", "HEAD"):
            reply = http.request(method, f"{server.url}/v1/completions")
            assert (reply.status_code, reply.headers["allow"]) == (405, "POST")


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
    refused = 'llamax_requests_total{outcome="refused"}'
    refused_before = metric(server, refused)
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
    assert metric(server, refused) == refused_before


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
        chosen = any(option.startswith(("--port=", "--host=")) for option in options)
        with pytest.raises(LlamaxError) as refusal:
            main(options if chosen else [*options, "--port=0"])
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
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
