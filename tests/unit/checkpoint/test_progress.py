"""Every conversion reports the amount of its work first, and then all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
from support.format_checks import saved

from llamax.checkpoint.formats.convert import import_checkpoint
from llamax.checkpoint.formats.export import export

NXD = {"to": "nxd", "tensor": 2, "pipeline": 2}


class Counted:
    """The amount of work announced, and the amount reported."""

    def __init__(self) -> None:
        self.total, self.unit, self.done = 0, "B", 0

    def start(self, total: int, unit: str = "B") -> None:
        self.total, self.unit = total, unit

    def update(self, amount: int) -> None:
        self.done += amount


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("options", "unit"),
    [
        ({"to": "hf"}, "B"),
        ({"to": "meta", "tensor": 2}, "tensor"),
        ({**NXD, "optimizer": "none"}, "tensor"),
        ({**NXD, "data": 3, "optimizer": "zero1"}, "tensor"),
        ({**NXD, "optimizer": "zero1-masters"}, "tensor"),
    ],
)
def test_export(tmp_path: Path, options: dict[str, Any], unit: str, tied: bool) -> None:
    model, work = worlds.llama(tied=tied, vocabulary=40), Counted()
    run = saved(tmp_path, model, worlds.wholes(model))
    export(run, tmp_path / "out", started=work.start, progress=work.update, **options)
    assert (work.done, work.unit) == (work.total, unit)
    assert work.total > 10


@pytest.mark.parametrize("to", ["hub", "llamax"])
def test_import(tmp_path: Path, to: Any) -> None:
    model = worlds.llama(vocabulary=40)
    export(saved(tmp_path, model, worlds.wholes(model)), tmp_path / "meta", to="meta")
    work = Counted()
    import_checkpoint(
        tmp_path / "meta", tmp_path / "out", to=to, started=work.start, progress=work.update
    )
    assert 0 < work.done == work.total
