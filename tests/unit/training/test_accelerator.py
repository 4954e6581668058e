"""Steps and answers on a stand-in for a GPU: one device, no wait in a step, what nccl takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.scripts import run_script
from torch.utils import backend_registration

DATA = {"dp": 2}
BOTH = {"tp": 2, "dp": 2}
ADAPTERS = {"method": "lora", "dropout": 0.1}
QLORA = {"method": "qlora", "double_quant": True}
CASES: dict[str, dict[str, Any]] = {
    "alone": {},
    "bfloat16": {"dtype": "bfloat16", "documents": True, "recompute": "selective"},
    "no zero": {"mesh": BOTH, "zero": 0, "sequence": False},
    "zero 2": {"mesh": BOTH, "zero": 2, "dtype": "float16", "optim": {"skip_spikes": "both"}},
    "zero 3": {"mesh": {"tp": 2, "dp": 4, "shard": 2}, "zero": 3, "dtype": "bfloat16"},
    "key/value replicas": {"mesh": {"tp": 4, "kv": 2}, "documents": True},
    "gathered context": {"mesh": {"cp": 2, "dp": 2}, "documents": True, "dtype": "bfloat16"},
    "ring": {"mesh": {"cp": 2}, "context_by": "ring", "documents": True, "recompute": "full"},
    "pipeline": {"mesh": {"pp": 2, "tp": 2}, "dtype": "bfloat16"},
    "offload": {"mesh": DATA, "optim": {"offload": True, "state_bits": 8}, "dtype": "bfloat16"},
    "adapters": {"mesh": {"tp": 2}, "finetune": ADAPTERS, "dtype": "bfloat16"},
    "nf4": {"mesh": BOTH, "finetune": QLORA, "dtype": "bfloat16", "recompute": "full"},
    "int8": {"mesh": DATA, "finetune": {"method": "qlora", "quant": "int8"}},
    "answers": {"mesh": {"tp": 2}, "answers": True, "dtype": "bfloat16"},
    "float32 answers": {"answers": True, "dtype": "float32"},
}
DEFECTS = {
    "waits": ("waits", "_to_copy"),
    "stays on the host": ("error", "same device"),
    "sends from the host": ("refused", "all_reduce of a tensor on cpu"),
}


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="a torch without plug-in devices in Python",
)
def test_a_step_has_one_device_and_waits_for_nothing() -> None:
    planted = [{"mesh": DATA, "planted": name} for name in DEFECTS]
    results = json.loads(run_script("accelerator", json.dumps([*CASES.values(), *planted])))
    for name, found in zip(CASES, results[: len(CASES)], strict=True):
        wrong = found["error"] + found["waits"] + found["refused"]
        assert not wrong, (name, wrong)
        assert bool(found["sent"]) == bool(CASES[name].get("mesh")), (name, found["sent"])
    for (name, (kind, words)), found in zip(DEFECTS.items(), results[len(CASES) :], strict=True):
        assert any(words in line for line in found[kind]), (name, found)
