"""What one client of ``llamax serve`` cannot do to the others: bounds of bodies and connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch
import uvicorn
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from llamax.inference.sampling import Sampling
from llamax.inference.serving import connection
from llamax.inference.serving.app import BODIES, Arriving, HttpError
from llamax.inference.serving.scheduler import Request, draw


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


@pytest.mark.timeout(300)
@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1\r\nHost:"])
def test_a_connection_without_a_request_is_closed(
    monkeypatch: pytest.MonkeyPatch, head: bytes, answered: bool
) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.1)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Response()(scope, receive, send)

    async def run() -> None:
        config = uvicorn.Config(app, timeout_keep_alive=1000, log_config=None)
        config.load()
        state, loop = ServerState(), asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: connection.Connection(config, state, {}), "127.0.0.1", 0
        )
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            if answered:
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            writer.write(head or b"G" * answered)
            assert await reader.read() == b""
            writer.close()

    asyncio.run(run())
