"""HTTP connections that are limited in number and wait for no client without end; their end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 30.0  # a client has so long to send the head of a request
READ_S = 60.0  # a client has so long to take what the system holds of an answer
REFUSED_S = 1.0  # a client that is refused has so long to read why
REFUSED = 128  # connections that may be refused at once
GRACE_S = 30.0  # requests in progress may go on for so long after a signal
ERROR_S = 5.0  # the others have so long to send their error
SPARE_FILES = 512  # what a server opens beside the connections that it serves
BUSY = b'{"error": "too many open connections; try again later", "error_type": "overloaded"}'
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\nRetry-After: 1\r\nConnection: close\r\n\r\n%s" % (len(BUSY), BUSY)
)


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection; it ends where a client sends or takes nothing for long.

    uvicorn itself waits for ever, so that clients which send nothing, or read no answer, would hold
    all connections.  With ``limit`` of them open a further one gets status 503 and is closed.
    """

    def __init__(self, *arguments: Any, limit: int, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.limit = limit
        self._late: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head, or refuse the connection."""
        if len(self.connections) >= self.limit:
            refuse(transport)
            return
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # ``pause_writing`` as soon as the client falls behind
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take bytes; they begin, continue or end a head, or belong to a body."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        self._stop()
        self._forgive()

    def pause_writing(self) -> None:
        """Begin to wait for a client that takes less than it is sent."""
        super().pause_writing()
        self._stuck = self.loop.call_later(READ_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Wait no more for a client that has taken everything so far."""
        super().resume_writing()
        self._forgive()

    def _watch(self) -> None:
        """Run the timer while there is no request in progress."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_S, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _forgive(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None


class _Refused(asyncio.Protocol):
    """A connection that has its answer and whose bytes are thrown away until it is closed."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it no more."""
        _refused.discard(self)


_refused = set[_Refused]()


def refuse(transport: asyncio.Transport) -> None:
    """Answer with status 503 whatever the client sends; at most REFUSED at once, others nothing."""
    transport.set_protocol(protocol := _Refused())
    if len(_refused) >= REFUSED:
        transport.abort()
        return
    _refused.add(protocol)
    transport.write(REFUSAL)
    # Closed at once, the system would reset the connection, and the client could lose the answer.
    asyncio.get_running_loop().call_later(REFUSED_S, transport.abort)


class Server(uvicorn.Server):
    """uvicorn's server, whose requests get an answer also at its end.

    uvicorn itself cuts off those that take longer than it waits for.  ``end``: makes them end with
    an error; called once they had GRACE_S, or after a second signal.
    """

    def __init__(self, config: uvicorn.Config, end: Callable[[], None]) -> None:
        super().__init__(config)
        self._end = end
        config.timeout_graceful_shutdown = int(GRACE_S + ERROR_S)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and wait for the requests in progress."""
        asyncio.get_running_loop().call_later(GRACE_S, self._end)
        await super().shutdown(sockets)
        self._end()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=ERROR_S)
