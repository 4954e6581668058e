"""The web application: routes, limits of bodies, keys, and errors in the form of each interface."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamax.inference.serving import openai, tgi
from llamax.inference.serving.bodies import (
    BodyError,
    ChatBody,
    CompletionBody,
    GenerateBody,
    parse,
)
from llamax.inference.serving.openai import Reply, Stream
from llamax.inference.serving.scheduler import Failed, QueueFull, Stopped
from llamax.inference.serving.service import Service, UnknownModel
from llamax.runtime.errors import LlamaxError
from llamax.runtime.json_reader import JsonError, parse_object
from llamax.runtime.logging import logger

BODY_S = 30.0  # a client has so long to send a body
BODIES = 64  # bodies of the largest size that may arrive at once

T = TypeVar("T")


class HttpError(Exception):
    """A request that is refused with a status."""

    def __init__(self, status: int, message: str, field: str = "") -> None:
        super().__init__(message)
        self.status, self.field = status, field


def build_app(service: Service, max_body: int, keys: tuple[str, ...] = ()) -> ASGIApp:
    """The application.

    ``max_body``: largest body in bytes.  ``keys``: one of them must come with each request that
    computes, as ``Authorization: Bearer KEY``; empty: none.
    """

    arriving = Arriving(max_body)

    def route(path: str, answer: Callable[[dict[str, Any]], Awaitable[Reply]]) -> Route:
        async def handle(request: HttpRequest) -> Response:
            try:
                _authorize(request, keys)
                body = await _body(request, arriving)
                return await _respond(request, answer(body), path)
            except Exception as error:
                refusal = _refusal(error)
                if not isinstance(error, ClientDisconnect | Failed):  # whose answers are counted
                    service.scheduler.metrics.ended("refused")
                return _error(refusal, path)

        return Route(path, handle, methods=["POST"])

    async def chat(body: dict[str, Any]) -> Reply:
        return await openai.chat(service, parse(ChatBody, body))

    async def complete(body: dict[str, Any]) -> Reply:
        return await openai.complete(service, parse(CompletionBody, body))

    async def generate(body: dict[str, Any]) -> Reply:
        return await tgi.generate(service, parse(GenerateBody, body), stream=False, listed=False)

    async def generate_stream(body: dict[str, Any]) -> Reply:
        return await tgi.generate(service, parse(GenerateBody, body), stream=True, listed=False)

    async def compatible(body: dict[str, Any]) -> Reply:
        parsed = parse(GenerateBody, body)
        return await tgi.generate(service, parsed, stream=bool(parsed.stream), listed=True)

    async def invoke(body: dict[str, Any]) -> Reply:
        kinds = {"messages": chat, "prompt": complete, "inputs": compatible}
        for name, kind in kinds.items():
            if name in body:
                return await kind(body)
        raise BodyError(f"the body has none of {', '.join(kinds)}; send one")

    async def health(request: HttpRequest) -> Response:
        return Response(status_code=200 if service.scheduler.alive else 503)

    async def info(request: HttpRequest) -> Response:
        return JSONResponse(tgi.info(service))

    async def models(request: HttpRequest) -> Response:
        return JSONResponse(openai.models(service))

    async def model(request: HttpRequest) -> Response:
        try:
            return JSONResponse(openai.model(service, request.path_params["name"]))
        except UnknownModel as error:
            return _error(_refusal(error), "/v1")

    async def metrics(request: HttpRequest) -> Response:
        text = service.scheduler.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def missing(request: HttpRequest, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        words = {404: "is not served", 405: f"takes no {request.method}"}
        refusal = HttpError(status, f"{request.url.path} {words.get(status, 'fails')}")
        response = _error(refusal, "/v1")
        response.headers.update(getattr(error, "headers", None) or {})  # Allow
        return response

    app = Starlette(
        routes=[
            route("/v1/chat/completions", chat),
            route("/v1/completions", complete),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            route("/generate", generate),
            route("/generate_stream", generate_stream),
            route("/", compatible),
            route("/invocations", invoke),
            Route("/info", info),
            Route("/health", health),
            Route("/ping", health),
            Route("/metrics", metrics),
        ],
        exception_handlers={404: missing, 405: missing},
    )
    return app


def _authorize(request: HttpRequest, keys: tuple[str, ...]) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
    # All keys are compared, so the time tells nothing about them.
    if keys and not sum(hmac.compare_digest(given, key.encode()) for key in keys):
        raise HttpError(401, "the key is missing or wrong; send Authorization: Bearer KEY")


class Arriving:
    """Reads bodies of up to ``max_body`` bytes; together they hold up to BODIES times as much."""

    def __init__(self, max_body: int) -> None:
        self.max_body, self._held = max_body, 0

    async def read(self, request: HttpRequest) -> bytes:
        """The body of a request.  Raises HttpError."""
        data = bytearray()
        try:
            async for piece in request.stream():
                data += piece
                self._held += len(piece)
                if len(data) > self.max_body:
                    raise HttpError(413, f"the body has more than {self.max_body} bytes; send less")
                if self._held > BODIES * self.max_body:
                    raise HttpError(429, "too many bodies arrive at once; try again later")
        finally:
            self._held -= len(data)
        return bytes(data)


async def _body(request: HttpRequest, arriving: Arriving) -> dict[str, Any]:
    """The JSON object of a request."""
    try:
        data = await asyncio.wait_for(arriving.read(request), BODY_S)
    except asyncio.TimeoutError:
        raise HttpError(408, f"the body did not arrive in {BODY_S:.0f} s") from None
    try:
        return parse_object(data)
    except JsonError as error:
        raise HttpError(400, f"the body {error}") from None


async def _respond(request: HttpRequest, answer: Awaitable[Reply], path: str) -> Response:
    """The response with an answer."""
    reply = await _unless_gone(answer, request.receive)
    return EventStream(reply, path) if isinstance(reply, Stream) else JSONResponse(reply)


async def _unless_gone(work: Awaitable[T], receive: Receive) -> T:
    """The result of some work, or ClientDisconnect; the work ends when the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(receive: Receive) -> None:
    """Wait until the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; nothing more is computed when the client is gone."""

    media_type = "text/event-stream"

    def __init__(self, stream: Stream, path: str) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self.stream, self.path = stream, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnect):
                await _unless_gone(self._send(send), receive)
        finally:
            self.stream.answers.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self.stream.events:
                await send(_event(event))
        except Exception as error:
            await send(_event(_content(_refusal(error), self.path)))
        await send({"type": "http.response.body", "body": b""})


