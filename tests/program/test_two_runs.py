"""A script that torchrun starts, and that trains twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.tiny_run import config, free_port, log_of, make_dataset, write

SCRIPT = """
import sys
import llamax

for folder in sys.argv[2:]:
    llamax.train(sys.argv[1], run={"folder": folder})
"""


def test_the_second_run_meets_anew(tmp_path: Path) -> None:
    """torchrun's store keeps the addresses at which the ranks of the first run met."""
    (tmp_path / "data").mkdir()
    script, folders = tmp_path / "twice.py", [tmp_path / "first", tmp_path / "second"]
    script.write_text(SCRIPT)
    path = write(config(make_dataset(tmp_path / "data"), tmp_path / "run"), tmp_path / "run.toml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    port = f"--master-port={free_port()}"
    command = [*torchrun, port, str(script), str(path), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = map(log_of, folders)
    assert first == second
