"""Two machines whose own names resolve to their loopback: two network namespaces and a cable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support import tiny_run

NAMES = tuple(f"llamax{os.getpid()}{letter}" for letter in "ab")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
TRAIN = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[list[str]]]:
    """The start of a command that runs on each of two machines, as Debian sets them up."""
    if not (shutil.which("ip") and shutil.which("unshare") and os.geteuid() == 0):
        pytest.skip("needs root, ip and unshare: apt-get install iproute2")
    with ExitStack() as stack:
        commands = []
        try:
            for name in NAMES:
                ip(f"netns add {name}")
                stack.callback(ip, f"netns delete {name}")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr}")
        ends = [f"veth{os.getpid()}{letter}" for letter in "ab"]
        ip(f"link add {ends[0]} type veth peer name {ends[1]}")
        for name, end, own, other in zip(NAMES, ends, ADDRESSES, ADDRESSES[::-1], strict=True):
            ip(f"link set {end} netns {name}")
            for words in (f"addr add {own}/24 dev {end}", f"link set {end} up", "link set lo up"):
                ip(f"-n {name} {words}")
            etc = Path("/etc/netns") / name  # ip mounts its files over those of /etc
            etc.mkdir(parents=True)
            stack.callback(shutil.rmtree, etc)
            hosts = [
                "127.0.0.1 localhost",
                f"127.0.1.1 {name}",
                f"{other} {NAMES[own == ADDRESSES[0]]}",
            ]
            (etc / "hosts").write_text("\n".join(hosts) + "\n")
            shell = f'hostname {name} && exec "$0" "$@"'
            commands.append(["ip", "netns", "exec", name, "unshare", "--uts", "bash", "-c", shell])
        yield commands


@pytest.mark.parametrize("master", [ADDRESSES[0], NAMES[0]], ids=["address", "name"])
def test_machines_find_each_other(machines: list[list[str]], tmp_path: Path, master: str) -> None:
    (data := tmp_path / "data").mkdir()
    config = tiny_run.config(tiny_run.make_dataset(data), tmp_path / "run")
    path = tmp_path / "config.toml"
    tiny_run.write(config, path)
    words = [*TRAIN, "--master-addr", master, "--master-port", "29400"]
    program = ["-m", "llamax.train", "--config", str(path), "--run.timeout_s=200", "--run.steps=3"]
    ranks = [
        subprocess.Popen(
            [*start, sys.executable, *words, "--node-rank", str(node), *program],
            stderr=subprocess.PIPE,
            text=True,
        )
        for node, start in enumerate(machines)
    ]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
