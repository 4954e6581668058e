"""How ``llamax serve`` ends while requests are in progress: each gets an answer."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest
import torch
import uvicorn
from support.fuzz_serving import service

from llamax.inference.serving import connection
from llamax.inference.serving.app import build_app

BODY = {"prompt": "a b", "max_tokens": 4}


def ask(address: tuple[str, int], path: str, body: Any) -> socket.socket:
    client = socket.create_connection(address)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    client.sendall(head.encode() + data)
    return client


def answer(client: socket.socket) -> bytes:
    with client:
        return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("signals", [1, 2])
def test_requests_beyond_the_time_of_grace_are_answered_that_the_server_stops(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, signals: int
) -> None:
    """At once after a second signal; uvicorn alone cuts off streams and sends a plain 500."""
    monkeypatch.setattr(connection, "GRACE_S", 0.5 if signals == 1 else 1000.0)
    served = service()
    scheduler, computing = served.scheduler, threading.Event()
    one_token = scheduler._one_token

    def slow(*arguments: Any) -> torch.Tensor:
        computing.set()
        while not scheduler._stopping:
            time.sleep(0.001)
        return one_token(*arguments)

    monkeypatch.setattr(scheduler, "_one_token", slow)
    scheduler.start()
    config = uvicorn.Config(build_app(served, 2**20), log_config=None, lifespan="off")
    server = connection.Server(config, scheduler.end)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        stream = ask(address, "/v1/completions", {**BODY, "stream": True})
        assert stream.recv(10)
        computing.wait()
        others = [ask(address, "/v1/completions", BODY)]
        others.append(
            ask(address, "/generate", {"inputs": "a", "parameters": {"max_new_tokens": 4}})
        )
        while len(scheduler._active) + len(scheduler._waiting) != 3:
            time.sleep(0.001)
        server.should_exit, server.force_exit = True, signals == 2
        events = answer(stream).split(b"data: ")
        assert b"the server is stopping" in events[-1]
        assert json.loads(events[-1].partition(b"\n")[0])["error"]["code"] == 503
        for client in others:
            head, _, body = answer(client).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1" in head
            assert b"the server is stopping; try again later" in body
        thread.join()
        scheduler.stop()
    counted = scheduler.metrics.text().decode()
    assert 'llamax_requests_total{outcome="failed"} 3.0' in counted
    assert "refused" not in counted
    assert "Traceback" not in caplog.text
