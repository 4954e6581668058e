"""Checks of a job against the rules of each launcher, before anything starts.

Sources: Kubernetes, "Object Names and IDs" (RFC 1035 and 1123 labels); mpi-operator's validation
(the last worker's host name is a label); sbatch(1).
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator
from shlex import quote

from llamax.config.data_path import RANDOM, blend_words, datasets_in
from llamax.launch import (
    cluster_checks,
    image,
    prepare,
    sagemaker_checks,
    sagemaker_serve,
    serving,
    slurm,
)
from llamax.launch.environment import RESERVED
from llamax.launch.forms import image_problem, inside
from llamax.launch.jobfile import JobFile
from llamax.runtime.address import CACHES, problem, protocol
from llamax.runtime.errors import ConfigError, join_or
from llamax.runtime.units import count

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
SUBDOMAIN = re.compile(rf"{LABEL.pattern}(\.{LABEL.pattern})*")
SLURM_WORD = re.compile(r"[A-Za-z0-9_.,-]*")
SLURM_TIME = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})?")
SLURM_SIGNAL_S = 65535
SLURM_PATH = re.compile(r"[A-Za-z0-9._/@+=,-]*")
HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")


def problems(job: JobFile, launcher: str, phase: str) -> list[str]:
    """All problems of ``job`` on a launcher and in a phase, one line each."""
    if phase == "serve":
        return _serve(job, launcher)
    found = list(_job(job))
    if phase == "cluster":
        return found or [
            *cluster_checks.problems(job, launcher),
            *(_kubernetes(job) if launcher == "k8s" else ()),
        ]
    if launcher not in ("k8s", "sagemaker"):  # they have stricter rules, below
        found += _name(job)
    runs = not found and not (wrong := list(_run(job)))
    if not found:
        found += wrong
        found += sagemaker_checks.instance_type(job) if launcher == "sagemaker" else []
    if launcher == "sagemaker":
        found += sagemaker_checks.problems(job, phase, runs)
    else:
        found += _shared(job)
    if phase == "image" and not found:
        found += _image(job)
    if phase == "prepare":
        found += prepare.problems(job.prepare)
        found += [] if found or launcher == "sagemaker" else _prepared(job)
    special = {"torchrun": _torchrun, "mpirun": _mpirun, "slurm": _slurm, "k8s": _kubernetes}
    if launcher in special:
        found += special[launcher](job)
    if launcher == "k8s":
        found += _image_name(job)
    return found


def _serve(job: JobFile, launcher: str) -> list[str]:
    """All problems of a server; the run that trained its model does not matter."""
    found = list(_environment(job))
    try:
        found += serving.problems(job)
        found += sagemaker_serve.problems(job) if launcher == "sagemaker" else []
    except ConfigError as error:
        found.append(first_problem(error))
    found += [*image_problem("image", job.image), *image_problem("serve.image", job.serve.image)]
    if launcher != "sagemaker" and not job.serve.model:
        found.append(
            "serve.model is empty; set it to the folder that llamax consolidate or merge wrote"
        )
    elif launcher != "sagemaker" and protocol(job.serve.model):
        found.append(
            f"serve.model={job.serve.model!r} is an address, not a path; copy it to a folder, or "
            "use --on sagemaker and sagemaker.model"
        )
    if launcher == "k8s":
        found += _kubernetes(job)
        if not inside(serving.folder(job), job.storage.mount or "/"):
            found.append(
                f"serve.model={job.serve.model!r} is not below storage.mount={job.storage.mount}; "
                "export the model there"
            )
    elif launcher == "sagemaker":
        found += sagemaker_checks.name(job)
    else:
        found += _name(job)
        if not os.path.isabs(serving.folder(job)):
            found.append(
                f"serve.model={job.serve.model!r} is relative, but storage.mount is empty; use an "
                "absolute path"
            )
    return found


def _name(job: JobFile) -> Iterator[str]:
    if not NAME.fullmatch(job.name):
        yield (
            f"name={job.name!r} cannot name files and objects; use up to 63 letters, digits, - _ "
            "and ."
        )


def _job(job: JobFile) -> Iterator[str]:
    try:
        cores, unit = job.machine.ranks, job.machine.unit
    except ConfigError as error:
        yield first_problem(error)
        return
    if job.local and not job.ranks_per_node:
        yield "ranks_per_node=0: instance=local has no default number of ranks; use 1 or more"
    elif not job.local and job.ranks_per_node > cores:
        yield (
            f"ranks_per_node={job.ranks_per_node} but {job.machine.name} has {cores} {unit}; "
            f"use {cores} or less, or more nodes"
        )
    machine, asked, counts = job.machine, job.ranks_per_node, job.machine.rank_counts
    if counts and 0 < asked <= cores and asked not in counts:
        yield (
            f"ranks_per_node={asked}: Neuron has no collectives between {asked} of the "
            f"{cores} {unit} of {machine.name}; use {join_or(counts)}"
        )
    try:
        job.sdk  # noqa: B018
    except ConfigError as error:
        yield first_problem(error)
    if machine.backend != "cpu" and not machine.devices:
        yield (
            f"{job.instance}: {machine.name}.devices=0, but a job asks for its {machine.unit}; "
            "write the number of chips or GPUs of a node"
        )
    if protocol(job.compile_cache) and (why := problem(job.compile_cache, CACHES)):
        yield f"compile_cache={job.compile_cache!r} {why}"
    yield from _environment(job)


def _environment(job: JobFile) -> Iterator[str]:
    for table, pairs in (("environment", job.environment), ("secrets", job.secrets)):
        for key, _ in pairs:
            if key in RESERVED:
                yield f"{table}.{key} is set for each rank by its launcher; remove it"
    for key, path in job.secrets:
        if key in dict(job.environment):
            yield f"secrets.{key} is in the table environment too; remove one of the two"
        if not os.path.isabs(path):
            yield f"secrets.{key}={path!r} is not an absolute path; name a file with the value"


def _image(job: JobFile) -> Iterator[str]:
    try:
        image.base_image(job)
    except ConfigError as error:
        yield first_problem(error)


def _run(job: JobFile) -> Iterator[str]:
    """Problems of the configuration on the ranks of the job."""
    try:
        config = job.config
    except ConfigError as error:
        where = f"{job.nodes} x {job.machine.name} = {count(job.nodes * job.ranks, 'rank')}"
        yield f"{where}: {first_problem(error)}"
        return
    machine = job.machine
    if machine.devices and config.run.backend not in machine.backends:
        yield (
            f"run.backend={config.run.backend} on {machine.name} leaves its {machine.unit} idle; "
            f"use overrides run.backend={machine.backend}, or another instance"
        )


def first_problem(error: ConfigError) -> str:
    """An error in one line: its first problem, and the number of the others."""
    head, *several = str(error).split("\n  ")
    if not several:
        return head
    return f"{head.rpartition(':')[0]}: {several[0]}; and {len(several) - 1} more"


def _shared(job: JobFile) -> Iterator[str]:
    """Problems of paths: working folder, dataset and run folder must be on the shared storage."""
    mount, folder = job.storage.mount, job.folder
    for key, value in (("storage.mount", mount), ("storage.folder", folder)):
        if not os.path.isabs(value):
            yield (
                f"{key}={value!r} is not an absolute path; use one that is the same on every node, "
                "such as /fsx"
            )
            return
    if not inside(folder, mount):
        yield f"storage.folder={folder} is not below storage.mount={mount}; put it there"
        return
    try:
        config = job.config
    except ConfigError:
        return  # reported by _run
    paths = [path for path in datasets_in(config.data.path) if path != RANDOM]
    named = [*(("data.path", path) for path in paths), ("run.folder", config.run.folder)]
    for key, value in named:
        if not job.local and not inside(os.path.join(folder, value), mount):
            yield (
                f"{key}={value} is not below storage.mount={mount}: each node would have a "
                f"different one; use overrides {key}={mount.rstrip('/')}/{os.path.basename(value)}"
            )


def _prepared(job: JobFile) -> Iterator[str]:
    """The problem of a data.path into which prepare cannot write."""
    if (path := job.config.data.path) == RANDOM:
        yield (
            f"data.path={path} names tokens that training makes itself; use overrides data.path "
            "with the folder to prepare"
        )
    elif blend_words(path):
        yield (
            f"data.path={path!r} is a blend; prepare writes one dataset: use overrides data.path "
            "with the folder of one, in a job file for each"
        )


def _torchrun(job: JobFile) -> Iterator[str]:
    if job.nodes > 1 and not job.torchrun.master:
        yield f"torchrun.master is empty; with nodes={job.nodes} set it to the first node"
    elif job.torchrun.master and not HOST.fullmatch(job.torchrun.master):
        yield (
            f"torchrun.master={job.torchrun.master!r} is no name or IPv4 address of a machine; use "
            "one such as trn1-0 or 10.0.0.1, without a port: it is port"
        )


def _mpirun(job: JobFile) -> Iterator[str]:
    if job.nodes > 1 and not job.mpirun.hostfile:
        yield f"mpirun.hostfile is empty; with nodes={job.nodes} set it to a file that lists them"


def _slurm(job: JobFile) -> Iterator[str]:
    for key in ("partition", "account"):
        if not SLURM_WORD.fullmatch(value := getattr(job.slurm, key)):
            yield f"slurm.{key}={value!r} is not a name in Slurm; use letters, digits, - _ . and ,"
    if not SLURM_TIME.fullmatch(job.slurm.time_limit):
        yield (
            f"slurm.time_limit={job.slurm.time_limit!r} is not a time; use 2-00:00:00 for two days"
        )
    elif job.slurm.signal_s > SLURM_SIGNAL_S:
        yield (
            f"slurm.signal_s={job.slurm.signal_s} is above the limit of sbatch; use "
            f"{SLURM_SIGNAL_S} or less"
        )
    elif 0 < (limit_s := slurm.seconds(job.slurm.time_limit)) <= job.slurm.signal_s:
        yield f"slurm.signal_s={job.slurm.signal_s} is not below slurm.time_limit, {limit_s} s"
    if not SLURM_PATH.fullmatch(job.folder):
        yield (
            f"storage.folder={job.folder!r} has characters that #SBATCH lines cannot have; use "
            "letters, digits and ._/@+=,-"
        )
    if job.slurm.cpus and not job.local:
        yield (
            f"slurm.cpus={job.slurm.cpus} but a job has whole nodes of {job.instance}; use "
            "slurm.cpus=0, or instance=local"
        )


def _kubernetes(job: JobFile) -> Iterator[str]:
    yield from image_problem("base_image", job.base_image)
    if job.secrets and not job.kubernetes.secret:
        files = "".join(f" --from-file={quote(f'{key}={path}')}" for key, path in job.secrets)
        yield (
            "kubernetes.secret is empty, but there are secrets; set it to a Secret with their "
            f"names as keys: kubectl create secret generic NAME{files}"
        )
    last = f"{job.name}-precompile-worker-{job.nodes - 1}"
    if not LABEL.fullmatch(job.name) or job.name[0].isdigit():
        yield (
            f"name={job.name!r} is refused by Kubernetes; use lower-case letters, digits and -, "
            "with a letter first"
        )
    elif len(last) > 63:
        yield (
            f"name={job.name!r} is too long: its last pod {last} has {len(last)} characters, "
            f"Kubernetes allows 63; use {len(job.name) - len(last) + 63} or less"
        )
    mount = job.storage.mount
    if os.path.isabs(mount) and (":" in mount or not mount.strip("/")):
        yield (
            f"storage.mount={mount!r} is refused by Kubernetes; use one such as /fsx, without a "
            "colon and below /"
        )
    if not job.storage.claim:
        yield (
            "storage.claim is empty; set it to the PersistentVolumeClaim of the FSx for Lustre "
            "file system, as kubectl get pvc lists it"
        )
    names = (
        ("storage.claim", job.storage.claim, SUBDOMAIN, 253, ", - and ."),
        ("kubernetes.namespace", job.kubernetes.namespace, LABEL, 63, " and -"),
        ("kubernetes.secret", job.kubernetes.secret, SUBDOMAIN, 253, ", - and ."),
        ("kubernetes.service_account", job.kubernetes.service_account, SUBDOMAIN, 253, ", - and ."),
    )
    for key, value, allowed, longest, signs in names:
        if value and not (len(value) <= longest and allowed.fullmatch(value)):
            yield (
                f"{key}={value!r} is refused by Kubernetes; use lower-case letters, digits{signs}"
            )


def _image_name(job: JobFile) -> Iterator[str]:
    if not job.image:
        yield "image is empty; set it to the image that --phase image builds"
    yield from image_problem("image", job.image)
