"""Checks of a job against the rules of each launcher, before anything starts.

Sources: Kubernetes, "Object Names and IDs" (RFC 1035 and 1123 labels); mpi-operator's validation
(the last worker's host name is a label); the grammar of Docker's image references; sbatch(1);
SageMaker, CreateTrainingJob.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator
from shlex import quote

from llamax.launch import cluster_checks, image, prepare, sagemaker, sagemaker_serve, serving, slurm
from llamax.launch.environment import RESERVED
from llamax.launch.jobfile import JobFile
from llamax.runtime.errors import ConfigError
from llamax.runtime.hub_name import hub_name
from llamax.runtime.units import count

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
SUBDOMAIN = re.compile(rf"{LABEL.pattern}(\.{LABEL.pattern})*")
PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
IMAGE = re.compile(
    rf"(?:(?:localhost|[\w-]+(?:\.[\w-]+)+)(?::\d+)?/|[\w-]+:\d+/)?{PART}(?:/{PART})*"
    r"(?::\w[\w.-]{0,127})?(?:@sha256:[0-9a-f]{64})?",
    re.ASCII,
)
SLURM_WORD = re.compile(r"[A-Za-z0-9_.,-]*")
SLURM_TIME = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})?")
SLURM_PATH = re.compile(r"[A-Za-z0-9._/@+=,-]*")
BLEND = re.compile(r"\s*\d*\.?\d+\s+\S")
INSTANCE_TYPE = re.compile(r"(?!ml\.)[a-z0-9-]+\.[a-z0-9-]+")
SAGEMAKER_NAME = re.compile(r"[A-Za-z0-9](-*[A-Za-z0-9])*")


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
    if not found:
        found += _run(job)
        if launcher == "sagemaker":
            found += _instance_type(job)
    found += _sagemaker(job, phase) if launcher == "sagemaker" else _shared(job)
    if phase == "image" and not found:
        found += _image(job)
    if phase == "prepare":
        found += prepare.problems(job.prepare)
        found += [] if found or launcher == "sagemaker" else _blend(job)
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
    for key, value in (("image", job.image), ("serve.image", job.serve.image)):
        if value and not IMAGE.fullmatch(value):
            found.append(_no_image(key, value))
    if launcher != "sagemaker" and not job.serve.model:
        found.append(
            "serve.model is empty; set it to the folder that llamax consolidate or merge wrote"
        )
    if launcher == "k8s":
        found += _kubernetes(job)
        if not _inside(serving.folder(job), job.storage.mount or "/"):
            found.append(
                f"serve.model={job.serve.model!r} is not below storage.mount={job.storage.mount}; "
                "export the model there"
            )
    elif launcher == "sagemaker":
        found += _sagemaker_name(job)
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
    machine = job.machine
    try:
        job.sdk  # noqa: B018
    except ConfigError as error:
        yield first_problem(error)
    if machine.backend != "cpu" and not machine.devices:
        yield (
            f"{job.instance}: {machine.name}.devices=0, but a job asks for its {machine.unit}; "
            "write the number of chips or GPUs of a node"
        )
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


def _instance_type(job: JobFile) -> Iterator[str]:
    if not job.local and not job.machine.instance_type:
        yield (
            f"instance={job.instance!r}: {job.machine.name} is no instance type of AWS; name the "
            'table after the type, such as ["p5.4xlarge"]'
        )


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
    if not _inside(folder, mount):
        yield f"storage.folder={folder} is not below storage.mount={mount}; put it there"
        return
    try:
        config = job.config
    except ConfigError:
        return  # reported by _run
    for key, value in (("data.path", config.data.path), ("run.folder", config.run.folder)):
        if not job.local and not _inside(os.path.join(folder, value), mount):
            yield (
                f"{key}={value} is not below storage.mount={mount}: each node would have a "
                f"different one; use overrides {key}={mount.rstrip('/')}/{os.path.basename(value)}"
            )


def _inside(path: str, mount: str) -> bool:
    path, mount = os.path.normpath(path), os.path.normpath(mount)
    return path == mount or path.startswith(mount.rstrip("/") + "/")


def _blend(job: JobFile) -> Iterator[str]:
    if BLEND.match(path := job.config.data.path):
        yield (
            f"data.path={path!r} is a blend; prepare writes one dataset: use overrides data.path "
            "with the folder of one, in a job file for each"
        )


def _torchrun(job: JobFile) -> Iterator[str]:
    if job.nodes > 1 and not job.torchrun.master:
        yield f"torchrun.master is empty; with nodes={job.nodes} set it to the first node"


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


def _base_image(job: JobFile) -> Iterator[str]:
    if job.base_image and not IMAGE.fullmatch(job.base_image):
        yield (
            f"base_image={job.base_image!r} is not an image name; use registry/repository:tag in "
            "lower case"
        )


def _kubernetes(job: JobFile) -> Iterator[str]:
    yield from _base_image(job)
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
    elif not IMAGE.fullmatch(job.image):
        yield _no_image("image", job.image)


def _no_image(key: str, name: str) -> str:
    return f"{key}={name!r} is not an image name; use registry/repository:tag in lower case"


def _sagemaker(job: JobFile, phase: str) -> Iterator[str]:
    yield from _base_image(job)
    if job.secrets and not job.sagemaker.secret:
        yield (
            "sagemaker.secret is empty, but there are secrets; set it to the name or ARN of a JSON "
            "object in AWS Secrets Manager that has their names"
        )
    yield from _sagemaker_name(job)
    if not IMAGE.fullmatch(job.image):
        yield (
            f"image={job.image!r} is not an image name; set it to the image that --phase image "
            "builds"
        )
    if not job.sagemaker.role:
        yield "sagemaker.role is empty; set it to the IAM role that SageMaker assumes"
    if not job.sagemaker.data:
        yield "sagemaker.data is empty; set it to the s3:// or file:// folder of the dataset"
    if phase == "prepare":
        yield from _sagemaker_prepare(job)
    elif job.sagemaker.local:
        if job.nodes > 1 or not (job.local or job.machine.backend == "cuda"):
            yield (
                f"sagemaker.local=true runs on the CPU or the GPUs of this machine, not on "
                f"{job.nodes} x {job.instance}; try with instance=local and a small recipe, or use "
                "sagemaker.local=false"
            )
    elif job.local:
        yield "instance=local but sagemaker.local=false; use an instance such as trn1.32xlarge"
    elif not job.sagemaker.output.startswith("s3://"):
        yield (
            f"sagemaker.output={job.sagemaker.output!r} is not an s3:// folder; checkpoints are "
            "written there"
        )
    if phase == "train":
        yield from _sagemaker_base(job)


def _sagemaker_base(job: JobFile) -> Iterator[str]:
    """Whether the model to start from is where the containers can read it."""
    base, given = job.sagemaker.base, job.config.checkpoint.init_from
    if base:
        if not base.startswith(("s3://", "file:///")):
            yield f"sagemaker.base={base!r} is not a folder; use s3://bucket/base or file:///base"
    elif given and not os.path.isabs(given) and hub_name(given) is None:
        yield (
            f"checkpoint.init_from={given} is a folder that containers of SageMaker do not have; "
            "copy it to S3 and set sagemaker.base, or give its name on the Hub"
        )


def _sagemaker_name(job: JobFile) -> Iterator[str]:
    if not SAGEMAKER_NAME.fullmatch(job.name) or len(job.name) > sagemaker.LONGEST_NAME:
        yield (
            f"name={job.name!r} is refused by SageMaker; use letters, digits and -, up to "
            f"{sagemaker.LONGEST_NAME} of them"
        )


def _sagemaker_prepare(job: JobFile) -> Iterator[str]:
    """Problems of a processing job; all of its files are in one folder on S3 or here."""
    settings = job.sagemaker
    if settings.local:
        yield (
            "sagemaker.local=true has no phase prepare; use --on torchrun on this machine, or "
            "sagemaker.local=false"
        )
        return
    if settings.data and not settings.data.startswith("s3://"):
        yield f"sagemaker.data={settings.data!r} is not an s3:// folder; tokens are written there"
    if not settings.inputs.startswith(("s3://", "file:///")):
        yield (
            f"sagemaker.inputs={settings.inputs!r} is not a folder; set it to the s3:// or "
            "file:/// folder with the files that [prepare] names"
        )
    if not INSTANCE_TYPE.fullmatch(settings.prepare_instance):
        yield (
            f"sagemaker.prepare_instance={settings.prepare_instance!r} is not an instance type; "
            "use one such as c5.9xlarge, without ml."
        )
    for key, path in prepare.paths(job.prepare):
        if not _inside(os.path.join(sagemaker.TEXT, path), sagemaker.TEXT):
            yield (
                f"prepare.{key}={path!r} is not in sagemaker.inputs; use a path that is relative "
                "to it"
            )
