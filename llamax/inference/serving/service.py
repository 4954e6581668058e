"""The models of a server, and their answers as asynchronous streams of steps."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from llamax.inference.engine import LoadedModel, split_stops
from llamax.inference.sampling import SEEDS, sampling_of
from llamax.inference.serving.formatter import Formatter, PromptIds
from llamax.inference.serving.scheduler import Failed, Request, Scheduler, Step
from llamax.runtime.errors import ConfigError, LlamaxError
from llamax.runtime.units import count

ANY_MODEL = ("tgi", "dummy")  # with which clients of TGI mean the model of the server


class UnknownModel(LlamaxError):
    """A model that the server does not have."""


class Served:
    """A model under its name: the base, or adapters beside it."""

    def __init__(self, loaded: LoadedModel, adapter: str, template: str) -> None:
        self.loaded, self.adapter = loaded, adapter
        self.formatter = Formatter(loaded, template)
        self.sampling = sampling_of(loaded.generation)
        self.special = {number: name for name, number in loaded.tokenizer.special.items()}

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token, which those of the next may complete; a special token's name."""
        if (name := self.special.get(token)) is not None:
            return name.encode()
        return self.loaded.tokenizer.token_bytes(token)

    def token_text(self, token: int) -> str:
        """The text of a token alone: U+FFFD for half a character."""
        return self.token_bytes(token).decode(errors="replace")


@dataclass(frozen=True)
class RequestSettings:
    """The settings of a request's answers; what is None is the model's or the server's."""

    max_new_tokens: int | None = None
    usual_new_tokens: int | None = None
    """Largest number of new tokens of the interface, where a request sets none."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    """Any whole number, as OpenAI and TGI have it; those that differ by SEEDS are one."""
    stops: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    top: int | None = None
    """Number of log-probabilities beside that of a new token; None: no log-probability."""
    answers: int = 1


class Answers:
    """The steps of a request's answers, as they are made; a client that goes away cancels them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._steps = asyncio.Queue[tuple[int, Step | Failed]]()
        self.requests: list[Request] = []

    def put(self, number: int, step: Step | Failed) -> None:
        """Add a step of an answer, from the scheduler's thread."""
        self._loop.call_soon_threadsafe(self._steps.put_nowait, (number, step))

    async def steps(self) -> AsyncIterator[tuple[int, Step]]:
        """(number of the answer, step); raises Failed if one of them fails, and ends all."""
        left = len(self.requests)
        try:
            while left:
                number, step = await self._steps.get()
                if isinstance(step, Failed):
                    raise step
                left -= bool(step.ended)
                yield number, step
        finally:
            self.cancel()

    async def gather(self) -> list[list[Step]]:
        """All steps of each answer."""
        found: list[list[Step]] = [[] for _ in self.requests]
        async for number, step in self.steps():
            found[number].append(step)
        return found

    def cancel(self) -> None:
        """Compute no more of them."""
        for request in self.requests:
            request.cancelled = True


class Service:
    """Answers requests with the models of a server; ``name`` is that of the base.

    ``max_new_tokens``: largest number of new tokens of a request; 0: what the cache takes.
    """

    def __init__(
        self, scheduler: Scheduler, models: Mapping[str, Served], name: str, max_new_tokens: int = 0
    ) -> None:
        self.scheduler, self.models, self.name = scheduler, models, name
        self.max_new_tokens = max_new_tokens or scheduler.length

    def model(self, name: str | None) -> Served:
        """The model of a name.  Raises UnknownModel."""
        if not name or (name in ANY_MODEL and name not in self.models):
            return self.models[self.name]
        if name not in self.models:
            raise UnknownModel(f"there is no model {name!r:.60}; use {' or '.join(self.models)}")
        return self.models[name]

    def check_room(self, count: int) -> None:
        """Raise QueueFull if there is no room for ``count`` answers; call it before any work."""
        self.scheduler.check_room(count)

    def answers(
        self, served: Served, prompts: Sequence[PromptIds], settings: RequestSettings
    ) -> Answers:
        """``settings.answers`` answers to each prompt, which begin to be computed.

        Raises ConfigError for a setting out of range, and QueueFull.
        """
        tokenizer = served.loaded.tokenizer
        texts, named = split_stops(tokenizer, settings.stops)
        drawn = ("temperature", "top_k", "top_p")
        given: dict[str, Any] = {
            name: value for name in drawn if (value := getattr(settings, name)) is not None
        }
        seed = secrets.randbits(32) if settings.seed is None else settings.seed
        answers = Answers()
        for prompt in prompts:
            length = self._new_tokens(served, prompt, settings)
            for _ in range(settings.answers):
                number = len(answers.requests)
                request = Request(
                    prompt.ids,
                    tokenizer.decode,
                    partial(answers.put, number),
                    replace(served.sampling, **given, seed=(seed + number) % SEEDS),
                    length,
                    texts,
                    {*prompt.stop_ids, *named, *settings.stop_ids},
                    tokenizer.vocab_size,
                    served.adapter,
                    settings.top,
                )
                answers.requests.append(request)
        self.scheduler.submit(answers.requests)
        return answers

    def _new_tokens(self, served: Served, prompt: PromptIds, settings: RequestSettings) -> int:
        """The largest number of new tokens; raises ConfigError if it or the prompt is too large."""
        size = served.loaded.model.vocab_size
        if strange := [i for i in prompt.ids if not 0 <= i < size]:
            raise ConfigError(
                f"the prompt has token {strange[0]}; the model has ids 0 to {size - 1}"
            )
        length, limit = self.scheduler.length, self.max_new_tokens
        free = length - len(prompt.ids)
        if free < 1:
            raise ConfigError(
                f"the prompt has {count(len(prompt.ids), 'token')}, and the server takes {length} "
                "with the answer; send a shorter one"
            )
        most, asked = min(free, limit), settings.max_new_tokens
        if asked is None:
            return min(most, settings.usual_new_tokens or most)
        if asked > most:
            raise ConfigError(
                f"{asked} new tokens are too many for this prompt of "
                f"{count(len(prompt.ids), 'token')}: the server takes {length} together and makes "
                f"{limit}; ask for at most {most}"
            )
        return asked
