"""The phase serve in a container of this machine.

::

    start     docker run --detach ──> wait for the line that says it is ready ──> a request to send
    stop      docker stop; the container and its log stay until the next start, or clean

The port is published on the loopback alone.  A key that clients must send is passed by the name of
its variable, so that no command line has it.

Sources: docker run(1), docker container inspect(1); the sources of ``llamax.launch.serving``.
"""

from __future__ import annotations

import csv
import io
import os.path
from collections.abc import Iterator
from shlex import quote

from llamax.launch import serving
from llamax.launch.jobfile import JobFile
from llamax.launch.script import SHEBANG, array, secrets

LITERAL = (
    "# shellcheck disable=SC2016,SC2054  # words in single quotes and commas are meant literally"
)
# Limit of /dev/shm, through which the processes of one model pass tensors.
SHARED_MEMORY = {"vllm": "16g", "tgi": "1g"}


def container(job: JobFile) -> str:
    """The name of the container."""
    return f"{job.name}-serve"


def render(job: JobFile) -> str:
    """The script that starts the server and waits until it answers."""
    server, model = serving.server(job), serving.folder(job)
    url = f"http://127.0.0.1:{job.serve.port}"
    lines = [
        SHEBANG,
        f"# {job.name}: {serving.title(job, 'docker')}",
        LITERAL,
        "set -euo pipefail",
        f"name={quote(container(job))}",
        f"ready={quote(server.ready)}",
        *_folder_check(job, model),
        *secrets(server.secrets),
        f"state=$(docker container ls --all {_filter(job)} --format '{{{{.State}}}}')",
    ]
    words = [*_options(job, server), server.image, *server.command[1:], *server.arguments]
    return (
        "\n".join([*lines, OLD])
        + array("run", words)
        + START
        + f"cat <<'END'\n{container(job)} answers at {url}; a request:\n"
        + f"{serving.request(job, url)}\nEND\n"
    )


OLD = """if [[ $state == running ]]; then
    echo "$name runs already; stop it first" >&2
    exit 2
elif [[ $state ]]; then
    docker container rm "$name" >/dev/null
fi
"""
START = """docker run "${run[@]}" >/dev/null
echo "$name loads the model; it is ready when its log has the words: $ready"
if ! grep --quiet --max-count 1 --fixed-strings -- "$ready" \\
    < <(docker logs --follow "$name" 2>&1); then
    docker logs --tail 40 "$name" >&2
    code=$(docker container inspect --format '{{.State.ExitCode}}' "$name")
    echo "$name ended with code $code before it was ready; its log is above" >&2
    exit 1
fi
"""


def _folder_check(job: JobFile, model: str) -> Iterator[str]:
    """End the script if there is no model; only llamax serves runs and checkpoints too."""
    exported = job.serve.engine != "llamax"
    file = quote(os.path.join(model, "config.json") if exported else model)
    missing = f"{model} is no exported folder: it has no config.json; run llamax consolidate"
    missing += ", or llamax merge for adapters"
    yield f"if [[ ! -e {file} ]]; then"
    yield f"    echo {quote(missing if exported else f'there is no {model} here')} >&2"
    yield "    exit 2\nfi"


def _filter(job: JobFile) -> str:
    """The option of docker container ls that finds this container alone."""
    return f"--filter {quote('name=^/?' + container(job).replace('.', '[.]') + '$')}"


def _options(job: JobFile, server: serving.Server) -> Iterator[str]:
    """The options of docker run."""
    machine, port = job.server_machine, job.serve.port
    yield from ("--detach", "--name", container(job), "--label", f"llamax={job.name}")
    yield from ("--publish", f"127.0.0.1:{port}:{port}")
    yield from ("--mount", _mount(serving.folder(job)))
    if machine.backend == "cuda":
        whole = serving.devices(job) == machine.ranks
        yield from ("--gpus", "all" if whole else str(serving.devices(job)))
    elif machine.neuron:
        yield from (f"--device=/dev/neuron{chip}" for chip in range(serving.chips(job)))
        yield from ("--cap-add", "SYS_ADMIN", "--cap-add", "IPC_LOCK")
    if size := SHARED_MEMORY.get(job.serve.engine):
        yield from ("--shm-size", size)
    for name, value in server.environment.items():
        yield from ("--env", f"{name}={value}")
    for name, _ in server.secrets:
        yield from ("--env", name)
    if server.command:
        yield from ("--entrypoint", server.command[0])


def _mount(folder: str) -> str:
    """The value of --mount, which docker reads as one line of CSV."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(
        ["type=bind", f"source={folder}", f"target={serving.MODEL}", "readonly"]
    )
    return line.getvalue()


def action(job: JobFile, what: str) -> str:
    """The script of an action on the server."""
    name, found = quote(container(job)), f"docker container ls --all {_filter(job)}"
    exists = f"""found=$({found} --quiet)
if [[ -z $found ]]; then
    echo {quote(f"there is no container {container(job)}")}
    exit 0
fi
"""
    return (
        f"{SHEBANG}\nset -euo pipefail\n"
        + {
            "stop": f"{exists}docker stop {name} >/dev/null\necho {name} has stopped\n",
            "status": f"{exists}{found}\n",
            "logs": f"{exists}exec docker logs --follow --tail 100 {name}\n",
            "utilization": f"exec {job.server_machine.monitor}\n",
            "clean": f"{exists}docker container rm --force {name} >/dev/null\n",
        }[what]
    )
