"""Damaged folders of other trainers are read or refused with a LlamaxError, without a traceback."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import support.foreign as foreign
import support.foreign_megatron as foreign_megatron
import torch

from llamax.checkpoint.formats.convert import check_dtypes, open_folder
from llamax.runtime.errors import LlamaxError

MODEL = worlds.llama(kv=2, vocabulary=40, layers=1)
JUNK = (
    None, -1, 0, 7, 1 << 80, 1.5, float("nan"), "x", "", [], {}, (), [1, 2], {"a": 1}, {0: 2},
    torch.ones(3), torch.ones(2, 2, 2), torch.tensor(1), torch.ones(0), torch.bfloat16, True,
)  # fmt: skip
PLAIN = tuple(value for value in JUNK if value is None or isinstance(value, (int, str, list, dict)))


def containers(held: Any) -> list[Any]:
    """All dicts and lists in a structure."""
    found = [held] if isinstance(held, (dict, list)) else []
    inner = held.values() if isinstance(held, dict) else held if isinstance(held, list) else ()
    for value in inner:
        found += containers(value)
    return found


def mutated(held: Any, draw: random.Random, junk: tuple[Any, ...]) -> Any:
    """One value replaced or taken away, somewhere."""
    target = draw.choice([one for one in containers(held) if one])
    key = draw.choice([*target]) if isinstance(target, dict) else draw.randrange(len(target))
    if isinstance(target, dict) and draw.random() < 0.2:
        del target[key]
    else:
        target[key] = draw.choice(junk)
    return held


def read_all(folder: Path, config: str) -> None:
    line = ""
    try:
        source = open_folder(folder, "auto", config)
        check_dtypes(source)
        for name in source.shapes:
            for kind in source.kinds:
                whole = source.read(name, kind)
                assert tuple(whole.shape) == source.shapes[name]
                assert whole.dtype == source.dtype(name, kind)
    except LlamaxError as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 700


@pytest.mark.parametrize("what", ["model", "optim", "info", "metadata", "params", "config"])
def test_mutations(tmp_path: Path, what: str) -> None:
    draw = random.Random(what)
    values = worlds.wholes(MODEL, torch.bfloat16)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(MODEL.to_hub("bfloat16")))
    if what in ("params", "config"):
        sound = foreign_megatron.meta(tmp_path / "sound", values, MODEL)
    elif what == "metadata":
        sound = foreign.optimum(tmp_path / "sound", values, MODEL, 2, 1)
    else:
        sound = foreign.nxd(tmp_path / "sound", values, MODEL, 2, dp=2, xser=what == "info")
    name = {
        "model": "model/dp_rank_00_tp_rank_01_pp_rank_00.pt",
        "optim": "optim/dp_rank_00_tp_rank_00_pp_rank_00.pt",
        "info": "model/dp_rank_00_tp_rank_00_pp_rank_00.pt.info.pt",
        "metadata": "shards/mp_metadata_pp_rank_0.json",
        "params": "params.json",
        "config": "../config.json",
    }[what]
    given = "" if what == "params" else str(config)
    read_all(sound, given)
    for _ in range(15 if what == "info" else 40):
        folder = tmp_path / "mutated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        path = folder / name
        if path.suffix == ".json":
            held = json.loads((sound / name if what != "config" else config).read_text())
            text = json.dumps(mutated(held, draw, PLAIN))
            changed = tmp_path / "changed.json" if what == "config" else path
            changed.write_text(text)
            read_all(folder, str(changed) if what == "config" else given)
        else:
            if what == "info" and draw.random() < 0.5:
                (
                    path.with_name(path.name.removesuffix(".info.pt") + ".tensors") / "tensor_2.pt"
                ).unlink()
            torch.save(mutated(torch.load(path, weights_only=False), draw, JUNK), path)
            read_all(folder, given)
