"""Contenders in processes of their own that take turns, one training step each.

    team = Team(Job("ours:train"))        one process per rank
    team.step()                           one step of all its ranks: seconds, loss

A worker is ``python -m peers.race``: it reads commands from stdin and answers in JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from statistics import fmean, median
from typing import Any

from llamax.runtime.process import NO_CACHE

BENCHMARKS = Path(__file__).resolve().parents[1]


class TeamError(Exception):
    """A contender that did not come up, or fell: the last line it said."""


class Team:
    """One contender: its workers, and what its steps took.

    ``tree``: another checkout of llamax that it runs from.
    """

    def __init__(
        self, name: str, job: Any, paths: Sequence[str] = (), tree: Path | None = None
    ) -> None:
        self.name, self.job = name, job
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[float] = []
        port = free_port()
        folders = [str(tree), str(tree / "benchmarks")] if tree else [str(BENCHMARKS)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *folders])}
        environment["OMP_NUM_THREADS"] = str(job.threads)
        if job.keep_heap or job.contender.startswith("ours"):  # as the training program starts
            environment["GLIBC_TUNABLES"] = NO_CACHE
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  as long as the team
        self.workers = [
            subprocess.Popen(
                [sys.executable, "-m", "peers.race", json.dumps(_chosen(mine))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.said,
                text=True,
                env=environment,
                cwd=tree,  # which comes before PYTHONPATH
            )
            for mine in (dataclasses.replace(job, rank=r, port=port) for r in range(job.ranks))
        ]
        for worker in self.workers:
            self._answer(worker)

    def _ask(self, command: str) -> list[Any]:
        for worker in self.workers:
            print(command, file=worker.stdin, flush=True)
        return [self._answer(worker) for worker in self.workers]

    def _answer(self, worker: subprocess.Popen[str]) -> Any:
        assert worker.stdout is not None
        line = worker.stdout.readline()
        if not line:
            self.stop()
            self.said.seek(0)
            lines = [line for line in self.said.read().splitlines() if "Error" in line]
            raise TeamError(lines[0] if lines else "it died")
        return json.loads(line)

    def step(self) -> None:
        """One step; the slowest rank counts, and the mean of the ranks' losses."""
        answers = self._ask("step")
        self.seconds.append(max(answer["seconds"] for answer in answers))
        self.cpu_seconds.append(max(answer["cpu"] for answer in answers))
        self.losses.append(fmean(answer["loss"] for answer in answers))

    def matmul_flops(self) -> float:
        """FLOP/s of large fp32 products on all ranks at once, right now."""
        return float(sum(self._ask("matmul")))

    def peak_bytes(self) -> list[int]:
        """Peak resident set of each rank."""
        return self._ask("memory")

    def stop(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()

    def typical(self, clock: str, first: int) -> float:
        """Median seconds of a step, from step ``first`` on, counted from 0."""
        return median((self.seconds if clock == "wall" else self.cpu_seconds)[first:])


def _chosen(job: Any) -> dict[str, Any]:
    """The fields of a job that are not as by default: older checkouts do not know all of them."""
    fields = dataclasses.asdict(job).items()
    defaults = {field.name: field.default for field in dataclasses.fields(job)}
    return {name: value for name, value in fields if value != defaults[name]}


def free_port() -> int:
    """A TCP port of the loopback that nobody has."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _peak_bytes() -> int:
    """VmHWM: unlike getrusage's figure it forgets the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def work(options: dict[str, Any]) -> None:
    """A worker's life: build the contender, then one answer a command."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    from llamax.backends import cpu
    from peers.job import Job

    job = Job(**options)
    torch.set_num_threads(job.threads)
    if job.keep_heap:
        cpu.keep_heap()
    module, _, function = job.contender.partition(":")
    step = getattr(import_module(f"peers.{module}"), function)(job)
    print(json.dumps("ready"), file=out, flush=True)
    number = 0
    for command in sys.stdin:
        answer: Any
        if command == "step\n":
            number += 1
            started = time.perf_counter(), time.process_time()
            loss = step(number)
            seconds, used = time.perf_counter() - started[0], time.process_time() - started[1]
            answer = {"seconds": seconds, "cpu": used / job.threads, "loss": loss}
        elif command == "matmul\n":
            answer = cpu._probe.__wrapped__(torch.float32, job.threads)
        else:
            answer = _peak_bytes()
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