def _event(event: dict[str, Any] | str) -> Message:
    text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
    return {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True}


def _refusal(error: Exception) -> HttpError:
    """The status and message of an error; what is no mistake of the client is logged."""
    message = str(error).replace("`", "")
    if isinstance(error, HttpError):
        return error
    if isinstance(error, ClientDisconnect):
        return HttpError(499, "the client is gone")
    if isinstance(error, BodyError):
        return HttpError(400, message, error.field)
    if isinstance(error, UnknownModel):
        return HttpError(404, message, "model")
    if isinstance(error, QueueFull):
        return HttpError(429, message)
    if isinstance(error, Failed):
        return HttpError(503 if isinstance(error, Stopped) else 500, message)
    if isinstance(error, LlamaxError):
        return HttpError(400, message)
    logger.error("a request failed", exc_info=error)
    return HttpError(500, f"{type(error).__name__} on the server; see its log")


def _content(error: HttpError, path: str) -> dict[str, Any]:
    """An error in the form of the interface of ``path``."""
    if path.startswith("/v1"):
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        usual = "server_error" if error.status >= 500 else "invalid_request_error"
        kind = kinds.get(error.status, usual)
        inside = {"message": str(error), "type": kind, "param": error.field or None}
        return {"error": inside | {"code": error.status}}
    kinds = {429: "overloaded", 500: "generation", 503: "overloaded"}
    return {"error": str(error), "error_type": kinds.get(error.status, "validation")}


def _error(error: HttpError, path: str) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else None
    return JSONResponse(_content(error, path), error.status, headers)
