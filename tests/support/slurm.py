"""A Slurm on this machine, for as long as a block runs: its own keys, ports and folder.

Three kinds: a node with 16 CPUs and 8 GPUs that do not exist, where memory is a resource of its
own; the node as it is, where tasks are bound to the CPUs that they asked for; and two nodes, each a
slurmd of this machine under one of its names.  In all a job gets one CPU and no GPU unless it asks.
The daemons and their jobs end with the process that started them, however it ends.

Needs slurm-wlm and munge (``apt-get install slurm-wlm munge``) and root.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

from support.tiny_run import free_port

CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SelectType=select/cons_tres
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
PRETENDED = """TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
DefMemPerNode=4096
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 \
Boards=1 SocketsPerBoard=1 CoresPerSocket=16 \
ThreadsPerCore=1 RealMemory=64000 Gres=gpu:8 State=UNKNOWN
"""
AS_IT_IS = """TaskPlugin=task/affinity
SelectTypeParameters=CR_CPU
{nodes}
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN"
)
GPUS = "NodeName={host} Name=gpu File={folder}/gpu[0-7]\n"


def missing() -> str:
    """Why there can be no Slurm here, or nothing."""
    programs = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not which(name)]
    if programs:
        return f"no {', '.join(programs)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started as root"


@contextmanager
def cluster(folder: Path, pretended: bool = False, nodes: int = 1) -> Iterator[dict[str, str]]:
    """The environment in which sbatch and squeue speak to it."""
    host = socket.gethostname().split(".")[0]
    names = [host, "localhost"][:nodes]
    for name in ("state", *(f"spool-{name}" for name in names)):
        (folder / name).mkdir(parents=True)
    key, conf = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    ports = [free_port() for _ in range(1 + nodes)]
    lines = [
        NODE.format(name=name, host=host, port=port, cpus=os.cpu_count())
        for name, port in zip(names, ports[1:], strict=True)
    ]
    text = PRETENDED + CONF if pretended else AS_IT_IS + CONF
    conf.write_text(text.format(host=host, folder=folder, ports=ports, nodes="\n".join(lines)))
    if pretended:
        for number in range(8):
            os.mknod(folder / f"gpu{number}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        (folder / "gres.conf").write_text(GPUS.format(host=host, folder=folder))
    environ = {**os.environ, "SLURM_CONF": str(conf)}
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", name] for name in names),
    ]
    reaper = [sys.executable, str(Path(__file__).with_name("reaper.py")), json.dumps(commands)]
    with (
        (folder / "daemons.out").open("w") as log,
        subprocess.Popen(
            reaper,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        ),
    ):
        _until_idle(environ)
        yield environ


def _until_idle(environ: dict[str, str]) -> None:
    limit = time.monotonic() + 300
    while True:
        command = ["sinfo", "--noheader", "--format=%T"]
        done = subprocess.run(command, env=environ, text=True, capture_output=True, check=False)
        if {*done.stdout.split()} == {"idle"}:
            return
        assert time.monotonic() < limit, f"Slurm's node is not idle: {done.stdout}{done.stderr}"
        time.sleep(0.5)
