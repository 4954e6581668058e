"""mpirun (Open MPI): one process a node with torchrun inside, or one process a rank.

::

    per = "node"    mpirun ── node 0: torchrun ── 32 ranks      what AWS runs
                          └── node 1: torchrun ── 32 ranks
    per = "core"    mpirun ── 64 ranks; ``llamax.parallel.rendezvous`` reads OMPI_COMM_WORLD_*

By default mpirun binds a process to a core and kills it one second after SIGTERM; options change
both.  With a longer timeout it waits that long before it forwards SIGTERM and again before it
kills, and it does so whenever a process ends with an error, even the last one.  So it is short,
and the signal to stop does not go through it: SIGTERM is sent to torchrun, or SIGUSR1 to mpirun,
which forwards it immediately and which ranks treat like SIGTERM.

Source: mpirun(1) of Open MPI 4.1; the waits and the signals were measured on 4.1.4.
"""

from __future__ import annotations

import re
from shlex import quote

from llamax.launch import script
from llamax.launch.environment import variables
from llamax.launch.jobfile import JobFile
from llamax.launch.script import (
    array,
    head,
    logs,
    on_each_node,
    pid_file,
    prepare,
    program,
    title,
    torchrun,
)
from llamax.launch.torchrun import FILE_OPTIONS, IN_A_FILE

KILL_TIMEOUT_S = 30  # after the first process has ended, the others have twice this to save
ROOT = """# containers run as root, which mpirun refuses without these two variables
if [[ $(id -u) == 0 ]]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
"""
BY_PATH = """# full path, so that other nodes find the daemon of mpirun in the same folder; that
# folder then comes first in PATH, so Python needs its full path too
"""
OPTIONS = (
    '--nnodes "$OMPI_COMM_WORLD_SIZE" --node-rank "$OMPI_COMM_WORLD_RANK" '
    '--master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"'
)
FIRST_HOST = """# the first node of the hostfile; each rank resolves its name to IPv4
MASTER_ADDR=$(awk 'NF && $1 !~ /^#/ { print $1; exit }' "$hostfile")
export MASTER_ADDR
"""


BY_HOSTFILE = '--hostfile "$hostfile"'


def slots(job: JobFile, phase: str) -> int:
    """Processes that mpirun starts on a node; neuron_parallel_compile needs torchrun."""
    return job.ranks if job.mpirun.per == "core" and phase == "train" else 1


def render(job: JobFile, phase: str, container: bool = False) -> str:
    """The script that starts all nodes from one; in a container the operator lists the nodes."""
    text = head(job, title(job, phase, "mpirun"), container=container)
    text += "" if container else pid_file(job, phase)
    if phase == "prepare":
        return text + prepare(job)
    processes = slots(job, phase)
    has_torchrun = processes == 1
    hostfile = "/etc/mpi/hostfile" if container else job.mpirun.hostfile
    text += ROOT
    if hostfile:
        text += f"hostfile={quote(hostfile)}\n{FIRST_HOST}"
        where = BY_HOSTFILE
    else:
        text += "export MASTER_ADDR=127.0.0.1\n"
        where = f"--host localhost:{processes}"
    text += f"export MASTER_PORT={job.port}\n"
    if has_torchrun and job.nodes == 1:
        text += IN_A_FILE
    names = ["PATH", "MASTER_ADDR", "MASTER_PORT"]
    names += [variable.name for variable in variables(job, container)]
    names += (
        ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "meeting"] if has_torchrun and job.nodes == 1 else []
    )
    text += "forward=(\n" + "".join(f"    -x {name}\n" for name in names) + ")\n"
    text += "if [[ -v LD_LIBRARY_PATH ]]; then forward+=(-x LD_LIBRARY_PATH); fi\n"
    command = '"$(command -v python3)" "${program[@]}"'
    if has_torchrun:
        text += logs(job, phase) + array("options", torchrun(job))
        command = on_each_node(job, phase, FILE_OPTIONS if job.nodes == 1 else OPTIONS)
    text += array("program", program(job, phase))
    return f"""{text}{BY_PATH}exec "$(command -v mpirun)" --np {job.nodes * processes} {where} \\
    --map-by ppr:{processes}:node --bind-to none --wdir "$PWD" \\
    --mca odls_base_sigkill_timeout {KILL_TIMEOUT_S} "${{forward[@]}}" \\
    {command}
"""


def action(job: JobFile, phase: str, what: str) -> str:
    """The script of an action on a phase, for the node on which mpirun was started."""
    if what != "stop" or phase == "prepare":
        return script.action(job, phase, what)
    if slots(job, phase) > 1:
        return script.action(job, phase, what, 'kill -USR1 "$(<"$pid")"  # ranks save and end\n')
    folder = f"{job.config.run.folder}/logs/{phase}/"
    folder, name = (re.sub(r"([][\\.*+?^${}()|])", r"\\\1", text) for text in (folder, job.name))
    pattern = f"[t]orchrun --log-dir {folder}[^ ]* .*--rdzv-id {name} "
    end = f"# torchrun of every node; ranks save and end\npattern={quote(pattern)}\n"
    if job.mpirun.hostfile:
        end += f"{ROOT}hostfile={quote(job.mpirun.hostfile)}\n{script.LITERAL}\n"
        end += f'exec "$(command -v mpirun)" {BY_HOSTFILE} --map-by ppr:1:node \\\n    '
        end += """bash -c 'pkill -TERM -f -- "$0" || true' "$pattern"\n"""
    else:
        end += 'pkill -TERM -f -- "$pattern"\n'
    return script.action(job, phase, what, end)
