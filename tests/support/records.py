"""Records of training steps."""

from __future__ import annotations

import json
from pathlib import Path

from llamax.training.metrics import Record

RECORD = Record(
    step=7,
    consumed_tokens=28672,
    seconds=3.5,
    step_s=0.5,
    loss=2.25,
    grad_norm=1.5,
    lr=3e-4,
    tokens_per_s=8192.0,
    mfu=0.375,
    memory_bytes=3 * 2**29,
)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]
