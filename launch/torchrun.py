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
        f"{node}) {run} --nnodes {job.nodes} --node-rank {node} {where} {rest} ;;"
        for node in range(job.nodes)
    ]
    usage = f"the number of this node is missing: 0 on the master, up to {job.nodes - 1}"
    lines += [f'*) echo "{usage}" >&2 && exit 2 ;;']
    return f"{text}case ${{1-}} in\n" + "\n".join(lines) + "\nesac\n"
