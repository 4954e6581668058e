"""Parts of the bash scripts of all launchers: the head, commands as arrays, and actions.

Values of the job file appear in a script only as one quoted word or in a comment of one line
(``llamax.launch.jobfile`` refuses line breaks).  The words of a command are in arrays, so that they
are not quoted twice on their way through ``bash -c`` or ``mpirun``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from shlex import quote

from llamax.launch.environment import variables
from llamax.launch.jobfile import JobFile
from llamax.launch.prepare import command_line
from llamax.runtime.units import count

SHEBANG = "#!/usr/bin/env bash"


def head(job: JobFile, title: str, options: Iterable[str] = (), container: bool = False) -> str:
    """Shebang, ``options`` (#SBATCH lines), working folder and environment variables."""
    lines = [SHEBANG, *options, f"# {job.name}: {title}", LITERAL, "set -euo pipefail"]
    lines += [enter_folder(job)]
    if job.venv:
        lines += [activate(job)]
    for name, value, reason in variables(job, container):
        lines += [f"# {reason}", f"export {name}={quote(value)}"]
    lines += [] if container else secrets(job.secrets)
    return "\n".join([*lines, LIMIT, ""])


def activate(job: JobFile) -> str:
    """Put the programs of ``venv`` first, or end with a line that says that they are not here."""
    programs = f"{job.venv.rstrip('/')}/bin"
    missing = f"there is no folder {programs} on this machine; use the whole path of venv"
    return (
        f"[[ -d {quote(programs)} ]] || {{ echo {quote(missing)} >&2; exit 2; }}\n"
        f"PATH={quote(programs)}:$PATH"
    )


def secrets(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Variables read from files on the node, so that no script, record or log has their values."""
    for name, path in pairs:
        problem = quote(f"secrets.{name}={path} cannot be read on this node")
        yield "# from the table secrets of the job file"
        yield f"if [[ ! -f {quote(path)} || ! -r {quote(path)} ]]; then"
        yield f"    echo {problem} >&2\n    exit 2\nfi"
        yield f"{name}=$(<{quote(path)})"
        yield f"export {name}"


LITERAL = "# shellcheck disable=SC2016  # text in single quotes is meant literally"
LIMIT = """# shards, sockets and compiler workers need more open files than the default 1024
ulimit -S -n "$(ulimit -H -n)\""""


def array(name: str, words: Sequence[str]) -> str:
    """A bash array of quoted words, one in a line."""
    return "\n".join([f"{name}=(", *(f"    {quote(word)}" for word in words), ")", ""])


def program(job: JobFile, phase: str) -> list[str]:
    """The words of the training program, after ``python3`` or the options of torchrun."""
    flags = ["--precompile"] if phase == "precompile" else []
    return ["-m", "llamax.train", *job.arguments, *flags]


def compiler(job: JobFile, phase: str) -> str:
    """The prefix of torchrun that compiles all traced programs; empty without one."""
    if phase != "precompile" or not job.machine.neuron:
        return ""
    fill = f"llamax cache fill {_place(job)} -- " if job.compile_cache else ""
    return f"{fill}neuron_parallel_compile "


def needs_compiler(job: JobFile, phase: str) -> str:
    """End with a line that says so where the programs cannot be compiled."""
    if not compiler(job, phase):
        return ""
    missing = "neuron_parallel_compile is not installed here; start this phase on a machine of the "
    missing += f"job, with Neuron SDK {job.sdk.sdk.name}"
    return f"""if ! command -v neuron_parallel_compile >/dev/null; then
    echo {quote(missing)} >&2
    exit 2
fi
"""


def pull_cache(job: JobFile, phase: str) -> str:
    """Copy compiled programs from the shared cache before training, which goes on without them."""
    if phase != "train" or not job.machine.neuron or not job.compile_cache:
        return ""
    return f"""# what the shared cache lacks is compiled
llamax cache pull {_place(job)} || echo "training goes on and compiles what is missing" >&2
"""


def _place(job: JobFile) -> str:
    return quote(f"--place={job.compile_cache}")


def torchrun(job: JobFile) -> list[str]:
    """The options of torchrun that are the same on all nodes; the first rank of each is shown."""
    options = ["--nproc-per-node", str(job.ranks), "--rdzv-id", job.name]
    return [*options, "--tee", "3", "--local-ranks-filter", "0"]


def logs(job: JobFile, phase: str) -> str:
    """``logs=FOLDER``: torchrun creates a folder for each node in it, with a file for each rank."""
    return f"logs={quote(f'{job.config.run.folder}/logs/{phase}')}\n"


PRIVATE = """# ranks of one machine rendezvous in a file of a private folder, and rank 0 listens on
# the loopback only; the folder is removed when torchrun has ended, however it ends
"""
# A process removes the folder at the end of its input, which is file descriptor 9 of torchrun and
# not of its ranks: so it is removed after SIGKILL too.
PRIVATE_FOLDER = (
    "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
    "meeting=$(mktemp -d) || exit",
    'exec 9> >(exec &>/dev/null; trap "" HUP INT TERM USR1; cat; rm -rf -- "$meeting")',
)
IN_A_FILE = (
    '--rdzv-backend c10d --rdzv-conf store_type=file --rdzv-endpoint "$meeting/store" '
    "--local-addr 127.0.0.1"
)


def on_each_node(job: JobFile, phase: str, options: str) -> str:
    """The command of a node as a ``bash -c``, so that names are expanded on the node itself."""
    commands = ['ulimit -S -n "$(ulimit -H -n)"']
    commands += PRIVATE_FOLDER if options == IN_A_FILE else ()
    commands += [
        f'exec {compiler(job, phase)}torchrun --log-dir "$0/$(uname -n)" {options} "$@"',
    ]
    script = "; ".join(commands)
    return f'bash -c {quote(script)} \\\n    "$logs" "${{options[@]}}" "${{program[@]}}"'


def prepare(job: JobFile, start: str = "exec") -> str:
    """``llamax prepare`` on one node; ``start``: the command that starts it."""
    words = ["python3", "-m", "llamax", "prepare"]
    words += command_line(job.prepare, job.config.data.path)
    return array("program", words) + f'{start} "${{program[@]}}"\n'


def title(job: JobFile, phase: str, launcher: str) -> str:
    """One line that describes a script."""
    if phase == "prepare":
        return f"tokenize with {count(job.prepare.workers, 'process', 'processes')}"
    first = "compile every graph of the run" if job.machine.neuron else "rehearse two steps"
    what = first if phase == "precompile" else "train"
    ranks = count(job.nodes * job.ranks, "rank")
    return f"{what} on {job.nodes} x {job.machine.name}, {ranks}, {launcher}"


TENSORBOARD = """if ! command -v tensorboard >/dev/null; then
    echo "tensorboard is not installed here; pip install 'llamax[tensorboard]'" >&2
    exit 2
fi
"""


def tensorboard(job: JobFile) -> str:
    """The script that serves TensorBoard on the loopback of this machine."""
    events = f"{job.config.run.folder}/tensorboard"
    path = f"{activate(job)}\n" if job.venv else ""
    return f"""{SHEBANG}
# {job.name}: curves at http://127.0.0.1:6006; from elsewhere ssh -L 6006:127.0.0.1:6006 HOST
set -euo pipefail
{enter_folder(job)}
{path}{TENSORBOARD}exec tensorboard --logdir {quote(events)} --host 127.0.0.1 --port 6006
"""


# ---- a process on this machine: torchrun and mpirun


# A process id may be in use again: a process is the one in a pid file if it also began then.  Who
# may write to the folder could put a pid file of another run there: each names its phase and run.
FUNCTIONS = """began() {  # when a process began, in clock ticks since boot where the kernel says so
    local stat
    if [[ -r /proc/$1/stat ]]; then
        stat=$(<"/proc/$1/stat")
        cut -d ' ' -f 20 <<<"${stat##*) }"
    else
        ps -o lstart= -p "$1" | tr -s ' '
    fi
}
this_run() { printf '%q' "${pid##*/} of $(realpath -m -- "$run")"; }
runs() {  # whether the process in the pid file runs; its id becomes $number
    local since of
    [[ -f $pid && ! -L $pid ]] && { read -r number since && read -r of; } <"$pid" &&
        [[ $of == "$(this_run)" ]] &&
        [[ $number =~ ^[1-9][0-9]*$ && $since && $since == "$(began "$number")" ]] &&
        [[ $(ps -ww -o args= -p "$number") == *llamax* ]]
}
"""


def pid_file(job: JobFile, phase: str) -> str:
    """Write the process id for ``stop`` and ``status``; refuse a link and a second run."""
    return f"""run={quote(job.config.run.folder)}
pid="$run/logs/{phase}-$(uname -n).pid"
{FUNCTIONS}for path in "$run/logs" "$pid"; do
    if [[ -L $path ]]; then
        echo "$path is a link to $(readlink -- "$path"); remove it" >&2
        exit 2
    fi
done
mkdir -p -- "$run/logs"
if runs; then
    echo "{phase} of $run already runs here as process $number; stop it first" >&2
    exit 2
fi
rm -f -- "$pid"
(umask 022 && set -o noclobber && printf '%s\\n' "$$ $(began $$)" "$(this_run)" >"$pid")
"""


LINKED_LOGS = """if [[ -L $run/logs ]]; then
    echo "$run/logs is a link to $(readlink -- "$run/logs"); remove it" >&2
    exit 2
fi
"""


IN_THE_TERMINAL = "prepare has no log: it writes to the terminal in which it was started"


def enter_folder(job: JobFile) -> str:
    """Go to the folder of a job, or end with a line that says that it is not here."""
    missing = f"there is no folder {job.folder} on this machine; use one that mounts it"
    return f"cd -- {quote(job.folder)} 2>/dev/null || {{ echo {quote(missing)} >&2; exit 2; }}"


def action(job: JobFile, phase: str, what: str, torchrun: bool = True) -> str:
    """The script of an action on a phase on this machine; ``torchrun``: whether it starts ranks."""
    start = f"{SHEBANG}\nset -euo pipefail\n{enter_folder(job)}\n"
    this = f"""run={quote(job.config.run.folder)}
pid="$run/logs/{phase}-$(uname -n).pid"
{FUNCTIONS}"""
    process = f"""{this}if ! runs; then
    echo "{phase}: no process of $run is running on $(uname -n)"
    exit 0
fi
if ! [[ -O $pid ]]; then
    echo "$pid belongs to another user, who may have written any process into it" >&2
    exit 2
fi
"""
    place, pattern, files = f"$run/logs/{phase}/$(uname -n)", "*/0/std*.log", 2
    if not torchrun:  # the losses are in the terminal of mpirun, the messages of rank 0 here
        place, pattern, files = "$run/logs", "*/rank-00000.log", 1
    newest = f"""{this}logs="{place}"
newest=$(if [[ -d $logs ]]; then find "$logs" -path '{pattern}' -printf '%T@ %p\\n'; fi |
    sort -n | tail -n {files} | cut -d ' ' -f 2-)
if [[ -z $newest ]]; then
    echo "no log yet in $(realpath -m -- "$logs")"
    exit 0
fi
follow=()  # as long as the job runs
if runs; then follow=(-F --pid="$number"); fi
tr '\\n' '\\0' <<<"$newest" | xargs -0 tail -n 100 "${{follow[@]}}"
"""
    clean = f"""{this}if runs; then
    echo "{phase} of $run runs here as process $number; stop it first" >&2
    exit 2
fi
{LINKED_LOGS}rm -rf -- "$run/logs/{phase}" "$run/logs/{phase}-processes" "$pid"
"""
    return (
        start
        + {
            "stop": f"""{process}kill -TERM "$number"
echo "{phase} of $run was asked to save and end; process $number then ends"
""",
            "status": process + 'ps -ww -o pid,etime,args -p "$number"\n',
            "logs": newest if phase != "prepare" else f"echo {quote(IN_THE_TERMINAL)}\n",
            "utilization": f"exec {job.machine.monitor}\n",
            "clean": clean,
        }[what]
    )
