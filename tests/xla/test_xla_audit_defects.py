"""A defect that is planted in a traced run is found and named with its line of Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

import torch
import torch_xla.core.xla_model as xm
from support.audited_runs import audited, tiny
from torch import Tensor

from llamax.backends.tracing import HostRead, Tracer
from llamax.optim.groups import Group
from llamax.optim.zero import Zero
from llamax.parallel import tensor_parallel
from llamax.parallel.rendezvous import Rendezvous
from llamax.tools.audit import hlo

HERE = Path(__file__).name

Ids = tuple[Tensor, Tensor]


def rank_as_a_number(ids: Tensor, rows: int, axis: Any) -> Ids:
    local = ids - torch.full_like(ids, axis.rank * rows)  # planted: rank
    outside = (local < 0) | (local >= rows)
    return torch.where(outside, torch.zeros_like(local), local), outside


STEP = Zero.step
NUMBER = iter(range(1, 1000))


def state_made_in_the_first_step(self: Zero, *args: Tensor) -> Tensor:
    if not hasattr(self, "average"):
        self.average = torch.zeros((), device=args[0].device)  # planted: lazy state
    norm = STEP(self, *args)
    self.average = self.average + norm
    return norm


def step_as_a_number(self: Zero, lr: Tensor, step: Tensor, scale: Tensor) -> Tensor:
    return STEP(self, lr, torch.full_like(step, next(NUMBER)), scale)  # planted: step


def read_in_the_step(self: Zero, lr: Tensor, step: Tensor, scale: Tensor) -> Tensor:
    return STEP(self, lr, step, scale * 2 if scale.item() > 1 else scale)  # planted: read


def in_double(self: Zero, lr: Tensor, step: Tensor, scale: Tensor) -> Tensor:
    return STEP(self, lr, step, scale.double().float())  # planted: double


def line_of(mark: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    at = next(n for n, line in enumerate(lines, 1) if line.endswith(f"# planted: {mark}"))
    return f"{HERE}:{at}"


@pytest.mark.parametrize(
    ("mark", "kind", "owner", "name", "instead"),
    [
        ("rank", "microstep", tensor_parallel, "local_ids", rank_as_a_number),
        ("lazy state", "update", Zero, "step", state_made_in_the_first_step),
        ("step", "update", Zero, "step", step_as_a_number),
        ("double", "update", Zero, "step", in_double),
    ],
)
def test_a_planted_defect_is_named_with_its_line(
    data: Path, mark: str, kind: str, owner: Any, name: str, instead: Callable[..., Any]
) -> None:
    with mock.patch.object(owner, name, instead):
        found = audited(tiny(data))
    assert not found.passes
    assert f"the {kind} program" in found.problems[0]
    assert line_of(mark) in found.problems[0]
    assert "\n" not in found.problems[0]


NEAR, FAR = [[0, 1], [2, 3]], [[0, 2], [1, 3]]  # groups of ranks


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            lambda x: xm.all_reduce("sum", x, groups=NEAR),
            lambda x: xm.all_reduce("sum", x, groups=FAR),
        ),
        (lambda x: xm.all_gather(x, groups=NEAR), lambda x: xm.all_gather(x, groups=FAR)),
        (
            lambda x: xm.reduce_scatter("sum", x, 1.0, 0, 2, groups=NEAR),
            lambda x: xm.reduce_scatter("sum", x, 1.0, 0, 2, groups=FAR),
        ),
        (
            lambda x: xm.all_to_all(x, 0, 0, 2, groups=NEAR),
            lambda x: xm.all_to_all(x, 0, 0, 2, groups=FAR),
        ),
        (
            lambda x: xm.collective_permute(x, NEAR),
            lambda x: xm.collective_permute(x, FAR),
        ),
        (lambda x: x[:2], lambda x: x[2:]),
        (
            lambda x: x + torch.arange(4, device=x.device),
            lambda x: x + torch.arange(1, 5, device=x.device),
        ),
        (lambda x: x.clamp(0, 1), lambda x: x.clamp(0, 2)),
        (lambda x: x**2, lambda x: x**3),
        (lambda x: x.bfloat16(), lambda x: x.half()),
    ],
)
def test_graphs_with_another_program_have_another_hash(one: Any, other: Any) -> None:
    """So that a rank's graph is not taken for that of another rank."""
    tracer = Tracer(Rendezvous(), debug=False)

    def text(function: Any) -> str:
        x = torch.zeros(4, 4, device=tracer.device)
        tracer.clear_pending()
        _ = function(x)
        return hlo.normal(tracer.record())

    with mock.patch.object(tracer.runtime, "_WORLD_SIZE", 4):
        first, again, second = text(one), text(one), text(other)
    assert first == again
    assert first != second
    assert len(tracer._texts) == 2, "a graph is lowered once for each program"


def test_a_value_read_in_the_step_is_named_with_its_line(data: Path) -> None:
    with (
        mock.patch.object(Zero, "step", read_in_the_step),
        pytest.raises(HostRead, match=f"{line_of('read')} reads a device value"),
    ):
        audited(tiny(data))
    assert audited(tiny(data)).passes, "and the next audit starts afresh"


def test_saving_that_computes_is_named_with_its_line(data: Path) -> None:
    def cut_on_the_device(self: Group) -> Iterator[Any]:
        yield self.buckets[0].master[:3].cpu()  # planted: cut

    with (
        mock.patch.object(Group, "owned", cut_on_the_device),
        pytest.raises(HostRead, match=line_of("cut")),
    ):
        audited(tiny(data))
