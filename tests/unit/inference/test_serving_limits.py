"""What one client of ``llamax serve`` cannot do to the others: bounds of bodies and connections."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import torch
import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from llamax.inference.sampling import Sampling
from llamax.inference.serving import connection
from llamax.inference.serving.app import BODIES, Arriving, HttpError
from llamax.inference.serving.scheduler import Request, draw
from llamax.inference.serving.server import allow_files
from llamax.runtime.errors import ConfigError

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def test_log_probabilities_are_at_most_those_of_the_vocabulary() -> None:
    request = Request([1], str, print, Sampling(), 1, top=20)
    (drawn,) = draw([request], torch.arange(7.0)[None])
    assert [token for token, _ in drawn.top] == [6, 5, 4, 3, 2, 1, 0]


def test_bodies_that_arrive_at_once_have_a_limit() -> None:
    """Clients that send all but the end of a body must not fill the memory."""

    class Sender:
        def __init__(self, waits: bool) -> None:
            self.waits, self.sent = waits, asyncio.Event()

        async def stream(self) -> AsyncIterator[bytes]:
            yield b"x" * 100
            self.sent.set()
            if self.waits:
                await asyncio.Event().wait()

    async def run() -> None:
        arriving, slow = Arriving(100), [Sender(True) for _ in range(BODIES)]
        tasks = [asyncio.create_task(arriving.read(sender)) for sender in slow]  # type: ignore[arg-type]
        for sender in slow:
            await sender.sent.wait()
        with pytest.raises(HttpError, match="too many bodies arrive at once"):
            await arriving.read(Sender(False))  # type: ignore[arg-type]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert len(await arriving.read(Sender(False))) == 100  # type: ignore[arg-type]

    asyncio.run(run())


@asynccontextmanager
async def listening(app: ASGIApp, limit: int = 100) -> AsyncIterator[tuple[str, int]]:
    """A server of connections on a free port of the loopback: its address."""
    config = uvicorn.Config(app, timeout_keep_alive=1000, log_config=None)
    config.load()
    state, loop = ServerState(), asyncio.get_running_loop()
    faults: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda loop, fault: faults.append(fault))
    server = await loop.create_server(
        lambda: connection.Connection(config, state, {}, limit=limit), "127.0.0.1", 0
    )
    async with server:
        yield server.sockets[0].getsockname()
    assert not faults


async def empty(scope: Scope, receive: Receive, send: Send) -> None:
    await Response()(scope, receive, send)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1\r\nHost:"])
def test_a_connection_without_a_request_is_closed(
    monkeypatch: pytest.MonkeyPatch, head: bytes, answered: bool
) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.1)

    async def run() -> None:
        async with listening(empty) as address:
            reader, writer = await asyncio.open_connection(*address)
            if answered:
                writer.write(REQUEST)
                assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            writer.write(head or b"G" * answered)
            assert await reader.read() == b""
            writer.close()

    asyncio.run(run())


@pytest.mark.timeout(300)
def test_connections_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REFUSED", 1)

    async def run() -> None:
        async with listening(empty, limit=2) as address:
            served = [await asyncio.open_connection(*address) for _ in range(2)]
            for reader, writer in served:  # both stay open
                writer.write(REQUEST)
                assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            reader, writer = await asyncio.open_connection(*address)
            writer.write(REQUEST)
            head, _, body = (await reader.readuntil(b"}")).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert json.loads(body)["error"] == "too many open connections; try again later"
            beyond, _ = await asyncio.open_connection(*address)
            with suppress(ConnectionError):
                assert await beyond.read() == b""
            assert await reader.read() == b""  # closed by the server
            served[0][1].close()
            answer = b"503"
            while b"503" in answer:  # until the server sees that one is closed
                reader, writer = await asyncio.open_connection(*address)
                writer.write(REQUEST)
                with suppress(ConnectionError):
                    answer = await reader.readline() or b"503"
            assert b"200 OK" in answer

    asyncio.run(run())


@pytest.mark.timeout(300)
def test_a_client_that_reads_no_answer_loses_its_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "READ_S", 0.1)

    async def run() -> None:
        gone = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                gone.set()

            watching = asyncio.create_task(watch())
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while not gone.is_set():
                await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
                await asyncio.sleep(0)
            await watching

        async with listening(app) as address:
            _, writer = await asyncio.open_connection(*address, limit=1024)
            writer.write(REQUEST)
            await gone.wait()
            writer.close()

    asyncio.run(run())


def test_the_files_that_connections_need(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, infinite = [100, 1000], resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.__setitem__(0, pair[0]))
    allow_files(40, 80)
    assert limits == [100, 1000]
    allow_files(700, 900)
    assert limits == [900, 1000]
    with pytest.raises(ConfigError, match="may have 1000; use 900 or fewer, or raise `ulimit -Hn`"):
        allow_files(1000, 1100)
    limits[1] = infinite
    allow_files(5000, 6000)
    assert limits == [6000, infinite]
