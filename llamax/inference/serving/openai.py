"""OpenAI's interface: ``/v1/chat/completions``, ``/v1/completions`` and ``/v1/models``."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

from llamax.inference.serving.bodies import BodyError, ChatBody, CompletionBody, OpenAIBody
from llamax.inference.serving.formatter import PromptIds
from llamax.inference.serving.scheduler import Drawn, Step
from llamax.inference.serving.service import Answers, RequestSettings, Served, Service

Events = AsyncIterator[dict[str, Any] | str]


class Stream(NamedTuple):
    """The events of a reply, and the answers that they show."""

    events: Events
    answers: Answers


Reply = dict[str, Any] | list[Any] | Stream
"""A JSON value, or a stream."""

DONE = "[DONE]"
COMPLETION_TOKENS = 16  # OpenAI's default for text completions
REASONS = {"eos": "stop", "stop": "stop", "length": "length", "": None}


def models(service: Service) -> dict[str, Any]:
    """The models of the server."""
    return {"object": "list", "data": [model(service, name) for name in service.models]}


def model(service: Service, name: str) -> dict[str, Any]:
    """A model of the server.  Raises UnknownModel."""
    adapter = service.model(name).adapter
    return {
        "id": adapter or service.name,
        "object": "model",
        "created": 0,
        "owned_by": "llamax",
        "max_model_len": service.scheduler.length,
        **({"parent": service.name} if adapter else {}),
    }


async def chat(service: Service, body: ChatBody) -> Reply:
    """The next message of a conversation."""
    served = service.model(body.model)
    service.check_room(body.n or 1)
    prompt = served.formatter.conversation(body.messages)
    if body.top_logprobs and not body.logprobs:
        raise BodyError("top_logprobs needs logprobs=true", "top_logprobs")
    top = (body.top_logprobs or 0) if body.logprobs else None
    length = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    answers = service.answers(served, [prompt], settings_of(body, length, top))
    writer = ChatWriter(served, body.model or service.name, top is not None)
    return await reply(writer, body, [prompt], answers)


async def complete(service: Service, body: CompletionBody) -> Reply:
    """Continuations of texts or ids."""
    served, given = service.model(body.model), _prompts(body)
    service.check_room(len(given) * (body.n or 1))
    prompts = [
        PromptIds(list(each), served.loaded.ends)
        if isinstance(each, list)
        else served.formatter.text(each)
        for each in given
    ]
    settings = settings_of(body, body.max_tokens, body.logprobs)
    answers = service.answers(
        served, prompts, replace(settings, usual_new_tokens=COMPLETION_TOKENS)
    )
    writer = TextWriter(served, body.model or service.name, body.logprobs is not None)
    return await reply(writer, body, prompts, answers)


def _prompts(body: CompletionBody) -> Sequence[str | list[int]]:
    """The prompts of a body, each a text or ids."""
    prompt: Any = body.prompt or ""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def settings_of(body: OpenAIBody, length: int | None, top: int | None) -> RequestSettings:
    """The settings of a body's answers."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return RequestSettings(
        length,
        temperature=body.temperature,
        top_k=body.top_k if body.top_k != -1 else 0,  # vLLM's "all"
        top_p=body.top_p,
        seed=body.seed,
        stops=[stop for stop in stops if stop],
        stop_ids=body.stop_token_ids or (),
        top=top,
        answers=body.n or 1,
    )


class Writer(ABC):
    """Writes answers as objects of OpenAI's interface."""

    object, chunk = "text_completion", "text_completion"
    prefix = "cmpl"

    def __init__(self, served: Served, model: str, logprobs: bool) -> None:
        self.served = served
        self.head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self.logprobs = logprobs

    @abstractmethod
    def whole(self, index: int, steps: Sequence[Step]) -> dict[str, Any]:
        """A choice that is complete."""

    @abstractmethod
    def piece(self, index: int, step: Step) -> dict[str, Any]:
        """A choice of a chunk."""

    def first(self, index: int) -> dict[str, Any] | None:
        """The choice of a chunk before the first token, if there is one."""
        return None


class ChatWriter(Writer):
    """Messages of the assistant."""

    object, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def whole(self, index: int, steps: Sequence[Step]) -> dict[str, Any]:
        text = "".join(step.text for step in steps)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(steps),
            "finish_reason": REASONS[steps[-1].ended],
        }

    def first(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, step: Step) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": step.text} if step.text else {},
            "logprobs": self._logprobs([step]),
            "finish_reason": REASONS[step.ended],
        }

    def _logprobs(self, steps: Sequence[Step]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = []
        for step in steps:
            drawn = step.drawn
            content.append(
                self._entry(drawn.token, drawn.logprob)
                | {"top_logprobs": [self._entry(*each) for each in drawn.top]}
            )
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        found = self.served.token_bytes(token)
        text = found.decode(errors="replace")
        return {"token": text, "logprob": logprob, "bytes": list(found)}


class TextWriter(Writer):
    """Continuations of texts."""

    def __init__(self, served: Served, model: str, logprobs: bool) -> None:
        super().__init__(served, model, logprobs)
        self._offsets: dict[int, int] = defaultdict(int)  # of the next token of each choice

    def whole(self, index: int, steps: Sequence[Step]) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(step.text for step in steps),
            "logprobs": self._logprobs(index, [step.drawn for step in steps]),
            "finish_reason": REASONS[steps[-1].ended],
        }

    def piece(self, index: int, step: Step) -> dict[str, Any]:
        return self.whole(index, [step])

    def _logprobs(self, index: int, drawn: Sequence[Drawn]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        token_text = self.served.token_text
        tokens = [token_text(each.token) for each in drawn]
        offsets = [*accumulate(map(len, tokens), initial=self._offsets[index])]
        self._offsets[index] = offsets.pop()
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in drawn],
            "top_logprobs": [self._most_likely(each) for each in drawn],
            "text_offset": offsets,
        }

    def _most_likely(self, drawn: Drawn) -> dict[str, float]:
        """Log-probabilities by text, the drawn token among them; of one text the most likely."""
        found: dict[str, float] = {}
        for token, logprob in (*drawn.top, (drawn.token, drawn.logprob)):
            found.setdefault(self.served.token_text(token), logprob)
        return found


async def reply(
    writer: Writer, body: OpenAIBody, prompts: Sequence[PromptIds], answers: Answers
) -> Reply:
    """The reply to a request whose answers are being computed."""
    prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
    if body.stream:
        options = body.stream_options or {}
        include_usage = bool(options.get("include_usage"))
        return Stream(_events(writer, prompt_tokens, answers, include_usage), answers)
    steps = await answers.gather()
    choices = [writer.whole(index, each) for index, each in enumerate(steps)]
    return {
        **writer.head,
        "object": writer.object,
        "choices": choices,
        "usage": usage(prompt_tokens, sum(map(len, steps))),
    }


async def _events(
    writer: Writer, prompt_tokens: int, answers: Answers, include_usage: bool
) -> Events:
    """The events of a stream, of all answers as they come."""

    def chunk(choices: list[dict[str, Any]], used: dict[str, int] | None = None) -> dict[str, Any]:
        head = {**writer.head, "object": writer.chunk, "choices": choices}
        return head | ({"usage": used} if include_usage else {})

    for index in range(len(answers.requests)):
        if (first := writer.first(index)) is not None:
            yield chunk([first])
    made = 0
    async for index, step in answers.steps():
        made += 1
        yield chunk([writer.piece(index, step)])
    if include_usage:
        yield chunk([], usage(prompt_tokens, made))
    yield DONE


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """The tokens of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }
