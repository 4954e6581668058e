"""OMP_NUM_THREADS decides about threads and processes, unless torchrun has set it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llamax.runtime.cores import cores, limit_threads, requested_threads, workers


@pytest.mark.parametrize(
    ("value", "threads"), [("3", 3), (" 2 ", 2), ("4,2", 4), ("1", 1), ("", 0), ("x", 0), ("-1", 0)]
)
def test_the_first_number_counts(value: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert requested_threads() == threads
    assert workers() == (threads or cores())
    limit_threads()
    assert os.environ.get("RAYON_NUM_THREADS") == (str(threads) if threads else None)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert (requested_threads(), workers()) == (0, cores())


RANK = "from llamax.runtime.cores import requested_threads; print(requested_threads())"
TORCHRUN = """
import os, subprocess, sys
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torch.distributed.run does
os.environ["TORCHELASTIC_RUN_ID"] = "none"
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""


@pytest.mark.parametrize(("value", "threads"), [("", 0), ("1", 1), ("5", 5)])
def test_the_default_of_torchrun_is_no_request(value: str, threads: int) -> None:
    environ = {key: text for key, text in os.environ.items() if key != "OMP_NUM_THREADS"}
    environ |= {"OMP_NUM_THREADS": value} if value else {}
    command = [sys.executable, "-c", TORCHRUN, RANK]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert int(done.stdout) == threads


THREADS = """
import torch
from llamax.backends import choose
from llamax.parallel.rendezvous import Rendezvous
choose("cpu", Rendezvous(), {threads})
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(("given", "threads"), [(0, 3), (2, 2)])
def test_a_rank_uses_as_many_threads(given: int, threads: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", THREADS.format(threads=given)],
        env={**os.environ, "OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == threads


@pytest.mark.parametrize(
    ("command", "option"), [("prepare", "workers"), ("consolidate", "processes")]
)
def test_commands_start_as_many_processes(
    command: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    parser = importlib.import_module(f"llamax.cli.{command}").parser()
    assert parser.get_default(option) == 3
