"""A run small enough for seconds: its dataset, its configuration, what it leaves, how it starts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llamax.config.load import dump_config
from llamax.config.schema import CheckpointConfig, Config, DataConfig, OptimConfig, RunConfig
from llamax.config.toml import to_toml
from llamax.data.header import Header
from llamax.data.token_file import TokenWriter
from llamax.parallel import network
from llamax.runtime.files import sha256
from llamax.runtime.process import NO_CACHE
from support.models import TINY as MODEL

STEPS = 6


def make_dataset(folder: Path, tokenizer: bytes = b"a tokenizer") -> Path:
    """Documents of a noisy counting language; small enough that a run enters its second epoch."""
    fingerprint = describe(folder, tokenizer)
    random = np.random.default_rng(0)
    for name, documents in (("train", 9), ("validation", 4)):
        with TokenWriter(
            folder / f"{name}.tokens", Header(fingerprint, MODEL.vocab_size)
        ) as writer:
            for _ in range(documents):
                length = int(random.integers(20, 80))
                start = random.integers(MODEL.vocab_size)
                tokens = (start + np.arange(length) + random.integers(0, 2, length)) % 61
                writer.add(tokens.astype(np.uint16), np.array([length]), length)
    return folder


def describe(folder: Path, tokenizer: bytes) -> str:
    """Make a folder look like a dataset of this tokenizer; its fingerprint."""
    (folder / "tokenizer.model").write_bytes(tokenizer)
    (folder / "dataset.json").write_text(json.dumps({"tokenizer_file": "tokenizer.model"}))
    return hashlib.sha256(tokenizer).hexdigest()


def config(dataset: Path, folder: Path, **run: Any) -> Config:
    return Config(
        model=MODEL,
        optim=OptimConfig(lr=3e-3, warmup_steps=2),
        data=DataConfig(path=str(dataset), sequence_length=32, global_batch=4, micro_batch=1),
        checkpoint=CheckpointConfig(every=1, keep=0),
        run=RunConfig(
            folder=str(folder), steps=STEPS, validate_every=2, progress="off", threads=1, **run
        ),
    )


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The records of a run without times and memory."""
    clock = ("seconds", "step_s", "tokens_per_s", "mfu", "memory_bytes")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: r[key] for key in r if key not in clock} for r in records]


def hashes(folder: Path, step: int) -> dict[str, str]:
    found = (folder / f"checkpoints/step-{step:08d}").glob("*.safetensors")
    return {path.name: sha256(path) for path in sorted(found)}


def forget(folder: Path, step: int) -> None:
    """Leave the run as if it had been killed after the checkpoint of ``step``."""
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(folder / f"checkpoints/step-{later:08d}")


def torchrun(ranks: int, path: Path, *overrides: str) -> subprocess.Popen[str]:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-port", str(free_port())]  # other tests may start jobs at the same time
    return subprocess.Popen(
        [sys.executable, *command, "-m", "llamax.train", "--config", str(path), *overrides],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def fork_ranks(
    ranks: int, *words: str | Path, folder: Path | None = None, by: str = "fork_ranks"
) -> subprocess.Popen[str]:
    """``torchrun`` of a script, or of training, without its program; see ``support.fork_ranks``.

    ``by``: the script of ``support`` that starts the ranks.
    """
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", f"support.{by}", str(ranks), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "GLIBC_TUNABLES": NO_CACHE,  # so that no rank starts anew for it
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        },
    )


RESERVED: list[socket.socket] = []


def free_port() -> int:
    """A TCP port at which nothing listens, reserved among tests until this process ends.

    A job opens its port some seconds after it was chosen; a UDP socket holds the number until then.
    """
    while True:
        holder = socket.socket(type=socket.SOCK_DGRAM)
        try:
            holder.bind(("127.0.0.1", port := network.free_port("")))
        except OSError:
            holder.close()
            continue
        RESERVED.append(holder)
        return port


def write(cfg: Config, path: Path) -> Path:
    path.write_text(dump_config(cfg))
    return path


def write_tables(path: Path, tables: dict[str, Any]) -> Path:
    """Settings by section as a TOML file."""
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {to_toml(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines))
    return path
