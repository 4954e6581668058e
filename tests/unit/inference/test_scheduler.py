"""The scheduler of ``llamax serve``: pieces of prompts, slots and turns, without a server."""

from __future__ import annotations

import queue
import random
import threading
import time
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from support.models import DECIDED

from llamax.inference.sampling import Sampling, generate_tokens, join_steps
from llamax.inference.serving import scheduler as module
from llamax.inference.serving.adapters import Adapters
from llamax.inference.serving.metrics import Metrics
from llamax.inference.serving.scheduler import (
    Failed,
    QueueFull,
    Request,
    Scheduler,
    Step,
    Stopped,
    draw,
)
from llamax.model.llama import Llama

PIECE = 8


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama(DECIDED).init(0).eval()


@pytest.fixture(params=[False, True], ids=["any rows", "few rows"])
def scheduler(
    model: Llama, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Scheduler:
    monkeypatch.setattr(module, "PIECE_TOKENS", PIECE)
    monkeypatch.setattr(module, "TURN_TOKENS", 2 * PIECE)
    monkeypatch.setattr(module, "WIDTHS", (2, PIECE // 2, PIECE))
    monkeypatch.setattr(module, "ROWS", 3)
    made = Scheduler(model, Adapters(), slots=4, length=64, queue=64, metrics=Metrics())
    made._compiles = request.param
    return made


class Asked:
    """A request and the tokens it got."""

    def __init__(self, ids: list[int], new: int) -> None:
        self.tokens: list[int] = []
        self.ended = ""
        self.request = Request(ids, lambda ids: "", self.take, Sampling(), new)

    def take(self, step: Step | Failed) -> None:
        assert isinstance(step, Step), step
        self.tokens.append(step.drawn.token)
        self.ended = step.ended


def prompt(length: int, seed: int) -> list[int]:
    return [random.Random(f"{seed} {i}").randrange(DECIDED.vocab_size) for i in range(length)]


def alone(model: Llama, asked: Asked) -> list[int]:
    """What generate_tokens makes of a request's prompt."""
    return generated(model, tuple(asked.request.ids), asked.request.max_new_tokens)


@cache
def generated(model: Llama, ids: tuple[int, ...], new: int) -> list[int]:
    return join_steps(generate_tokens(model, [list(ids)], max_new_tokens=new))[0]


def turn(scheduler: Scheduler) -> bool:
    """One turn of the thread; whether there is more to do."""
    with torch.inference_mode():
        scheduler._admit()
        scheduler._turn()
    return bool(scheduler._active or scheduler._waiting)


def test_prompts_in_pieces_get_the_tokens_of_generate(model: Llama, scheduler: Scheduler) -> None:
    lengths = [3, 2 * PIECE + 3, 2, PIECE, 5 * PIECE, 1, PIECE + 1, 4, 3 * PIECE]
    every = [Asked(prompt(length, n), 3 + 5 * n % 7) for n, length in enumerate(lengths)]
    scheduler.submit([asked.request for asked in every])
    while turn(scheduler):
        pass
    assert [asked.ended for asked in every] == ["length"] * len(every)
    assert [asked.tokens for asked in every] == [alone(model, asked) for asked in every]


def test_products_that_are_compiled_have_few_numbers_of_rows(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = set()

    def forward(ids_BS: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        shapes.add(tuple(ids_BS.shape))
        return Llama.forward(scheduler.model, ids_BS, *others, **named)

    def step(ids_B1: torch.Tensor, *others: Any) -> torch.Tensor:
        shapes.add(tuple(ids_B1.shape))
        return one_token(ids_B1, *others)

    one_token = scheduler._one_token
    monkeypatch.setattr(scheduler.model, "forward", forward)
    monkeypatch.setattr(scheduler, "_one_token", step)
    lengths = [*range(1, 2 * PIECE + 3), 62, 63, *range(1, 9)]
    scheduler.submit([Asked(prompt(n, n), 1 if n > 30 else 1 + n % 5).request for n in lengths])
    while turn(scheduler):
        pass
    if scheduler._compiles:
        steps = {(3, 1), (4, 1)}  # 63 tokens end in a piece of 7 of the cache's 64 places
        assert shapes <= steps | {(b, w) for b in (1, 2, 4) for w in (2, 4, 8) if b * w <= PIECE}
    else:
        assert len(shapes) > 10


def test_a_client_that_goes_away_changes_no_other_answer(
    model: Llama, scheduler: Scheduler
) -> None:
    """Requests are cancelled while their prompt waits, is computed in pieces, and makes tokens."""
    lengths = [3, 4 * PIECE, 5, 5 * PIECE, 2, 3 * PIECE]
    for left in range(len(lengths)):
        for after in (1, 2, 4, 7):
            every = [Asked(prompt(length, n), 9) for n, length in enumerate(lengths)]
            scheduler.submit([asked.request for asked in every])
            for _ in range(after):
                turn(scheduler)
            gone = every.pop(left)
            gone.request.cancelled = True
            while turn(scheduler):
                pass
            assert len(gone.tokens) < 9
            assert [asked.tokens for asked in every] == [alone(model, asked) for asked in every]


def test_requests_whose_clients_are_gone_take_no_room_in_the_queue(scheduler: Scheduler) -> None:
    every = [Asked(prompt(3, n), 30) for n in range(4 + 64)]
    scheduler.submit([asked.request for asked in every])
    turn(scheduler)
    with pytest.raises(QueueFull):
        scheduler.check_room(1)
    for asked in every[4:]:
        asked.request.cancelled = True
    turn(scheduler)
    scheduler.check_room(64)
    assert b'llamax_requests_total{outcome="cancelled"} 64.0' in scheduler.metrics.text()


class Waiting:
    """A request in another thread, and what ended it."""

    def __init__(self, length: int, new: int) -> None:
        self.ended: queue.Queue[str | Failed] = queue.Queue()
        self.request = Request(prompt(length, 0), lambda ids: "", self.take, Sampling(), new)

    def take(self, step: Step | Failed) -> None:
        if isinstance(step, Failed) or step.ended:
            self.ended.put(step if isinstance(step, Failed) else step.ended)


@pytest.mark.timeout(300)
def test_a_batch_that_fails_ends_its_requests_and_no_others(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device that fails: nothing can be moved in its cache either."""

    def fail(*arguments: object) -> torch.Tensor:
        raise RuntimeError("the device has failed")

    scheduler.start()
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_one_token", fail)
        patch.setattr(scheduler.pool, "move", fail)
        every = [Waiting(3, 9) for _ in range(3)]
        scheduler.submit([each.request for each in every])
        for each in every:
            assert "RuntimeError on the server" in str(each.ended.get(timeout=200))
    further = Waiting(3, 2)
    scheduler.submit([further.request])
    assert further.ended.get(timeout=200) == "length"
    scheduler.stop()


@pytest.mark.timeout(300)
def test_requests_in_progress_and_waiting_are_answered_when_the_scheduler_stops(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    computing = threading.Event()

    def wait_for_the_end(*arguments: Any) -> torch.Tensor:
        computing.set()
        while not scheduler._stopping:
            time.sleep(0.001)
        return one_token(*arguments)

    one_token = scheduler._one_token
    monkeypatch.setattr(scheduler, "_one_token", wait_for_the_end)
    every = [Waiting(3, 60) for _ in range(6)]
    scheduler.submit([each.request for each in every])
    scheduler.start()
    computing.wait()
    scheduler.stop()
    for each in every:
        assert isinstance(each.ended.get_nowait(), Stopped)
    with pytest.raises(Stopped, match="the server is stopping"):
        scheduler.submit([Waiting(3, 1).request])


def test_the_others_make_tokens_while_a_long_prompt_is_computed(scheduler: Scheduler) -> None:
    short, long = Asked(prompt(3, 0), 30), Asked(prompt(6 * PIECE, 1), 1)
    scheduler.submit([short.request])
    turn(scheduler)
    scheduler.submit([long.request])
    made = []
    while not long.tokens:
        turn(scheduler)
        made.append(len(short.tokens))
    assert made[-1] - made[0] == 2  # one for each two pieces


def test_no_prompt_is_overtaken(scheduler: Scheduler) -> None:
    """Requests that end at once make room for further ones, which come after those that wait."""
    every = [Asked(prompt(length, length), 1) for length in (8, 20, 7, 8, 5, 30, 8, 6, 17, 8)]
    scheduler.submit([asked.request for asked in every])
    order = []
    while turn(scheduler):
        order += [n for n, asked in enumerate(every) if asked.ended and n not in order]
    order += [n for n in range(len(every)) if n not in order]
    assert order == [*range(len(every))]


def test_no_piece_is_larger_than_allowed(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    forward = Llama.forward

    def spied(self: Llama, ids_BS: torch.Tensor, *more: object, **named: object) -> torch.Tensor:
        sizes.append(ids_BS.numel())
        return forward(self, ids_BS, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Llama, "forward", spied)
    every = [Asked(prompt(length, length), 1) for length in (1, 2, 3, 4, 30, 7, 50)]
    scheduler.submit([asked.request for asked in every])
    while turn(scheduler):
        pass
    assert max(sizes) <= PIECE


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_p=0.9)], ids=str)
def test_many_tokens_are_drawn_in_parts_as_alone(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_BV = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    requests = [Request([1], str, print, replace(sampling, seed=n), 1) for n in range(7)]
    monkeypatch.setattr(module, "DRAWN_LOGITS", 2 * 50)
    drawn = [each.token for each in draw(requests, logits_BV)]
    alone = [
        int(sampling.pick(logits_BV[n : n + 1], replace(sampling, seed=n).streams(1)))
        for n in range(7)
    ]
    assert drawn == alone
