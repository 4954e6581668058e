"""mpirun (Open MPI): one process a node with torchrun inside, or one process a rank.

::

    per = "node"    mpirun ── node 0: torchrun ── 32 ranks      what AWS runs
                          └── node 1: torchrun ── 32 ranks
    per = "core"    mpirun ── 64 ranks; ``llamax.parallel.rendezvous`` reads OMPI_COMM_WORLD_*

By default mpirun binds a process to a core, which an option changes, and kills it soon after
SIGTERM: ``llamax.launch.supervise`` starts mpirun and, on every node, the processes, and gives them
the time to save.

Under a resource manager mpirun takes the machines and slots of the allocation.  With a hostfile it
may start more processes than there are slots; a job on one machine ignores the allocation.

Source: mpirun(1) of Open MPI 4.1 and 5.0; executed with 4.1.4 and 5.0.11.
"""

from __future__ import annotations

from shlex import quote

from llamax.launch.environment import variables
from llamax.launch.jobfile import JobFile
from llamax.launch.script import (
    IN_A_FILE,
    PRIVATE,
    array,
    head,
    logs,
    needs_compiler,
    on_each_node,
    pid_file,
    prepare,
    program,
    pull_cache,
    title,
    torchrun,
)

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
MISSING = """if ! command -v mpirun >/dev/null; then
    echo "mpirun is not installed here; install Open MPI, such as the package openmpi-bin" >&2
    exit 2
fi
"""
FIRST_HOST = r"""# the first node of the hostfile; each rank resolves its name to IPv4
if ! [[ -f $hostfile && -r $hostfile ]]; then
    echo "mpirun.hostfile=$hostfile cannot be read on this machine" >&2
    exit 2
fi
hosts=$(awk '{ gsub(/#.*|\/\/.*|["\r]/, "") } NF && !/^[ \t]*\^/ {
    host = $1; sub(/^.*@/, "", host)
    if (host ~ /^[^:]*:[0-9]+$/) sub(/:.*/, "", host)
    print host }' "$hostfile")
MASTER_ADDR=$(head -n 1 <<<"$hosts")
export MASTER_ADDR
"""
# A line such as +e:2 stands for nodes of an allocation.
ALL_HOSTS = """found=$(sort -u <<<"$hosts" | grep -c . || true)
if [[ $hosts != *+* ]] && ((found < {nodes})); then
    echo "mpirun.hostfile=$hostfile lists $found of {nodes} nodes" >&2
    exit 2
fi
"""
NO_ALLOCATION = """# the processes start on this machine, whatever allocation its shell is in
for name in "${!SLURM_@}" "${!PBS_@}" "${!LSB_@}" "${!PMIX_SERVER_@}" PE_HOSTFILE \\
    PMIX_NAMESPACE PMIX_RANK; do
    unset "$name"
done
"""
BY_HOSTFILE = '--hostfile "$hostfile"'


def slots(job: JobFile, phase: str) -> int:
    """Processes that mpirun starts on a node; neuron_parallel_compile needs torchrun."""
    return job.ranks if job.mpirun.per == "core" and phase == "train" else 1


def render(job: JobFile, phase: str, container: bool = False) -> str:
    """The script that starts all nodes from one; in a container the operator lists the nodes."""
    text = head(job, title(job, phase, "mpirun"), container=container)
    text += MISSING if phase != "prepare" and not container else ""
    text += "" if container else pid_file(job, phase)
    if phase == "prepare":
        return text + prepare(job)
    processes = slots(job, phase)
    has_torchrun = processes == 1
    hostfile = "/etc/mpi/hostfile" if container else job.mpirun.hostfile
    text += needs_compiler(job, phase) + pull_cache(job, phase)
    text += ROOT
    if hostfile:
        text += f"hostfile={quote(hostfile)}\n{FIRST_HOST}"
        text += "" if container else ALL_HOSTS.replace("{nodes}", str(job.nodes))
        where = BY_HOSTFILE
    else:
        text += f"{NO_ALLOCATION}export MASTER_ADDR=127.0.0.1\n"
        where = f"--host localhost:{processes}"
    text += f"export MASTER_PORT={job.port}\n"
    names = ["PATH", "MASTER_ADDR", "MASTER_PORT"]
    names += [variable.name for variable in variables(job, container)]
    names += [name for name, _ in job.secrets]
    text += "forward=(\n" + "".join(f"    -x {name}\n" for name in names) + ")\n"
    text += "if [[ -v LD_LIBRARY_PATH ]]; then forward+=(-x LD_LIBRARY_PATH); fi\n"
    command = '"$python" "${program[@]}"'
    if has_torchrun:
        text += PRIVATE if job.nodes == 1 else ""
        text += logs(job, phase) + array("options", torchrun(job))
        command = on_each_node(job, phase, IN_A_FILE if job.nodes == 1 else OPTIONS)
    text += array("program", program(job, phase))
    role = "node" if has_torchrun else "rank"
    folder = quote(f"{job.config.run.folder}/logs/{phase}-processes")
    return f"""{text}{BY_PATH}python=$(command -v python3)
processes={folder}
exec "$python" -m llamax.launch.supervise start "$processes" \\
    "$(command -v mpirun)" --np {job.nodes * processes} {where} \\
    --map-by ppr:{processes}:node:OVERSUBSCRIBE --bind-to none --wdir "$PWD" "${{forward[@]}}" \\
    "$python" -m llamax.launch.supervise {role} "$processes" \\
    {command}
"""
