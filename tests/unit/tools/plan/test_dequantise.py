"""The time to make a base of QLoRA dense, against the operations that do it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import MODEL, base_folder
from support.runs import share as share_of
from torch.utils._python_dispatch import TorchDispatchMode

from llamax.checkpoint.build_model import load_base
from llamax.checkpoint.hf_folder import open_source
from llamax.config.hardware import load_machine
from llamax.config.load import load_config
from llamax.config.schema import FinetuneConfig
from llamax.model.llama import Llama
from llamax.model.qlora import Int8, Nf4
from llamax.model.recompute import Recompute
from llamax.parallel.collectives import Solo
from llamax.parallel.mesh import Mesh
from llamax.tools.plan.roofline import microstep

A100 = load_machine("p4d.24xlarge")
LARGE = replace(MODEL, hidden_size=512, intermediate_size=1024, num_hidden_layers=1)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write; views move none."""

    num_bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        flat = [each for arg in args for each in (arg if isinstance(arg, list) else [arg])]
        read = [each for each in flat if isinstance(each, torch.Tensor)]
        written = result.untyped_storage().data_ptr()
        is_view = any(each.untyped_storage().data_ptr() == written for each in read)
        if function._schema.is_mutable or not is_view:
            self.num_bytes += sum(each.nbytes for each in (*read, result))
        return result


def planned_bytes(quant: str, dtype: str, recompute: Recompute = "none") -> float:
    """Of a weight, in a microstep."""
    settings = {"run.dtype": dtype, "run.recompute": recompute, "finetune.quant": quant}
    settings |= {"finetune.method": "qlora", "checkpoint.init_from": "base"}
    config = load_config("llama2-7b", [f"--{key}={value}" for key, value in settings.items()])
    share = share_of(config, Mesh())
    lines = {line.name: line.value for line in microstep(share, A100)}
    return lines["dequantise"] * A100.memory_rate() / (share.layers * share.layer_weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_planned_bytes_are_those_of_the_operations(tmp_path: Path, quant: str, dtype: str) -> None:
    model = Llama(LARGE, Solo("tp"), device="meta")
    finetune = FinetuneConfig(method="qlora", quant=quant)  # type: ignore[arg-type]
    like = torch.empty(0, dtype=getattr(torch, dtype))
    load_base(
        model, open_source(base_folder(tmp_path / "base", LARGE)), finetune, like, Solo("data")
    )
    stores = [store for each in model.modules() if (store := getattr(each, "store", None))]
    for store in stores:
        store.weight()  # tables are made once
    with Traffic() as traffic:
        elements = sum(store.weight().numel() for store in stores)
    assert 2 * traffic.num_bytes / elements == pytest.approx(planned_bytes(quant, dtype), rel=0.05)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_step_makes_each_weight_dense_as_often_as_planned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quant: str, recompute: Recompute
) -> None:
    kind: Any = Nf4 if quant == "nf4" else Int8
    model = Llama(MODEL, Solo("tp"), device="meta", recompute=recompute)
    finetune = FinetuneConfig(method="qlora", quant=quant)  # type: ignore[arg-type]
    load_base(
        model, open_source(base_folder(tmp_path / "base")), finetune, torch.empty(0), Solo("data")
    )
    made, weight = [], kind.weight
    monkeypatch.setattr(kind, "weight", lambda store: made.append(store) or weight(store))
    ids = torch.randint(MODEL.vocab_size, (2, 9))
    loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    times = planned_bytes(quant, "float32", recompute) / planned_bytes(quant, "float32") * 2
    assert len(made) == 4 * MODEL.num_hidden_layers * times - 1  # the first input has no gradient
