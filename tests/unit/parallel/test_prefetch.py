"""Gathers that are begun one weight ahead of their use: which, and when they are of no use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llamax.parallel.prefetch import Prefetch


class Shards:
    """A store that notes what it is asked for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.local = name, log, torch.zeros(2)

    def gather(self) -> Tensor:
        self.log.append(f"gather {self.name}")
        return self.local.clone()

    def start_gather(self) -> Callable[[], Tensor]:
        self.log.append(f"start {self.name}")
        whole = self.local.clone()

        def wait() -> Tensor:
            self.log.append(f"wait {self.name}")
            return whole

        return wait


def passed(order: str, prefetch: Prefetch, stores: dict[str, Shards]) -> list[str]:
    """What a pass that uses stores in ``order`` asks of them; their values must be of now."""
    prefetch.begin("step")
    log = next(iter(stores.values())).log
    log.clear()
    for name in order:
        assert torch.equal(prefetch.gather(stores[name]), stores[name].local)
    return list(log)


def some() -> tuple[Prefetch, dict[str, Shards]]:
    log: list[str] = []
    return Prefetch(), {name: Shards(name, log) for name in "abc"}


def test_a_pass_follows_the_order_of_the_one_before() -> None:
    prefetch, stores = some()
    assert passed("abcba", prefetch, stores) == [f"gather {name}" for name in "abcba"]
    assert passed("abcba", prefetch, stores) == [
        "gather a",
        *(f"{what} {name}" for name in "bcba" for what in ("start", "wait")),
    ]
    assert prefetch.hits == 4


def test_nothing_is_begun_before_a_pass() -> None:
    prefetch, stores = some()
    for name in "abab":
        prefetch.gather(stores[name])
    assert stores["a"].log == ["gather a", "gather b"] * 2


def test_a_gather_that_is_not_used_is_waited_for_and_dropped() -> None:
    prefetch, stores = some()
    passed("abc", prefetch, stores)
    departed = ["gather a", "start b", "wait b", "gather c", "start c", "wait c"]
    assert passed("acbc", prefetch, stores)[:4] == departed[:4]


def test_kinds_of_passes_have_orders_of_their_own() -> None:
    prefetch, stores = some()
    passed("abc", prefetch, stores)
    prefetch.begin("validation")
    prefetch.gather(stores["c"])
    assert passed("abc", prefetch, stores)[-1] == "wait c"


def test_a_weight_that_was_written_since_is_gathered_again() -> None:
    prefetch, stores = some()
    passed("aba", prefetch, stores)
    prefetch.begin("step")
    prefetch.gather(stores["a"])  # and begins b
    stores["b"].local.add_(1)
    assert torch.equal(prefetch.gather(stores["b"]), stores["b"].local)
    assert prefetch.hits == 0
