"""``llamax prepare`` that is killed, or loses a worker, goes on where it was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.corpora import python_sources
from support.instruction import llama2_tokenizer
from support.prepared import text_folder

from llamax.data.dataset import open_dataset
from llamax.runtime.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama2_tokenizer(tmp_path_factory.mktemp("t"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return text_folder(tmp_path / "text")


SLOW = """
import os, sys, time
from llamax.cli import prepare
from llamax.data.prepare import chunks, file_kinds

def make_part(*args):  # and rest, so that a busy machine sees the program at work
    real(*args)
    time.sleep(float(os.environ["REST_S"]))

real, chunks.make_part, file_kinds.CHUNK_BYTES = chunks.make_part, make_part, 30_000
chunks.ALONE_BYTES = 0  # workers from the first part on
if __name__ == "__main__":
    sys.exit(prepare.main(sys.argv[1:]))
"""
AT_ONCE = """
from llamax.cli import prepare
from llamax.data.prepare import chunks
from llamax.runtime.process import run_main

chunks.ALONE_BYTES = 0  # workers from the first part on
if __name__ == "__main__":
    raise SystemExit(run_main(prepare.main))
"""
STOPS = """
import signal
from llamax.cli import prepare
from llamax.data.prepare import chunks
from llamax.runtime.process import run_main

chunks.ALONE_BYTES = 0  # workers from the first part on
chunks.make_part = lambda *args: signal.pause()  # a worker is there until it is killed
if __name__ == "__main__":
    raise SystemExit(run_main(prepare.main))
"""


def test_a_kill_loses_nothing(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Killed again and again, at any moment, it ends with the bytes of an undisturbed run."""
    program = tmp_path / "program.py"
    program.write_text(SLOW)
    args = [str(text), "--glob", "*.py", "--tokenizer", str(tokenizer), "--validation", "0.2"]

    def start(out: Path, workers: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, program, *args, "--out", out, "--workers", str(workers)]
        environ = {**os.environ, "REST_S": str(rest_s)}
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, env=environ)

    rest_s = 0.0
    assert start(tmp_path / "calm", 1).wait() == 0
    rest_s = 0.3
    torn, kills = tmp_path / "torn", 0
    for wanted in (1, 4, 9):
        process = start(torn, 2 if wanted == 4 else 1)
        while len(list(torn.glob(".parts/[0-9]*.tokens"))) < wanted and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    parts = sorted(torn.glob(".parts/[0-9]*.tokens"))
    assert parts, "nothing was kept"
    raw = bytearray(parts[0].read_bytes())
    raw[-1] ^= 4
    parts[0].write_bytes(raw)
    with pytest.raises(DataError, match="is not finished"):
        open_dataset(torn)
    rest_s = 0.0
    assert start(torn, 2).wait() == 0
    for name in ("train.tokens", "validation.tokens", "tokenizer.model"):
        assert (torn / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()
    assert not (torn / ".parts").exists()


def test_a_worker_that_dies_is_reported(tokenizer: Path, text: Path, tmp_path: Path) -> None:
    (program := tmp_path / "program.py").write_text(STOPS)
    command = [sys.executable, program, text.parent, "--glob", "*.jsonl"]
    rows = "".join(json.dumps({"text": source}) + "\n" for source in python_sources(40)) * 8
    (tmp_path / "rows.jsonl").write_text(rows)
    command += ["--tokenizer", tokenizer, "--out", tmp_path / "out", "--workers", 2]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)

    while len(found := _workers(process.pid)) < 2:
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(found[0], signal.SIGKILL)
    _, said = process.communicate()
    assert said.startswith("llamax: a worker of 2 died")
    assert said.count("\n") == 1
    assert process.returncode == 2


def test_ctrl_c_is_one_line(tokenizer: Path, tmp_path: Path) -> None:
    for name in "abcd":  # a chunk each
        (tmp_path / f"{name}.txt").write_text("\n".join(map(hex, range(300_000))))  # slow
    texts = map(str, tmp_path.glob("*.txt"))
    (runner := tmp_path / "program.py").write_text(AT_ONCE)
    command = [sys.executable, str(runner), *texts, "--tokenizer", str(tokenizer),
               "--out", str(tmp_path / "out"), "--workers", "2"]  # fmt: skip
    program = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, text=True)
    workers: list[int] = []
    while len(workers) < 2 or _ignores_ctrl_c(program.pid):
        assert program.poll() is None
        time.sleep(0.01)
        workers = _workers(program.pid)
    assert all(map(_ignores_ctrl_c, workers))
    os.killpg(program.pid, signal.SIGINT)
    assert program.communicate(timeout=300)[1] == "llamax: interrupted\n"
    assert program.returncode == 130


def _workers(pid: int) -> list[int]:
    return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def _ignores_ctrl_c(pid: int) -> bool:
    (mask,) = re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) & 1 << signal.SIGINT - 1)
