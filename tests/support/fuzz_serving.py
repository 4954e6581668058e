"""Bodies of requests to change, and a server in this process that answers them."""

from __future__ import annotations

import asyncio
import json
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from starlette.types import ASGIApp, Message

from llamax.inference.engine import open_model
from llamax.inference.serving.adapters import build_served
from llamax.inference.serving.app import build_app
from llamax.inference.serving.metrics import Metrics
from llamax.inference.serving.scheduler import Scheduler
from llamax.inference.serving.service import Served, Service
from llamax.runtime.errors import LlamaxError
from support.adapters import base_folder
from support.checkpoints import llama
from support.fuzz_data import TEMPLATE
from support.instruction import llama2_tokenizer

PATHS = {
    "chat.json": "/v1/chat/completions",
    "complete.json": "/v1/completions",
    "generate.json": "/generate",
    "stream.json": "/generate_stream",
    "invoke.json": "/invocations",
}
REFUSED = {400, 404, 413, 429}


def service(length: int = 32) -> Service:
    """A tiny model with requests of up to ``length`` tokens, whose scheduler is not started."""
    folder = Path(mkdtemp()) / "model"
    base_folder(folder, llama(vocabulary=640))
    llama2_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    loaded = open_model(folder)
    model, adapters = build_served(loaded, {}, torch.device("cpu"), "")
    scheduler = Scheduler(model, adapters, 4, length, 16, Metrics())
    return Service(scheduler, {"m": Served(loaded, "", "")}, "m", 4)


@lru_cache(maxsize=1)
def app() -> ASGIApp:
    """The application with a tiny model."""
    served = service()
    served.scheduler.start()
    return build_app(served, 2**20)


def requests(folder: Path) -> None:
    """A body for each path."""
    drawn = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 1, "stop": ["a", "</s>"]}
    turns = [{"role": "user", "content": "hi"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "n"}]
    chosen = {"model": "m", "max_tokens": 3, "n": 2, "stop_token_ids": [3], **drawn}
    tgi = {"max_new_tokens": 3, "do_sample": True, "details": True, **drawn}
    bodies = {
        "chat.json": {"messages": turns, "logprobs": True, "top_logprobs": 2, **chosen},
        "complete.json": {"prompt": ["a", "b"], "stream": True, "logprobs": 1, **chosen},
        "generate.json": {"inputs": "a b", "parameters": {**tgi, "return_full_text": True}},
        "stream.json": {"inputs": "a b", "parameters": tgi, "stream": True},
        "invoke.json": {"messages": parts, "max_tokens": 2, "stream_options": {}},
    }
    for name, body in bodies.items():
        (folder / name).write_text(json.dumps(body))


def answer(folder: Path) -> None:
    """Send all bodies; each gets an answer or is refused by a status of 400 to 499."""
    statuses = [
        asyncio.run(_send(path, (folder / name).read_bytes())) for name, path in PATHS.items()
    ]
    assert {*statuses} <= {200, *REFUSED}, statuses
    if {*statuses} & REFUSED:
        raise LlamaxError("a request is refused")


async def _send(path: str, body: bytes) -> int:
    """Send one body; the status, after a check of what came back."""
    pieces: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        if not pieces:
            await asyncio.Event().wait()  # the client stays
        return pieces.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [],
    }
    await app()(scope, receive, send)
    status: int = sent[0]["status"]
    content = b"".join(message.get("body", b"") for message in sent)
    if dict(sent[0]["headers"])[b"content-type"].startswith(b"text/event-stream"):
        for event in content.decode().removesuffix("\n\n").split("\n\n"):
            data = event.removeprefix("data: ")
            assert data == "[DONE]" or "error" not in json.loads(data), event
    else:
        json.loads(content)
    return status
