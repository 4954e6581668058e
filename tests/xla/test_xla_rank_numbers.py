"""The audit traces a rank only where its trace may differ from those of the ranks before it."""

from __future__ import annotations

import copy
import json
import math
import operator
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

import numpy as np
import torch
from support.runs import on_mesh
from support.tiny_run import config, make_dataset
from torch import Tensor

from llamax.config.hardware import load_machine
from llamax.config.schema import ParallelConfig
from llamax.parallel import tensor_parallel
from llamax.parallel.mesh import Mesh, Seat
from llamax.tools.audit.auditor import all_groups, audit_run
from llamax.tools.audit.rank_numbers import ORDINAL, STAGE, Places, RankNumber, Watch
from llamax.tools.audit.report import AuditReport

MESH = Mesh(tp=4, dp=2)
LOCAL_IDS = tensor_parallel.local_ids


def audited(folder: Path, vocab_size: int = 512) -> AuditReport:
    cfg = config(make_dataset(folder), folder / "run", backend="xla")
    model = replace(cfg.model, vocab_size=vocab_size)
    parallel = ParallelConfig(tensor=MESH.tp, bucket_bytes=8192)
    cfg = replace(cfg, model=model, parallel=parallel)
    return audit_run(on_mesh(cfg, MESH), load_machine("trn1.32xlarge"))


# --- numbers that note their use


def number(value: int = 3) -> tuple[Any, Places]:
    used: Places = {}
    return RankNumber(value, {"tp": value}, used), used


@pytest.mark.parametrize(
    "use",
    [
        int,
        float,
        bool,
        str,
        repr,
        hash,
        math.floor,
        operator.index,
        copy.deepcopy,
        lambda x: f"{x:03d}",
        lambda x: x == 3,
        lambda x: x < 4,
        lambda x: operator.gt(4, x),
        lambda x: min(x, 5) + 0,
        lambda x: divmod(x, 2),
        lambda x: x / 2,
        lambda x: 2**x,
        lambda x: x.bit_length(),
        lambda x: x.real,
        lambda x: {3: "three"}[x],
        lambda x: "abcdef"[x],
        lambda x: "abcdef"[x - 1 : 2 * x],
        lambda x: (x + 1) * 2.5,
        lambda x: list(range(x)),
        lambda x: [5] * x,
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: np.arange(x).tolist(),
        lambda x: (np.ones(2) * x).tolist(),
        lambda x: torch.full((2,), x).tolist(),
        lambda x: torch.full_like(torch.ones(2), x * 4).tolist(),
        lambda x: (torch.ones(2) * x).tolist(),
        lambda x: (x * torch.ones(2)).tolist(),
        lambda x: torch.arange(9)[2 * x :].tolist(),
        lambda x: torch.arange(9)[x].item(),
        lambda x: x < 3.5,
        lambda x: 2.5 * x,
        lambda x: 7 % x + 0.5,
        lambda x: 7 - x == 4,
        lambda x: divmod(7, x),
        lambda x: 7 // x + 1.5,
        lambda x: round(x),
        lambda x: abs(-x),
        lambda x: -x < 0,
        lambda x: 1 << x,
        lambda x: x & 1,
        lambda x: Seat(x, 4) == Seat(3, 4),
    ],
)
def test_a_use_of_the_value_is_noted_and_gives_what_an_int_gives(use: Callable[[Any], Any]) -> None:
    counted, used = number()
    assert use(counted) == use(3)
    assert used == {"tp": 3}


@pytest.mark.parametrize("use", [json.dumps, lambda x: torch.zeros(x, 2)])
def test_what_takes_ints_alone_cannot_learn_the_value(use: Callable[[Any], Any]) -> None:
    """The audit then traces every rank."""
    with pytest.raises(TypeError):
        use(number()[0])


def test_passing_on_and_computing_are_no_use() -> None:
    counted, used = number()
    made = 2 * (counted + 1) // 3 - counted % 2
    assert isinstance(made, int)
    assert Seat(made, 4).size == 4
    other = RankNumber(1, {"data": 1}, used)
    both = counted * 8 + other
    assert used == {}
    assert both == 25
    assert used == {"tp": 3, "data": 1}
    assert made == 1


def test_a_watch_knows_the_ranks_that_agree_on_all_that_was_used() -> None:
    watch = Watch(MESH, all_groups(MESH))
    places = watch.places(5)
    assert {axis: places[axis] for axis in ("tp", "data", STAGE, ORDINAL)} == {
        "tp": 1,
        "data": 1,
        STAGE: 0,
        ORDINAL: 5,
    }
    assert not watch.knows(0)
    watch.note({"data": 0, STAGE: 0})
    assert [watch.knows(rank) for rank in range(8)] == [True] * 4 + [False] * 4
    watch.note({"data": 1, "tp": 2})
    assert [rank for rank in range(8) if watch.knows(rank)] == [0, 1, 2, 3, 6]
    assert (watch.traced, watch.used) == (2, ["data", "stage", "tp"])


def test_a_trace_that_uses_nothing_is_that_of_every_rank() -> None:
    watch = Watch(MESH, all_groups(MESH))
    watch.note({})
    assert all(map(watch.knows, range(8)))


# --- audits


def test_ranks_that_differ_in_nothing_that_is_used_are_not_traced(tmp_path: Path) -> None:
    report = audited(tmp_path)
    assert report.passes, report.problems
    assert report.ranks[1] == (
        "all 8 do so with 2 layers: 2 are traced, and their traces use data and stage of a rank's "
        "places in the mesh; the others agree with one of them there"
    )


def test_ranks_whose_shares_are_padded_by_their_place_are_all_traced(tmp_path: Path) -> None:
    report = audited(tmp_path, vocab_size=509)
    assert report.passes, report.problems
    assert report.ranks[1] == "all 8 do so with 2 layers"


def only_rank_2(ids: Tensor, rows: int, axis: Any) -> tuple[Tensor, Tensor]:
    local, elsewhere = LOCAL_IDS(ids, rows, axis)
    return (local + 0 if axis.rank == 2 else local), elsewhere


def by_its_global_rank(ids: Tensor, rows: int, axis: Any) -> tuple[Tensor, Tensor]:
    import torch_xla.runtime as runtime

    local, elsewhere = LOCAL_IDS(ids, rows, axis)
    return local + (1 if runtime.global_ordinal() == 2 else 2), elsewhere


@pytest.mark.parametrize("planted", [only_rank_2, by_its_global_rank])
def test_a_rank_that_is_no_corner_and_differs_is_found(tmp_path: Path, planted: Any) -> None:
    with mock.patch.object(tensor_parallel, "local_ids", planted):
        (divergence,) = audited(tmp_path).divergences
    assert divergence.where == "rank 2"
    assert divergence.expected == "rank 0"


def written_down(ids: Tensor, rows: int, axis: Any) -> tuple[Tensor, Tensor]:
    json.dumps({"rank": axis.rank})  # takes ints alone
    return LOCAL_IDS(ids, rows, axis)


def test_every_rank_is_traced_where_something_takes_ints_alone(tmp_path: Path) -> None:
    with mock.patch.object(tensor_parallel, "local_ids", written_down):
        report = audited(tmp_path)
    assert report.passes, report.problems
    assert report.ranks[1] == "all 8 do so with 2 layers"
