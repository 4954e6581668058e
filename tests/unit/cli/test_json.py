"""What commands print with --json: valid JSON with stable keys."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import torch
from support.documented import documented
from support.run_folders import make_run
from support.saving import saved
from support.tiny_run import make_dataset

from llamax.__main__ import dispatch
from llamax.checkpoint.consolidate import consolidate
from llamax.checkpoint.safetensors_io import read_header
from llamax.runtime.errors import LlamaxError
from llamax.runtime.json_writer import to_json

Print = Callable[..., Any]


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Print:
    """The JSON that a command prints."""

    def run(*argv: object, code: int = 0) -> Any:
        capsys.readouterr()
        assert dispatch([*map(str, argv), "--json"]) == code
        out, err = capsys.readouterr()
        assert err == ""
        return json.loads(out, parse_constant=refuse)

    return run


def test_inspect_a_run_a_checkpoint_and_a_folder(tmp_path: Path, printed: Print) -> None:
    model = worlds.llama()
    step = saved(tmp_path, model, torch.bfloat16, 2)
    hub = consolidate(tmp_path, tmp_path / "hub")
    run = printed("inspect", tmp_path, "--verify")
    assert (run["kind"], run["path"], run["checkpoint"]) == ("run", str(tmp_path), str(step))
    assert run["checkpoints"] == ["step-00000003"]
    assert run["step"] == 3
    assert run["mesh"] == {"tensor": 2, "data": 2, "zero": 1}
    assert run["parameters"] == model.num_parameters()
    assert run["model"]["hidden_size"] == 24
    assert {"kind": "master", "dtype": "float32", "count": 21} in run["tensors"]
    assert run["state"]["consumed_sequences"] == 24
    size = sum(path.stat().st_size for path in step.glob("*.safetensors"))
    assert run["files"] == {"count": 8, "bytes": size}
    assert run["verified"] is True
    found = printed("inspect", step)
    assert found["kind"] == "checkpoint"
    assert "verified" not in found
    found = printed("inspect", hub, "--verify")
    assert (found["kind"], found["verified"]) == ("hugging-face", False)
    assert found["tensors"] == [{"kind": "weight", "dtype": "bfloat16", "count": 21}]
    file = printed("inspect", hub / "model.safetensors")
    assert file["kind"] == "safetensors"
    assert file["tensors"] == [{"kind": "tensor", "dtype": "bfloat16", "count": 21}]
    elements = sum(math.prod(one.shape) for one in read_header(hub / "model.safetensors").values())
    assert file["elements"] == elements


def test_inspect_a_dataset_and_a_blend(tmp_path: Path, printed: Print) -> None:
    make_dataset(tmp_path)
    found = printed("inspect", tmp_path)
    assert (found["kind"], found["vocab_size"]) == ("dataset", 61)
    assert found["splits"]["train"]["documents"] == 9
    assert found["splits"]["validation"]["documents"] == 4
    assert found["files"]["count"] == 2
    blend = printed("inspect", f"1 {tmp_path} 3 {tmp_path}")
    assert [each["weight"] for each in blend["datasets"]] == [1, 3]
    assert blend["datasets"][1]["splits"] == found["splits"]


def test_doctor(printed: Print) -> None:
    found = printed("doctor", code=0)
    assert found["ready"] is True
    assert set(found["counts"]) == {"ok", "unknown", "warning", "error"}
    assert sum(found["counts"].values()) == len(found["findings"])
    assert set(found["findings"][0]) == {"level", "name", "what", "why", "fix"}


def test_watch(tmp_path: Path, printed: Print) -> None:
    run = make_run(tmp_path / "tuned", 10, ranks=4, silent=2)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[-1] = lines[-1].replace('"loss": 4.5', '"loss": NaN')
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = printed("watch", run, "--once")
    assert (found["name"], found["step"], found["steps"]) == ("tuned", 10, 40)
    assert found["last"]["loss"] is None
    assert found["last"]["step_s"] == 2.0
    assert [rank["host"] for rank in found["ranks"]] == ["node0", "node0", "node1", "node1"]
    assert found["checkpoints"][0]["step"] == 8
    assert found["dollars_per_hour"] == 36.0
    assert found["environment"]["instance"] == "trn1.32xlarge"
    new = printed("watch", make_run(tmp_path / "new", 0))
    assert (new["last"], new["remaining_s"], new["last_report_s"]) == (None, None, None)


def test_plan(printed: Print) -> None:
    keys = documented("llamax plan") - {"nearest"}
    assert printed("plan", "--config", "llama2-7b").keys() == keys
    over = "plan", "--config", "llama2-7b", "--parallel.tensor=1", "--parallel.sequence=false"
    found = printed(*over, code=6)
    assert found.keys() == keys | {"nearest"}
    assert found["nearest"].keys() == keys | {"flags"}
    found = printed("plan", "--config", "llama2-7b", "--nodes", 4, "--search")
    assert found.keys() == {"layouts"}
    assert all(each.keys() == keys for each in found["layouts"])
    found = printed("plan", "--config", "llama3-8b", "--generate", "4x1024")
    assert found.keys() == documented("llamax plan --generate BATCHxLENGTH")


def test_the_page_lists_the_keys_of_the_other_commands(tmp_path: Path, printed: Print) -> None:
    assert printed("doctor").keys() == documented("llamax doctor")
    found = printed("watch", make_run(tmp_path / "tuned", 10), "--once")
    assert found.keys() == documented("llamax watch RUN --once")
    keys = documented("llamax inspect PATH")
    model = worlds.llama()
    saved(tmp_path, model, torch.bfloat16, 2)
    hub = consolidate(tmp_path, tmp_path / "hub")
    (tmp_path / "data").mkdir()
    make_dataset(tmp_path / "data")
    blend = f"1 {tmp_path / 'data'} 3 {tmp_path / 'data'}"
    printed_keys = {
        key
        for path in (tmp_path, hub, hub / "model.safetensors", tmp_path / "data", blend)
        for key in printed("inspect", path, "--verify")
    }
    assert printed_keys <= keys
    assert keys - printed_keys <= {"adapters", "base", "peft_settings"}, "of adapters"


@pytest.mark.parametrize("command", ["inspect", "watch"])
def test_an_error_stays_an_error(tmp_path: Path, command: str) -> None:
    with pytest.raises(LlamaxError):
        dispatch([command, str(tmp_path / "none"), "--json"])


def test_numbers_that_json_lacks_are_null() -> None:
    values = {"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": Path("/x"), 1: (True, None)}
    assert json.loads(to_json(values), parse_constant=refuse) == {
        "a": None,
        "b": [None, None, 1.5],
        "c": "/x",
        "1": [True, None],
    }
    assert to_json("\x1b\u202e\udcff") == '"\\u001b\\u202e\\udcff"'
