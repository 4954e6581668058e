"""Real jobs of the training program for the drills: started, watched, signalled, read."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from llamax.config.schema import CheckpointConfig, Config
from support import tiny_run

TRAIN = [sys.executable, "-m", "llamax.train", "--config"]
PATIENT_S = 300  # longer than a busy machine takes to start ranks one after another


def config(
    dataset: Path, folder: Path, steps: int, timeout_s: int = PATIENT_S, **checkpoint: Any
) -> Config:
    """A small run of ``steps`` that gives up on a silent or late rank after ``timeout_s``."""
    whole = tiny_run.config(dataset, folder)
    run = replace(whole.run, steps=steps, timeout_s=timeout_s, validate_every=0)
    return replace(whole, run=run, checkpoint=CheckpointConfig(**checkpoint))


class Job:
    """A launcher and its ranks; ``stderr`` holds all that they say."""

    started: ClassVar[list[Job]] = []

    def __init__(self, command: list[str], folder: Path) -> None:
        self.folder, self.stderr = folder, folder.parent / (folder.name + ".stderr")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.stderr, "ab") as file:
            self.process = subprocess.Popen(
                command, stderr=file, stdout=file, env=environment, start_new_session=True
            )
        self.started.append(self)

    def ranks(self) -> list[int]:
        """The process ids of the ranks that are there, in rank order."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
                environment = (stat.parent / "environ").read_bytes()
                words = (stat.parent / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if int(fields[1]) == self.process.pid and b"--ranks" in words:  # forked in their order
                found[int(stat.parent.name)] = int(stat.parent.name)
            elif int(fields[1]) == self.process.pid and b"llamax.train" in words:
                rank = re.search(rb"(?:^|\0)(?:RANK|OMPI_COMM_WORLD_RANK)=(\d+)", environment)
                if rank:
                    found[int(rank[1])] = int(stat.parent.name)
        return [found[rank] for rank in sorted(found)]

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait for a condition; an error if the job ends or hangs before."""
        deadline = time.monotonic() + PATIENT_S
        while not holds():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def wait_for_ranks(self, ranks: int) -> list[int]:
        """The ranks, when each of them listens to signals: Python has run its first lines."""
        found: list[int] = []

        def listen() -> bool:
            found[:] = [pid for pid in self.ranks() if listens(pid)]
            return len(found) >= ranks

        self.wait_until(listen)
        return found

    def steps(self) -> int:
        """Steps that the log holds."""
        log = self.folder / "metrics.jsonl"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def wait_for_steps(self, steps: int) -> None:
        self.wait_until(lambda: self.steps() >= steps)

    def rank_log(self, rank: int) -> str:
        """What a rank has written into its log file."""
        return "".join(path.read_text() for path in self.folder.glob(f"logs/*/rank-{rank:05d}.log"))

    def end(self) -> int:
        """The launcher's exit code; all of it is killed if it hangs."""
        try:
            return self.process.wait(PATIENT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end within {PATIENT_S} s: {self.said()}") from None

    def kill(self) -> None:
        """End all of it, if it has not ended."""
        for pid in (*self.ranks(), self.process.pid) if self.process.poll() is None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def said(self) -> str:
        return self.stderr.read_text(errors="replace")

    def ours(self) -> list[str]:
        """What llamax itself said."""
        return [line for line in self.said().splitlines() if line.startswith("llamax: ")]

    def checkpoints(self) -> list[str]:
        found = sorted((self.folder / "checkpoints").glob("step-*/done"))
        return [path.parent.name for path in found]


def listens(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"SigCgt:\s*([0-9a-f]+)", status)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def runs(pid: int) -> bool:
    """Whether a process has not ended, even if nobody has asked how."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def alone(path: Path, folder: Path, *overrides: str) -> Job:
    return Job([*TRAIN, str(path), *overrides], folder)


def local_ranks(ranks: int, path: Path, folder: Path, *overrides: str) -> Job:
    """``llamax train --ranks N``."""
    command = [sys.executable, "-m", "llamax", "train", "--ranks", str(ranks), "--config"]
    return Job([*command, str(path), *overrides], folder)


def torchrun(
    ranks: int, path: Path, folder: Path, *overrides: str, restarts: int = 0, ending_s: int = 30
) -> Job:
    """``ending_s``: torchrun's time from a signal until it kills the ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    launcher += ["--shutdown-timeout", str(ending_s)]
    launcher += ["--max-restarts", str(restarts), "--master-port", str(tiny_run.free_port())]
    return Job([*launcher, "-m", "llamax.train", "--config", str(path), *overrides], folder)


def nodes(count: int, path: Path, folder: Path, *overrides: str) -> list[Job]:
    """As many nodes as ``count``, each an agent of torchrun's with one rank."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    launcher += ["--nnodes", str(count), "--master-addr", "127.0.0.1"]
    launcher += ["--master-port", str(tiny_run.free_port())]
    program = ["-m", "llamax.train", "--config", str(path), *overrides]
    return [Job([*launcher, "--node-rank", str(node), *program], folder) for node in range(count)]


def mpirun(ranks: int, path: Path, folder: Path, *overrides: str) -> Job:
    """The ranks under Open MPI.

    It is given 20 s between SIGTERM and SIGKILL, which it always waits, and more than once.
    """
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    launcher += ["--mca", "odls_base_sigkill_timeout", "20", "-n", str(ranks)]
    launcher += ["-x", "OMP_NUM_THREADS", "-x", f"MASTER_PORT={tiny_run.free_port()}"]
    return Job([*launcher, *TRAIN, str(path), *overrides], folder)


def has_mpirun() -> bool:
    return shutil.which("mpirun") is not None
