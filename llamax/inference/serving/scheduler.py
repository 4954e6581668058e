"""Continuous batching: one thread that computes the next token of all requests in progress.

::

    turn 1   prefill a, b        step a b
    turn 2   prefill c           step a b c        c waits for no end of a or b
    turn 3                       step a b c        b ends: c takes its slot
    turn 4                       step a c

A long prompt is computed in pieces, which bounds the memory of its activations, and the others make
tokens between them.  A request gets the tokens that ``llamax generate`` draws for it alone with the
same seed.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from llamax import ops
from llamax.data.tokenizer.streaming import Detokenizer
from llamax.inference.kv_pool import KVPool
from llamax.inference.one_token import one_token
from llamax.inference.sampling import Sampling
from llamax.inference.serving.adapters import Adapters
from llamax.inference.serving.metrics import Metrics
from llamax.model.int8 import NEVER, Int8Linear, integer_rows
from llamax.model.llama import Llama
from llamax.runtime.errors import LlamaxError
from llamax.runtime.logging import logger

PIECE_TOKENS = 256  # prompts are padded and computed together up to so many tokens
TURN_TOKENS = 512  # of prompts, after which the requests in progress make a token
WIDTHS = (16, 32, 64, 128, 192, 256)  # of pieces, where each number of rows is compiled
ROWS = 16  # there, requests that make tokens are computed in multiples of so many
DRAWN_LOGITS = 2**17  # logits from which tokens are drawn at once; bounds the copies
NOT_FINITE = "the model's logits are not finite; serve an earlier checkpoint"
STOPPED = "the server is stopping; try again later"


class QueueFull(LlamaxError):
    """More requests wait than the server takes."""


class Failed(LlamaxError):
    """A request that is not computed to its end; the message is for its client."""


class Stopped(Failed):
    """A request that the server had no more time for before it stopped."""


class Drawn(NamedTuple):
    """A token, its log-probability and the most likely ones with theirs, if they were asked for."""

    token: int
    logprob: float = 0.0
    top: Sequence[tuple[int, float]] = ()


class Step(NamedTuple):
    """A new token of a request.

    ``text``: what is certain after it, perhaps nothing.  ``ended``: "stop" (a stop text), "eos" (a
    token that ends answers), "length", or "" while the request goes on.
    """

    drawn: Drawn
    text: str
    ended: str = ""


@dataclass(eq=False)
class Request:
    """A prompt to be continued.

    ``on_step`` is called on the scheduler's thread for each new token, or with an error, after
    which nothing follows.  ``top``: number of log-probabilities beside that of the
    drawn token; None: no log-probability at all.
    """

    ids: Sequence[int]
    decode: Callable[[list[int]], str]
    on_step: Callable[[Step | Failed], None]
    sampling: Sampling
    max_new_tokens: int
    stops: Sequence[str] = ()
    stop_ids: Collection[int] = ()
    vocab_size: int | None = None
    adapter: str = ""
    top: int | None = None
    cancelled: bool = False
    filled: int = 0
    made: int = 0
    last: int = 0
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.writer = Detokenizer(self.decode, self.ids, self.stops)
        (self.stream,) = self.sampling.streams(1)

    @property
    def length(self) -> int:
        """The number of places that are filled in the cache."""
        return self.filled + max(0, self.made - 1)

    @property
    def waits(self) -> bool:
        """Whether a part of the prompt is not in the cache yet."""
        return self.filled < len(self.ids)

    def step(self, drawn: Drawn) -> Step:
        """Take the next token."""
        self.made, self.last = self.made + 1, drawn.token
        if drawn.token in self.stop_ids:
            return Step(drawn, self.writer.finish(), "eos")
        text, ended = self.writer.feed(drawn.token), ""
        if not self.writer.stopped and self.made == self.max_new_tokens:
            text, ended = text + self.writer.finish(), "length"
        return Step(drawn, text, "stop" if self.writer.stopped else ended)


class Scheduler:
    """Runs requests in batches of up to ``slots``; ``queue`` more may wait.

    A request and its answer have at most ``length`` tokens together.
    """

    def __init__(
        self,
        model: Llama,
        adapters: Adapters,
        slots: int,
        length: int,
        queue: int,
        metrics: Metrics,
    ) -> None:
        self.model, self.adapters, self.metrics = model, adapters, metrics
        self.slots, self.length, self.queue = slots, length, queue
        self.pool, self._one_token = KVPool(model, slots, length), one_token(model)
        weight = next(model.parameters())
        in_bfloat16 = weight.dtype == torch.bfloat16 and ops.has_bf16_units()
        in_int8 = isinstance(model.lm_head, Int8Linear) and integer_rows() < NEVER
        self._compiles = weight.device.type == "cpu" and (in_bfloat16 or in_int8)
        self._waiting: deque[Request] = deque()
        self._active: list[Request] = []
        metrics.watch(self._active, self._waiting)
        self._prefilled = 0  # tokens of prompts since the last step
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="llamax-scheduler", daemon=True)

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def end(self) -> None:
        """End the thread after its present step; requests that are not done get Stopped."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def stop(self) -> None:
        """End the thread, and wait until it has ended."""
        self.end()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are computed."""
        return self._thread.is_alive()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all or none of them; raises what ``check_room`` raises."""
        with self._changed:
            self.check_room(len(requests))
            self._waiting.extend(requests)
            self._changed.notify()

    def check_room(self, count: int) -> None:
        """Raise QueueFull if there is no room for ``count`` requests, Stopped at the end."""
        if self._stopping:
            raise Stopped(STOPPED)
        active, waiting = len(self._active), len(self._waiting)
        if count > self.slots - active + self.queue - waiting:
            raise QueueFull(
                f"{active} requests are in progress and {waiting} wait; try again later"
            )

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._turns()
        finally:
            with self._changed:
                self._stopping = True
                for requests in (self._active, self._waiting):
                    self._fail_all(requests, Stopped(STOPPED))

    def _turns(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self._active or self._waiting):
                    self._changed.wait()
                if self._stopping:
                    return
                self._admit()
            try:
                self._turn()
            except Exception as error:  # it ends the requests of its batch, not the server
                logger.exception("a batch failed")
                message = f"{type(error).__name__} on the server; see its log"
                self._fail_all(self._active, Failed(message))

    def _admit(self) -> None:
        """Take waiting requests into free slots; those whose clients are gone are dropped."""
        for request in [request for request in self._waiting if request.cancelled]:
            self._waiting.remove(request)
            self._count(request, "cancelled")
        while self._waiting and len(self._active) < self.slots:
            self._active.append(self._waiting.popleft())

    def _turn(self) -> None:
        """Compute a piece of the prompts that wait, or one more token of each request."""
        for request in [request for request in self._active if request.cancelled]:
            self._end(request, "cancelled")
        waiting = [request for request in self._active if request.waits]
        if waiting and (self._prefilled < TURN_TOKENS or len(waiting) == len(self._active)):
            self._prefill(waiting)
        elif self._active:
            self._prefilled = 0
            self._decode(self._active[: len(self._active) - len(waiting)])

    def _prefill(self, waiting: Sequence[Request]) -> None:
        """Compute the first of the prompts that wait, or a piece of a long one."""
        start, (requests, width) = waiting[0].filled, self._batch(waiting)
        device = self.model.tp.rank_index.device
        pieces = [request.ids[start : start + width] for request in requests]
        padded = [[*piece, *[0] * (width - len(piece))] for piece in pieces]
        last_B = torch.tensor([len(piece) - 1 for piece in pieces], device=device)
        positions_1S = torch.arange(start, start + width, device=device)[None]
        slots = [self._active.index(request) for request in requests]
        self.adapters.choose([request.adapter for request in requests])
        ids_BS = torch.tensor(padded, device=device)
        attend = self.pool.prefill(slots, start)
        logits_B1V = self.model(ids_BS, positions_1S, attend=attend, last_B=last_B)
        for request, piece in zip(requests, pieces, strict=True):
            request.filled += len(piece)
            self._prefilled += len(piece)
            self.metrics.prefilled(len(piece))
        if not requests[0].waits:
            self._deliver(requests, logits_B1V[:, 0])

    def _batch(self, waiting: Sequence[Request]) -> tuple[list[Request], int]:
        """The first requests whose prompts are computed together, and the width of their pieces.

        oneDNN compiles products of bfloat16 and int8 for each number of rows and keeps them, some
        2 MiB for a model, so there are few numbers: 1, 2, 4, ... pieces of one of WIDTHS.
        """
        requests: list[Request] = []
        width = 0
        for request in waiting:
            wider = max(width, min(len(request.ids) - request.filled, PIECE_TOKENS))
            if self._compiles:
                wider = next(each for each in WIDTHS if each >= wider)
            is_long = len(request.ids) > PIECE_TOKENS  # it is computed alone
            if requests and (is_long or wider * (len(requests) + 1) > PIECE_TOKENS):
                break
            requests.append(request)
            width = wider
            if is_long:
                break
        if self._compiles:
            requests = requests[: 1 << (len(requests).bit_length() - 1)]
        return requests, min(width, self.length - requests[0].filled)

    def _decode(self, requests: Sequence[Request]) -> None:
        rows = len(requests)
        if self._compiles:
            rows = min(-(-rows // ROWS) * ROWS, self.slots)
        computed = self._active[:rows]  # the rest writes to places that are filled before use
        free = [[0]] * (rows - len(computed))
        places = [[request.length] for request in computed] + free
        device = self.model.tp.rank_index.device
        positions_B1 = torch.tensor(places, device=device)
        tokens_B1 = torch.tensor([[request.last] for request in computed] + free, device=device)
        width = 1 + max(place for (place,) in places)
        self.adapters.choose([request.adapter for request in requests])
        logits_B1V = self._one_token(tokens_B1, positions_B1, self.pool, width)
        self._deliver(requests, logits_B1V[: len(requests), 0])

    def _deliver(self, requests: Sequence[Request], logits_BV: Tensor) -> None:
        """Draw the next token of each request and hand it over."""
        lowest_B, highest_B = logits_BV.aminmax(dim=-1)  # NaN where there is one
        finite = (lowest_B.isfinite() & highest_B.isfinite()).tolist()
        rows = [row for row, is_finite in enumerate(finite) if is_finite]
        kept = [requests[row] for row in rows]
        drawn = draw(kept, logits_BV if all(finite) else logits_BV[rows])
        steps = [request.step(token) for request, token in zip(kept, drawn, strict=True)]
        for request, step in zip(kept, steps, strict=True):
            self.metrics.token(request.made == 1, time.perf_counter() - request.began)
            self._send(request, step)
            if step.ended:
                self._end(request, step.ended)
        for request, is_finite in zip(requests, finite, strict=True):
            if not is_finite:
                self._send(request, Failed(NOT_FINITE))
                self._end(request, "failed")

    def _fail_all(self, requests: MutableSequence[Request], error: Failed) -> None:
        for request in requests:
            self._send(request, error)
            self._count(request, "failed")
        requests.clear()

    def _send(self, request: Request, step: Step | Failed) -> None:
        try:
            request.on_step(step)
        except RuntimeError:  # the event loop of the web server has ended
            request.cancelled = True

    def _count(self, request: Request, outcome: str) -> None:
        self.metrics.ended(outcome, time.perf_counter() - request.began)

    def _end(self, request: Request, outcome: str) -> None:
        """Free the slot of a request.

        Requests that make tokens stay before those that wait, which keep their order.
        """
        self._count(request, outcome)
        hole = self._active.index(request)
        making = sum(not each.waits for each in self._active)
        for source in range(making - 1, len(self._active)):
            if source > hole:
                moved = self._active[hole] = self._active[source]
                if moved.length:
                    self.pool.move(source, hole, moved.length)
                hole = source
        self._active.pop()


def draw(requests: Sequence[Request], logits_BV: Tensor) -> list[Drawn]:
    """The next token of each request; those with the same settings are drawn together."""
    drawn = [Drawn(0)] * len(requests)
    at_once = max(1, DRAWN_LOGITS // logits_BV.shape[1])
    alike: dict[tuple[Sampling, int | None], list[int]] = defaultdict(list)
    for row, request in enumerate(requests):
        alike[replace(request.sampling, seed=0), request.vocab_size].append(row)
    for (sampling, vocab_size), rows in alike.items():
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            streams = [requests[row].stream for row in part]
            tokens_R = sampling.pick(logits_BV[part, :vocab_size], streams)
            for row, token in zip(part, tokens_R.tolist(), strict=True):
                drawn[row] = Drawn(token)
    for row, request in enumerate(requests):
        if request.top is not None:
            logprobs_V = logits_BV[row, : request.vocab_size].float().log_softmax(-1)
            best = logprobs_V.topk(min(request.top, len(logprobs_V)))
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            token = drawn[row].token
            drawn[row] = Drawn(token, float(logprobs_V[token]), top)
    return drawn
