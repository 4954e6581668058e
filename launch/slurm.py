"""An sbatch script: one task on each node runs torchrun; saved and requeued before the time limit.

::

    sbatch ── batch script ── srun, one task per node ── torchrun ── ranks
                 │ USR1, signal_s before the limit
                 └─ SIGTERM to the tasks: ranks save and end; then the job is requeued

Slurm requeues the job when a node fails (--requeue); the log continues in the same file
(--open-mode=append); a rank that fails ends all tasks (--kill-on-bad-exit).

A job takes whole nodes.  An exclusive job has all CPUs of its nodes, but only the memory and the
GPUs that it asks for, and its steps get no GPU that was not asked for by number.

sbatch and srun read options from variables, and a shell inside an allocation has those of its own
allocation: ``outside`` removes them from the environment of a command, and the script, which may
also be submitted by hand, removes all but the ones that describe its own job.

Source: sbatch(1), srun(1), scancel(1), gres.conf(5) of Slurm 22.05 and later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from shlex import quote

from llamax.launch.jobfile import JobFile
from llamax.launch.script import (
    IN_A_FILE,
    PRIVATE,
    SHEBANG,
    array,
    enter_folder,
    head,
    logs,
    needs_compiler,
    on_each_node,
    prepare,
    program,
    pull_cache,
    title,
    torchrun,
)

MASTER = """# the first node of the allocation; each rank resolves its name to IPv4
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk "NR == 1")
export MASTER_ADDR
"""
OPTIONS = (
    '--nnodes "$SLURM_STEP_NUM_NODES" --node-rank "$SLURM_NODEID" --master-addr "$MASTER_ADDR"'
)
# Variables that say where Slurm is, and defaults of the user that no allocation sets.
KEPT = re.compile(
    r"SLURM_(CONF|CONF_SERVER|JWT|CLUSTERS|TIME_FORMAT|DEBUG_FLAGS)"
    r"|SBATCH_(ACCOUNT|PARTITION|QOS|RESERVATION|CLUSTERS|CONSTRAINT|TIMELIMIT|WCKEY|DEBUG)"
)
# Slurm gives the devices of an allocation to its shell by these.
DEVICES = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES")
OWN = """# srun reads no options from variables that came with the shell of another allocation
for name in "${!SLURM_@}" "${!SBATCH_@}" "${!SRUN_@}"; do
    case $name in
    *_HET_GROUP_*) unset "$name" ;;
    SLURM_CONF | SLURM_CONF_SERVER | SLURM_JWT | SLURM_CLUSTER_NAME | SLURM_JOBID) ;;
    SLURM_JOB_* | SLURM_SUBMIT_* | SLURM_CPUS_ON_NODE | SLURM_RESTART_COUNT) ;;
    *) unset "$name" ;;
    esac
done
"""
RUN = """# before the time limit: ranks save and end, then the job is requeued and resumes
limit=
trap 'limit=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
{srun} --kill-on-bad-exit=1 \\
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


def seconds(limit: str) -> int:
    """A time limit in Slurm's forms (MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS); empty: 0."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":") if part]
    if dash:
        scale = (3600, 60, 1)
    else:
        scale = (3600, 60, 1) if len(parts) == 3 else (60, 1, 1)
    return int(days or 0) * 86400 + sum(map(int.__mul__, parts, scale))


def log(job: JobFile, phase: str, number: str) -> str:
    """The path of a log; ``number``: the number of the Slurm job."""
    return f"{job.folder.rstrip('/')}/{name(job, phase)}-{number}.log"


def name(job: JobFile, phase: str) -> str:
    """The name of a phase in the queue."""
    return job.name if phase == "train" else f"{job.name}-{phase}"


def outside(environ: Mapping[str, str], job: JobFile) -> dict[str, str]:
    """The environment without what belongs to an allocation of Slurm, or contradicts the job."""
    inside = "SLURM_JOB_ID" in environ
    given = {
        "SBATCH_ACCOUNT": job.slurm.account,
        "SBATCH_PARTITION": job.slurm.partition,
        "SBATCH_TIMELIMIT": job.slurm.time_limit,
    }
    return {
        key: value
        for key, value in environ.items()
        if (not key.startswith(("SLURM_", "SBATCH_", "SRUN_")) or KEPT.fullmatch(key))
        and not given.get(key)
        and not (inside and key in DEVICES)
    }


def resources(job: JobFile) -> dict[str, str]:
    """The options that ask for the resources of a node, the same for sbatch and srun."""
    gpus = job.machine.devices if "nvidia" in job.machine.resource and job.slurm.gres else 0
    memory = f"{job.slurm.memory_gib}G" if job.slurm.memory_gib else "" if job.slurm.cpus else "0"
    return {"gpus-per-node": str(gpus or ""), "mem": memory}


def srun(job: JobFile, nodes: int) -> str:
    """srun with one task on each node, which has all of the job's resources there."""
    options = {"nodes": nodes, "ntasks": nodes, "ntasks-per-node": 1, "cpu-bind": "none"}
    words = [f"--{key}={value}" for key, value in {**options, **resources(job)}.items() if value]
    return " ".join(["srun", *words, "--export=ALL"])


