"""A script that runs torchrun: the same one on every node, with the number of the node.

The ranks of one machine rendezvous in a file of a private folder and listen on no network.  Several
nodes rendezvous at a port of the first node, which torchrun opens on all interfaces without a
password: keep the nodes in a private network.

Source: torchrun's documentation (torch.distributed.run), static rendezvous.
"""

from __future__ import annotations

from shlex import quote

from llamax.launch.jobfile import JobFile
from llamax.launch.script import (
    IN_A_FILE,
    PRIVATE,
    PRIVATE_FOLDER,
    array,
    compiler,
    head,
    logs,
    needs_compiler,
    pid_file,
    prepare,
    program,
    pull_cache,
    title,
    torchrun,
)


def render(job: JobFile, phase: str) -> str:
    """The script of a node; with several nodes its first argument is the number of the node."""
    text = head(job, title(job, phase, "torchrun")) + pid_file(job, phase)
    if phase == "prepare":
        return text + prepare(job)
    text += needs_compiler(job, phase) + pull_cache(job, phase)
    text += logs(job, phase)
    text += array("options", torchrun(job)) + array("program", program(job, phase))
    run = f"exec {compiler(job, phase)}torchrun"
    rest = '--log-dir "$logs/$(uname -n)" "${options[@]}" "${program[@]}"'
    if job.nodes == 1:
        lines = [*PRIVATE_FOLDER, f"{run} {IN_A_FILE} \\", f"    {rest}"]
        return text + PRIVATE + "\n".join(lines) + "\n"
    where = f"--master-addr {quote(job.torchrun.master)} --master-port {job.port}"
    lines = [
        f"{node}) {f'exec 9> >(say_waiting {node}); ' if node else ''}{run} --nnodes {job.nodes} "
        f"--node-rank {node} {where} {rest} ;;"
        for node in range(job.nodes)
    ]
    usage = f"the number of this node is missing: 0 on the master, up to {job.nodes - 1}"
    lines += [f'*) echo "{usage}" >&2 && exit 2 ;;']
    text += f"master={quote(job.torchrun.master)} port={job.port}\n{WAITING}"
    return f"{text}case ${{1-}} in\n" + "\n".join(lines) + "\nesac\n"


# torchrun says nothing for the minutes for which it waits for the master.  What says it here ends
# at the end of its input, which is file descriptor 9 of torchrun and not of its ranks.
WAITING = """say_waiting() {  # until the master answers, or this script has ended
    local status waited=0
    while status=0; read -r -t 30 || status=$?; ((status > 128)); do
        timeout 5 bash -c ': <"/dev/tcp/$0/$1"' "$master" "$port" 2>/dev/null && return 0
        ((waited += 30))
        echo "node $1 has waited $waited s: nothing answers at port $port of torchrun.master," \\
            "$master; start this script there with 0" >&2
    done
}
"""
