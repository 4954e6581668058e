"""What a run writes down of its environment."""

from __future__ import annotations

import json
import shlex
import socket
from pathlib import Path

import pytest

from llamax.parallel.rendezvous import Rendezvous
from llamax.training import run_metadata


def test_the_environment_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    product = tmp_path / "product"
    product.write_text("trn1.32xlarge\n")
    monkeypatch.setattr(run_metadata, "PRODUCT", product)
    where = Rendezvous(world_size=128, local_world_size=32, job="4711")
    run_metadata.write(tmp_path, where)
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["nodes"] == 4
    assert found["dollars_per_hour"] == pytest.approx(4 * 21.50)
    assert found["host"] == socket.gethostname()
    assert found["job"] == "4711"
    assert "torch" in found
    product.write_text("Standard PC")
    assert run_metadata.describe(Rendezvous())["dollars_per_hour"] == 0.0


def test_the_command_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train.py", "--run.folder=run a", "--data.path=it's"]
    monkeypatch.setattr("sys.argv", words)
    assert shlex.split(str(run_metadata.describe(Rendezvous())["command"])) == words