def render(job: JobFile, phase: str) -> str:
    """The sbatch script of a phase."""
    nodes = 1 if phase == "prepare" else job.nodes
    options = {
        "job-name": name(job, phase),
        "nodes": str(nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(job.slurm.cpus or ""),
        **resources(job),
        "output": log(job, phase, "%j"),
        "open-mode": "append",
        "partition": job.slurm.partition,
        "account": job.slurm.account,
        "time": job.slurm.time_limit,
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value]
    lines += [] if job.slurm.cpus else ["#SBATCH --exclusive"]
    if phase == "prepare":
        text = head(job, title(job, phase, "Slurm"), [*lines, "#SBATCH --requeue"])
        return text + OWN + prepare(job, f"exec {srun(job, nodes)}")
    lines += ["#SBATCH --requeue", f"#SBATCH --signal=B:USR1@{job.slurm.signal_s}"]
    text = head(job, title(job, phase, "Slurm"), lines) + OWN
    text += needs_compiler(job, phase) + pull_cache(job, phase)
    text += (PRIVATE if nodes == 1 else MASTER) + logs(job, phase)
    text += array("options", torchrun(job)) + array("program", program(job, phase))
    rendezvous = IN_A_FILE if nodes == 1 else f"{OPTIONS} --master-port {job.port}"
    command = on_each_node(job, phase, rendezvous)
    return text + RUN.replace("{srun}", srun(job, nodes)).replace("{command}", command)


def action(job: JobFile, phase: str, what: str) -> str:
    """The script of an action on a phase."""
    named = f'--name={quote(name(job, phase))} --user="$(id -un)"'
    pattern = quote(f"./{name(job, phase)}-[0-9]+\\.log")
    monitor = job.machine.monitor
    queued = _newest(job, phase, named, "", "in the queue")
    running = _newest(job, phase, named, "--state=RUNNING ", "running")
    return (
        f"{SHEBANG}\nset -euo pipefail\n{enter_folder(job)}\n"
        + {
            "stop": f"{queued}# cancel a queued job; of a running one ranks save and end\n"
            f"scancel --state=PENDING {named}\nscancel --state=RUNNING --signal=TERM {named}\n"
            f'echo "{name(job, phase)} ends; if it runs, it saves before"\n',
            "status": f"{queued}squeue {named} --format='%i %T %M %l %D %R'\n",
            "logs": f"""newest=$(find . -maxdepth 1 -regex {pattern} -printf '%T@ %p\\n' |
    sort -n | tail -n 1 | cut -d ' ' -f 2-)
if [[ -z $newest ]]; then
    echo "no log yet"
    exit 0
fi
exec tail -n 100 -F "$newest"
""",
            "utilization": f'{running}exec srun --overlap --jobid="$number" --nodes=1 '
            f"--pty {monitor}\n",
            "clean": f"""number=$(squeue {named} --noheader --format=%i | head -n 1)
if [[ $number ]]; then
    echo "{name(job, phase)} is in the queue as job $number; stop it first" >&2
    exit 2
fi
"""
            f"find . -maxdepth 1 -regex {pattern} -delete\n",
        }[what]
    )


def _newest(job: JobFile, phase: str, named: str, state: str, where: str) -> str:
    """``number``: the newest Slurm job of a phase; without one the script ends."""
    return f"""number=$(squeue {named} {state}--noheader --format=%i --sort=-i | head -n 1)
if [[ -z $number ]]; then
    echo "{name(job, phase)} is not {where}"
    exit 0
fi
"""
