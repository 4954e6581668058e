"""An sbatch script: one task on each node runs torchrun; saved and requeued before the time limit.

::

    sbatch ── batch script ── srun, one task per node ── torchrun ── ranks
                 │ USR1, signal_s before the limit
                 └─ SIGTERM to the tasks: ranks save and end; then the job is requeued

Slurm requeues the job when a node fails (--requeue); the log continues in the same file
(--open-mode=append); a rank that fails ends all tasks (--kill-on-bad-exit).

Source: sbatch(1), srun(1), scancel(1) of Slurm 22.05 and later.
"""

from __future__ import annotations

from shlex import quote

from llamax.launch.jobfile import JobFile
from llamax.launch.script import (
    SHEBANG,
    array,
    head,
    logs,
    on_each_node,
    prepare,
    program,
    title,
    torchrun,
)
from llamax.launch.torchrun import FILE_OPTIONS, IN_A_FILE

MASTER = """# the first node of the allocation; each rank resolves its name to IPv4
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk "NR == 1")
export MASTER_ADDR
"""
OPTIONS = (
    '--nnodes "$SLURM_STEP_NUM_NODES" --node-rank "$SLURM_NODEID" --master-addr "$MASTER_ADDR"'
)
RUN = """# before the time limit: ranks save and end, then the job is requeued and resumes
limit=
trap 'limit=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
srun --kill-on-bad-exit=1 --ntasks-per-node=1 --cpu-bind=none --export=ALL \\
    {command} &
task=$!
code=0
wait "$task" || code=$?
if [[ $limit ]]; then
    wait "$task" || true
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def log(job: JobFile, phase: str, number: str) -> str:
    """The path of a log; ``number``: the number of the Slurm job."""
    return f"{job.folder.rstrip('/')}/{name(job, phase)}-{number}.log"


def name(job: JobFile, phase: str) -> str:
    """The name of a phase in the queue."""
    return job.name if phase == "train" else f"{job.name}-{phase}"


def render(job: JobFile, phase: str) -> str:
    """The sbatch script of a phase."""
    nodes = 1 if phase == "prepare" else job.nodes
    options = {
        "job-name": name(job, phase),
        "nodes": str(nodes),
        "ntasks-per-node": "1",
        "output": log(job, phase, "%j"),
        "open-mode": "append",
        "partition": job.slurm.partition,
        "account": job.slurm.account,
        "time": job.slurm.time_limit,
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value]
    lines += ["#SBATCH --exclusive"] if job.machine.devices else []
    if phase == "prepare":
        text = head(job, title(job, phase, "Slurm"), [*lines, "#SBATCH --requeue"])
        return text + prepare(job, "exec srun")
    lines += ["#SBATCH --requeue", f"#SBATCH --signal=B:USR1@{job.slurm.signal_s}"]
    text = head(job, title(job, phase, "Slurm"), lines)
    text += (IN_A_FILE if nodes == 1 else MASTER) + logs(job, phase)
    text += array("options", torchrun(job)) + array("program", program(job, phase))
    rendezvous = FILE_OPTIONS if nodes == 1 else f"{OPTIONS} --master-port {job.port}"
    command = on_each_node(job, phase, rendezvous)
    return text + RUN.replace("{command}", command)


def action(job: JobFile, phase: str, what: str) -> str:
    """The script of an action on a phase."""
    named = f"--name={quote(name(job, phase))}"
    pattern = quote(f"./{name(job, phase)}-[0-9]+\\.log")
    monitor = job.machine.monitor
    return (
        f"{SHEBANG}\nset -euo pipefail\ncd -- {quote(job.folder)}\n"
        + {
            "stop": "# cancel a queued job; of a running one ranks save and end\n"
            f"scancel --state=PENDING {named}\nscancel --state=RUNNING --signal=TERM {named}\n",
            "status": f"squeue {named} --format='%i %T %M %l %D %R'\n",
            "logs": f"""newest=$(find . -maxdepth 1 -regex {pattern} -printf '%T@ %p\\n' |
    sort -n | tail -n 1 | cut -d ' ' -f 2-)
exec tail -n 100 -F "${{newest:?no log yet}}"
""",
            "utilization": f"""number=$(squeue {named} --state=RUNNING --noheader --format=%i)
exec srun --overlap --jobid="${{number:?the job is not running}}" --nodes=1 --pty {monitor}
""",
            "clean": f"find . -maxdepth 1 -regex {pattern} -delete\n",
        }[what]
    )
