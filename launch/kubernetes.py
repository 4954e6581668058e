"""Kubernetes manifests: MPIJobs for precompile and train, a Job for prepare, two helper pods.

::

    MPIJob ── launcher: mpirun, started when all workers are ready
          └── workers: sshd; all devices and EFA of a node, /dev/shm in memory, FSx for Lustre

Stopping deletes the MPIJob.  The first process of a worker is sshd, and all ranks would end with it
immediately.  So a preStop hook of each worker tells the ranks to save and waits for them; one of
the launcher delays SIGTERM, because mpirun would kill the ranks before they have saved.

Sources: Kubeflow MPI Operator, API v2beta1; Kubernetes API v1 (1.25 and later), "Define Dependent
Environment Variables" for the expansion of commands; the device plugins of AWS Neuron, NVIDIA and
EFA.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from shlex import quote
from typing import Any

import yaml

from llamax.launch import mpirun
from llamax.launch.jobfile import JobFile
from llamax.launch.script import SHEBANG, head, prepare, title

GRACE_S = 300  # time to write a checkpoint when the job is stopped
WAIT_S = 60  # the rest of it, for mpirun
EXPANDED = re.compile(r"\$\$|\$\([A-Za-z_][A-Za-z0-9_.-]*\)")
KINDS = {  # of the object that runs a phase
    "train": "mpijob",
    "precompile": "mpijob",
    "prepare": "job",
    "tensorboard": "pod",
    "shell": "pod",
    "serve": "deployment",
}
OBJECTS = (*KINDS.items(), ("serve", "service"))  # all that a job may have made
WORD = re.compile(r"[A-Za-z/][A-Za-z0-9./_-]*")
NOT_WORDS = {"y", "n", "yes", "no", "true", "false", "on", "off", "null"}
SSHD = "ssh-keygen -A && exec /usr/sbin/sshd -De"  # host keys of this pod alone
SAVE = """pkill -TERM -f '[l]lamax.train' || exit 0
while pgrep -f '[l]lamax.train' >/dev/null; do sleep 1; done
"""


def name(job: JobFile, phase: str) -> str:
    """The name of the Kubernetes object of a phase."""
    return job.name if phase == "train" else f"{job.name}-{phase}"


def render(job: JobFile, phase: str) -> str:
    """The manifest of a phase."""
    make = {"shell": _shell, "tensorboard": _tensorboard, "prepare": _prepare}
    return dump(make[phase](job) if phase in make else _mpijob(job, phase))


class _Dumper(yaml.SafeDumper):  # type: ignore[misc, unused-ignore]  # no stubs
    """Block style with indented lists, and every repeated value written in full."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, indentless=False)

    def ignore_aliases(self, data: object) -> bool:
        return True

    def text(self, text: str) -> yaml.ScalarNode:
        """A script as a literal block; any other text in double quotes, unless it is a plain word.

        PyYAML writes YAML 1.1 and leaves plain what Kubernetes reads as a number (``1e3``).
        """
        plain = WORD.fullmatch(text) and text.lower() not in NOT_WORDS
        style = "|" if "\n" in text.rstrip("\n") else None if plain else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.text)


def dump(manifest: dict[str, Any]) -> str:
    """A manifest as YAML, its keys in the order of the dictionary."""
    text: str = yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=math.inf)
    return text


def metadata(job: JobFile, phase: str) -> dict[str, Any]:
    """The metadata of the objects of a phase."""
    return {
        "name": name(job, phase),
        "namespace": job.kubernetes.namespace,
        "labels": {"app.kubernetes.io/name": "llamax", "app.kubernetes.io/instance": job.name},
    }


def _mpijob(job: JobFile, phase: str) -> dict[str, Any]:
    launch = mpirun.render(job, phase, container=True)
    machine = job.machine
    counts = {machine.resource: machine.devices, "vpc.amazonaws.com/efa": machine.efa}
    devices = {resource: str(count) for resource, count in counts.items() if count}
    kind = machine.instance_type if machine.devices else ""
    node = {"node.kubernetes.io/instance-type": kind} if kind else {}
    save = ["/bin/bash", "-c", SAVE]
    wait = ["sleep", str(GRACE_S - WAIT_S)]  # mpirun may end earlier
    return {
        "apiVersion": "kubeflow.org/v2beta1",
        "kind": "MPIJob",
        "metadata": metadata(job, phase),
        "spec": {
            "slotsPerWorker": mpirun.slots(job, phase),
            "launcherCreationPolicy": "WaitForWorkersReady",
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": 20},
            "mpiReplicaSpecs": {
                "Launcher": {
                    "replicas": 1,
                    "restartPolicy": "OnFailure",
                    "template": {
                        "spec": pod(
                            job,
                            ["/bin/bash", "-c", launch],
                            container=_before_stop(wait) | _secrets(job),
                        )
                    },
                },
                "Worker": {
                    "replicas": job.nodes,
                    "restartPolicy": "OnFailure",
                    "template": {
                        "spec": pod(
                            job,
                            ["/bin/bash", "-c", SSHD],
                            {"requests": devices, "limits": devices},
                            container=_before_stop(save),
                            pod={"nodeSelector": node},
                        )
                    },
                },
            },
        },
    }


