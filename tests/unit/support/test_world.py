"""The pool of ranks itself: results, failures, deaths and hangs, each reported with its rank."""

from __future__ import annotations

import os
import time

import pytest
import torch
from support.world import WorldError, Worlds, axes

from llamax.parallel.mesh import Mesh


def place(base: int) -> tuple[int, int, int]:
    at = axes(Mesh(tp=2, dp=2))
    total = at.world.all_reduce(torch.tensor([float(base + at.world.rank)]))
    return at.data.rank, at.tp.rank, int(total)


def threads() -> tuple[int, float]:
    return torch.get_num_threads(), float(torch.rand(()))


def process_id() -> int:
    return os.getpid()


def fails_on(rank: int) -> None:
    at = axes(Mesh(tp=2))
    if at.tp.rank == rank:
        raise RuntimeError("the wheel came off")
    at.tp.all_reduce(torch.ones(1))


def dies_on(rank: int) -> None:
    at = axes(Mesh(tp=2))
    if at.tp.rank == rank:
        os._exit(7)
    at.tp.all_reduce(torch.ones(1))


def hangs_on(rank: int) -> None:
    if axes(Mesh(tp=2)).tp.rank == rank:
        time.sleep(600)


def test_results_come_in_rank_order(worlds: Worlds) -> None:
    assert worlds(4).run(place, 10) == [(0, 0, 46), (0, 1, 46), (1, 0, 46), (1, 1, 46)]


def test_every_call_starts_alike(worlds: Worlds) -> None:
    first, second = worlds(2).run(threads), worlds(2).run(threads)
    assert first == second
    assert first[0] == first[1]
    assert first[0][0] == 1


def test_a_failure_shows_the_traceback_and_the_pool_recovers(worlds: Worlds) -> None:
    with pytest.raises(WorldError) as caught:
        worlds(2).run(fails_on, 1)
    assert "rank 1 of 2 failed in fails_on" in str(caught.value)
    assert "the wheel came off" in str(caught.value)
    assert worlds(2).run(threads)


def test_a_death_is_named(worlds: Worlds) -> None:
    with pytest.raises(WorldError, match="rank 0 of 2 failed in dies_on\ndied, exit code 7"):
        worlds(2).run(dies_on, 0)


def test_a_hang_is_named_with_its_stack(worlds: Worlds) -> None:
    worlds(2).run(hangs_on, 2)  # neither hangs, and both have imported all that they need
    with pytest.raises(WorldError) as caught:
        worlds(2).run(hangs_on, 1, timeout_s=4.0)
    assert "rank 1 of 2 hung for 4 s in hangs_on" in str(caught.value)
    assert "rank 0" not in str(caught.value)
    assert "in hangs_on" in str(caught.value)


def test_ranks_are_started_once(worlds: Worlds) -> None:
    assert worlds(4).run(process_id) == worlds(4).run(process_id)
