"""The ranks of one machine rendezvous in a folder that no other user may enter, and that goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.launch_jobs import job

from llamax.launch.render import render
from llamax.launch.script import IN_A_FILE, array, on_each_node

# Stands for torchrun: makes the file of the rendezvous and reports its folder, when the process
# that will remove it ignores signals; its first line is that of this Python.
TORCHRUN = """
import os, signal, sys
from pathlib import Path

store, report = Path(sys.argv[sys.argv.index("--rdzv-endpoint") + 1]), Path(os.environ["REPORT"])
store.touch()
children = Path(f"/proc/self/task/{os.getpid()}/children")
while not any(
    int(line.split()[1], 16) >> signal.SIGTERM - 1 & 1
    for child in children.read_text().split()
    for line in Path(f"/proc/{child}/status").read_text().splitlines()
    if line.startswith("SigIgn")
):
    pass
signal.signal(signal.SIGINT, signal.SIG_DFL)
(part := Path(f"{report}.part")).write_text(f"{store.parent.stat().st_mode:o} {store.parent}")
part.rename(report)
if os.environ["TRY"] == "exit":
    sys.exit(3)
signal.pause()
"""


def on_one_node(launcher: str) -> str:
    """The script that runs torchrun on the one node of a job."""
    this = job(overrides={"data": {"path": "data"}, "run": {"folder": "run"}})
    if launcher == "torchrun":
        return render(this, launcher, "train")
    words = array("options", ["--tee", "3"]) + array("program", ["-m", "x"])
    return f"{words}logs=logs\nexec {on_each_node(this, 'train', IN_A_FILE)}"


def wait_until(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun or slurm"])
@pytest.mark.parametrize("end", ["exit", "SIGTERM", "SIGKILL", "SIGINT of the group"])
@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_folder_is_private_and_goes(
    tmp_path: Path, launcher: str, end: str, umask: int
) -> None:
    fake, temporary, report = tmp_path / "bin", tmp_path / "tmp", tmp_path / "report"
    fake.mkdir()
    temporary.mkdir()
    for name in ("torchrun", "neuron_parallel_compile"):
        (fake / name).write_text(f"#!{sys.executable} -S{TORCHRUN}")
        (fake / name).chmod(0o755)
    text = on_one_node(launcher).replace("cd -- /fsx/llama", f"cd -- {tmp_path}")
    path = f"{fake}:{os.environ['PATH']}"
    added = {"TMPDIR": str(temporary), "REPORT": str(report), "TRY": end, "PATH": path}
    process = subprocess.Popen(
        ["bash", "-c", text],
        env={**os.environ, **added},
        cwd=tmp_path,
        umask=umask,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until(lambda: report.exists() or process.poll() not in (None, 3))
        mode, folder = report.read_text().split()
        assert mode == "40700"
        assert Path(folder).parent == temporary
        if end == "SIGINT of the group":
            os.killpg(process.pid, signal.SIGINT)
        elif end != "exit":
            process.send_signal(getattr(signal, end))
        assert process.stdout is not None
        process.stdout.read()  # nothing that is left holds the output
        assert process.wait(300) == {"exit": 3, "SIGTERM": -15, "SIGKILL": -9}.get(end, -2)
        wait_until(lambda: not [*temporary.iterdir()])
    finally:
        if process.poll() is None:
            process.kill()
