"""Bash from a job: the head that every script shares, and the command that it is about.

Values of the job file reach a script in two ways only: as one quoted word, or in a comment of one
line (``llamax.launch.jobfile`` lets no line break in).  A script keeps the words of a command in
arrays, so that what is handed through ``bash -c`` or ``mpirun`` is never quoted twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from shlex import quote

from llamax.launch.environment import variables
from llamax.launch.jobfile import JobFile

PHASES = ("prepare", "precompile", "train")
SHEBANG = "#!/usr/bin/env bash"


def head(job: JobFile, title: str, options: Iterable[str] = (), container: bool = False) -> str:
    """Shebang, ``options`` (#SBATCH lines), working folder and environment."""
    lines = [SHEBANG, *options, f"# {job.name}: {title}", LITERAL, "set -euo pipefail"]
    lines += [f"cd -- {quote(job.folder)}"]
    if job.venv:
        lines += [f"PATH={quote(job.venv.rstrip('/') + '/bin')}:$PATH"]
    for each in variables(job, container):
        lines += [f"# {each.reason}", f"export {each.name}={quote(each.value)}"]
    return "\n".join([*lines, LIMIT, ""])


LITERAL = "# shellcheck disable=SC2016  # what stands in single quotes is meant as it stands"
LIMIT = """# shards, sockets and compiler workers need more open files than the usual 1024
ulimit -S -n "$(ulimit -H -n)\""""


def array(name: str, words: Sequence[str]) -> str:
    """A bash array of quoted words, one a line."""
    return "\n".join([f"{name}=(", *(f"    {quote(word)}" for word in words), ")", ""])


def program(job: JobFile, phase: str) -> list[str]:
    """What each rank runs, after ``python3`` or torchrun's own options."""
    early = ["--precompile"] if phase == "precompile" else []
    return ["-m", "llamax.train", *job.arguments, *early]


def compiler(job: JobFile, phase: str) -> str:
    """What stands before torchrun: the tool that compiles what a run of it traces."""
    return "neuron_parallel_compile " if phase == "precompile" and job.machine.neuron else ""


def torchrun(job: JobFile) -> list[str]:
    """torchrun's options that are the same on every node; rank 0 of a node is shown as well."""
    each = ["--nproc-per-node", str(job.ranks), "--rdzv-id", job.name]
    return [*each, "--tee", "3", "--local-ranks-filter", "0"]


def logs(job: JobFile, phase: str) -> str:
    """``logs=FOLDER``: torchrun gives each node a folder in it, and each rank a file in that."""
    return f"logs={quote(f'{job.config.run.folder}/logs/{phase}')}\n"


def on_each_node(job: JobFile, phase: str, options: str) -> str:
    """The command of a node, for ``bash -c``; expanded there, so that each knows its own name."""
    script = (
        f'ulimit -S -n "$(ulimit -H -n)"; exec {compiler(job, phase)}torchrun '
        f'--log-dir "$0/$(uname -n)" {options} "$@"'
    )
    return f'bash -c {quote(script)} \\\n    "$logs" "${{options[@]}}" "${{program[@]}}"'


def prepare(job: JobFile, start: str = "exec") -> str:
    """``llamax prepare`` on one node; ``start`` stands before it."""
    wanted = job.prepare
    options = ["--tokenizer", wanted.tokenizer, "--key", wanted.key]
    options += ["--workers", str(wanted.workers), "--out", job.config.data.path]
    words = ["python3", "-m", "llamax", "prepare", *wanted.inputs, *options]
    return array("program", words) + f'{start} "${{program[@]}}"\n'


def title(job: JobFile, phase: str, launcher: str) -> str:
    """One line about a script."""
    if phase == "prepare":
        return f"tokenize with {job.prepare.workers} processes"
    first = "compile every graph of the run" if job.machine.neuron else "rehearse two steps"
    what = first if phase == "precompile" else "train"
    return f"{what} on {job.nodes} x {job.instance}, {job.nodes * job.ranks} ranks, {launcher}"


def tensorboard(job: JobFile) -> str:
    """TensorBoard on this machine's loopback; from elsewhere, through an ssh tunnel."""
    events = f"{job.config.run.folder}/tensorboard"
    path = f"PATH={quote(job.venv.rstrip('/') + '/bin')}:$PATH\n" if job.venv else ""
    return f"""{SHEBANG}
# {job.name}: curves at http://127.0.0.1:6006; from elsewhere ssh -L 6006:127.0.0.1:6006 HOST
set -euo pipefail
cd -- {quote(job.folder)}
{path}exec tensorboard --logdir {quote(events)} --host 127.0.0.1 --port 6006
"""


# ---- a process on this machine: torchrun and mpirun


def remember(job: JobFile, phase: str) -> str:
    """Leave the process id where ``stop`` and ``status`` find it; one run at a time."""
    return f"""run={quote(job.config.run.folder)}
mkdir -p -- "$run/logs"
pid="$run/logs/{phase}-$(uname -n).pid"
if [[ -e $pid && $(ps -ww -o args= -p "$(<"$pid")") == *llamax* ]]; then
    echo "{phase} of $run already runs here as process $(<"$pid"); stop it first" >&2
    exit 2
fi
echo $$ >"$pid"
"""


TERM = 'kill -TERM "$(<"$pid")"  # ranks save, then end\n'


def action(job: JobFile, phase: str, what: str, stop: str = TERM) -> str:
    """Stop, status, logs, utilization or clean, on this machine."""
    start = f"{SHEBANG}\nset -euo pipefail\ncd -- {quote(job.folder)}\n"
    run = f"run={quote(job.config.run.folder)}\n"
    process = f"""{run}pid="$run/logs/{phase}-$(uname -n).pid"
if ! [[ -e $pid && $(ps -ww -o args= -p "$(<"$pid")") == *llamax* ]]; then
    echo "{phase} of $run does not run on $(uname -n)"
    exit 0
fi
"""
    newest = f"""find "$run/logs/{phase}/$(uname -n)" -path '*/0/std*.log' -printf '%T@ %p\\n' |
    sort -n | tail -n 2 | cut -d ' ' -f 2- | tr '\\n' '\\0' | xargs -0 tail -n 100 -F
"""
    return (
        start
        + {
            "stop": process + stop,
            "status": process + 'ps -ww -o pid,etime,args -p "$(<"$pid")"\n',
            "logs": run + newest,
            "utilization": f"exec {job.machine.monitor}\n",
            "clean": f'{run}rm -rf -- "$run/logs/{phase}" "$run/logs/{phase}-$(uname -n).pid"\n',
        }[what]
    )