def secrets(job: JobFile, pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """The variables of a container that hold keys of the Secret."""
    return [
        {
            "name": name,
            "valueFrom": {"secretKeyRef": {"name": job.kubernetes.secret, "key": name}},
        }
        for name, _ in pairs
    ]


def _secrets(job: JobFile) -> dict[str, Any]:
    """The secrets of a run; mpirun passes them to workers."""
    variables = secrets(job, job.secrets)
    return {"env": variables} if variables else {}


def _before_stop(command: list[str]) -> dict[str, Any]:
    """A hook that a container runs before it gets SIGTERM."""
    return {"lifecycle": {"preStop": {"exec": {"command": command}}}}


def _prepare(job: JobFile) -> dict[str, Any]:
    text = head(job, title(job, "prepare", "Kubernetes"), container=True)
    command = ["/bin/bash", "-c", text + prepare(job)]
    resources = {"requests": {"cpu": str(job.prepare.workers)}}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(job, "prepare"),
        "spec": {
            "backoffLimit": 4,
            "template": {
                "spec": pod(job, command, resources, _secrets(job), {"restartPolicy": "OnFailure"}),
            },
        },
    }


def _shell(job: JobFile) -> dict[str, Any]:
    """A pod with the variables of the job file, such as HF_HOME on the storage."""
    variables = [{"name": name, "value": escape(value)} for name, value in job.environment]
    manifest = _helper(job, "shell", ["sleep", "infinity"])
    if variables := [*variables, *secrets(job, job.secrets)]:
        manifest["spec"]["containers"][0]["env"] = variables
    return manifest


def _tensorboard(job: JobFile) -> dict[str, Any]:
    events = f"{job.config.run.folder}/tensorboard"
    words = ["tensorboard", "--logdir", events, "--host", "127.0.0.1", "--port", "6006"]
    return _helper(job, "tensorboard", words)


def _helper(job: JobFile, phase: str, command: list[str]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata(job, phase),
        "spec": pod(job, command),
    }


def pod(
    job: JobFile,
    command: list[str],
    resources: dict[str, Any] | None = None,
    container: dict[str, Any] | None = None,
    pod: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A pod of one container in the job's folder, with shared storage and /dev/shm in memory."""
    account = job.kubernetes.service_account
    spec = {
        "containers": [
            {
                "name": "llamax",
                "image": job.image,
                **({"command": [escape(word) for word in command]} if command else {}),
                "workingDir": job.folder,
                "resources": resources or {},
                "volumeMounts": [
                    {"name": "storage", "mountPath": job.storage.mount},
                    {"name": "shm", "mountPath": "/dev/shm"},
                ],
                **(container or {}),
            }
        ],
        "serviceAccountName": account,
        "terminationGracePeriodSeconds": GRACE_S,
        "volumes": [
            {"name": "storage", "persistentVolumeClaim": {"claimName": job.storage.claim}},
            {
                "name": "shm",
                "emptyDir": {"medium": "Memory", "sizeLimit": f"{job.kubernetes.shm_gib}Gi"},
            },
        ],
        **(pod or {}),
    }
    return {key: value for key, value in spec.items() if value}


def escape(word: str) -> str:
    """A word of a command with $ escaped where Kubernetes would expand $$ or $(NAME)."""
    return word.replace("$", "$$") if EXPANDED.search(word) else word


def action(job: JobFile, phase: str, what: str) -> str:
    """The script of an action on a phase: stop, status, logs, utilization or clean."""
    kubectl = f"kubectl --namespace {quote(job.kubernetes.namespace)}"
    this = quote(name(job, phase))
    kind = KINDS[phase]
    source = f"job/{this}-launcher" if kind == "mpijob" else f"{kind}/{this}"
    pods = {
        "job": f"--selector job-name={this}",
        "pod": this,
        "mpijob": f"--selector training.kubeflow.org/job-name={this}",
        "deployment": f"--selector app.kubernetes.io/instance={quote(job.name)},"
        "app.kubernetes.io/component=serve",
    }[kind]
    ends = "  # ranks save, then end" if kind == "mpijob" else ""
    worker, monitor = f"pod/{this}-worker-0", job.machine.monitor
    if kind == "deployment":
        worker, monitor = f"deployment/{this}", job.server_machine.monitor

    def present(thing: str, what: str) -> str:
        """End the script where an object is not there."""
        return f"""found=$({kubectl} get {thing} --ignore-not-found --output name)
if [[ -z $found ]]; then
    echo {quote(f"{thing} is not there{what}")}
    exit 0
fi
"""

    return (
        f"{SHEBANG}\nset -euo pipefail\n"
        + {
            "stop": f"{kubectl} delete {kind}/{this} --ignore-not-found{ends}\n",
            "status": present(f"{kind}/{this}", "")
            + f"{kubectl} get {kind}/{this}\n{kubectl} get pods {pods} --output wide\n",
            "logs": present(source, ": no log yet")
            + f"exec {kubectl} logs --follow --tail 100 {source}\n",
            "utilization": present(worker, "")
            + f"exec {kubectl} exec --stdin --tty {worker} -- {monitor}\n",
            "clean": f"{kubectl} delete --ignore-not-found "
            + " ".join(f"{kind}/{quote(name(job, each))}" for each, kind in OBJECTS)
            + "\n",
        }[what]
    )
