"""A node says that its master is missing, where torchrun itself says nothing for minutes."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

import pytest
from support.launch_jobs import job
from support.tiny_run import free_port

from llamax.launch.render import render

SAID = r"node 1 has waited (\d+) s: nothing answers at port {} of torchrun.master, 127.0.0.1; start"


def started(folder: Path, port: int, node: int) -> subprocess.Popen[str]:
    """A node's script, which looks every second, with a torchrun that waits for its input's end."""
    (folder / "torchrun").write_text("#!/bin/bash\ncat\n")
    (folder / "torchrun").chmod(0o755)
    this = job(nodes=2, port=port, torchrun__master="127.0.0.1")
    text = render(this, "torchrun", "train").replace("/fsx/llama", str(folder))
    text = text.replace("set -euo pipefail", f"set -euo pipefail\nPATH={folder}:$PATH")
    text = text.replace("read -r -t 30", "read -r -t 1")
    pipe = subprocess.PIPE
    command = ["bash", "-c", text, "x", str(node)]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("late", [False, True], ids=["never", "late"])
def test_a_master_that_is_missing_is_named(tmp_path: Path, late: bool) -> None:
    port = free_port()
    node = started(tmp_path, port, 1)
    assert node.stderr is not None
    lines = iter(node.stderr.readline, "")
    assert re.match(SAID.format(port), next(lines))
    if late:
        with socket.create_server(("127.0.0.1", port)) as master:
            master.accept()[0].close()
            node.communicate("")
    else:
        assert re.match(SAID.format(port), next(lines))
        node.communicate("")  # returns: what says it ends with the script
    assert node.returncode == 0


def test_the_master_waits_for_nobody(tmp_path: Path) -> None:
    node = started(tmp_path, free_port(), 0)
    assert "node" not in node.communicate("")[1]
    assert node.returncode == 0
