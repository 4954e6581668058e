"""A job: one TOML file that every launcher renders.

::

    name = "llama2-7b"
    recipe = "llama2-7b"              what to train: a recipe and what is changed in it
    [overrides]
    data.path = "tokens"
    [storage]                         where it reads and writes: the same path on every node
    mount = "/fsx"
    claim = "fsx"
    nodes, instance, image            what it runs on
    [torchrun] [mpirun] [slurm] ...   settings of one launcher

Job files are read as strictly as configurations are; ``llamax.launch.checks`` holds what each
launcher refuses.  Relative paths of the run lie in ``storage.folder``, the working folder of every
process.
"""

from __future__ import annotations

import datetime
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from llamax.config.constants import RENDEZVOUS_PORT
from llamax.config.hardware import (
    LOCAL,
    Machine,
    find_machine,
    in_file,
    known_machines,
    load_machine,
    near_machines,
)
from llamax.config.load import describe, load_config, recipes
from llamax.config.neuron_sdk import Match, find_sdk, torchneuron_sdk, trn1_sdk
from llamax.config.rules.parallel import node_limit
from llamax.config.schema import Config
from llamax.config.toml import Problems, build, read_toml, to_toml
from llamax.config.types import Count, Natural, Port, explain, options, walk
from llamax.launch.prepare import Prepare
from llamax.runtime.errors import ConfigError, refuse
from llamax.runtime.text import BREAKS, printable

TABLES = ("overrides", "environment", "secrets")


@dataclass(frozen=True)
class Storage:
    """The folder that all nodes share."""

    mount: str = ""
    """Where the shared file system is mounted on every node."""
    folder: str = ""
    """Working folder of the job on the shared file system; empty: mount itself."""
    claim: str = ""
    """Kubernetes: PersistentVolumeClaim of the FSx file system."""


@dataclass(frozen=True)
class Torchrun:
    """Settings of torchrun."""

    master: str = ""
    """Name or IPv4 address of the first node; one node needs none."""


@dataclass(frozen=True)
class Mpirun:
    """Settings of mpirun."""

    hostfile: str = ""
    """File with the nodes, one a line; one node needs none."""
    per: Literal["node", "core"] = "node"
    """One process a node with torchrun inside, or one a rank."""


@dataclass(frozen=True)
class Slurm:
    """Settings of sbatch."""

    partition: str = ""
    """Partition; empty: the default one."""
    account: str = ""
    """Account; empty: the default one."""
    time_limit: str = ""
    """Limit as days-hours:minutes:seconds; empty: the partition's."""
    signal_s: Count = 600
    """Time before the limit at which the job saves and is requeued [s]."""
    cpus: Natural = 0
    """CPUs of a node, only of instance=local; 0: the whole node, for this job alone [CPUs]."""
    memory_gib: Natural = 0
    """Memory of a node; 0: all of it, or with slurm.cpus the cluster's default [GiB]."""
    gres: bool = True
    """Ask for the GPUs of a node; false: Slurm does not manage them."""


@dataclass(frozen=True)
class Kubernetes:
    """Settings of Kubernetes."""

    namespace: str = "default"
    """Namespace of all objects."""
    service_account: str = ""
    """Service account; empty: the default."""
    secret: str = ""
    """Secret with a key for each name in the table secrets."""
    shm_gib: Count = 64
    """Size of a worker's /dev/shm [GiB]."""


@dataclass(frozen=True)
class SageMaker:
    """Settings of a SageMaker job."""

    sdk: Literal[0, 2, 3] = 0
    """Major version of the SageMaker SDK; 0: the installed one, or 3."""
    local: bool = True
    """Run in a container on this machine first, on its GPUs if instance has GPUs, else its CPU."""
    role: str = ""
    """ARN of the IAM role that SageMaker takes on."""
    output: str = ""
    """s3:// folder for checkpoints."""
    data: str = ""
    """s3:// or file:// folder of the dataset."""
    inputs: str = ""
    """Phase prepare: s3:// or file:// folder that the paths of the section prepare start in."""
    base: str = ""
    """s3:// or file:// folder of the model to start from; empty: as checkpoint.init_from says."""
    model: str = ""
    """Phase serve: s3:// folder of the exported model; in local mode file://."""
    endpoint: str = ""
    """Phase serve: endpoint of another job that this model joins; empty: one of its own."""
    prepare_instance: str = "c5.9xlarge"
    """Phase prepare: instance type, of 36 CPUs by default."""
    volume_gib: Count = 100
    """Disk of an instance of training and of the phase prepare [GiB]."""
    keep_alive_s: Natural = 0
    """Time that instances wait for another training job, and cost, after this one [s]."""
    secret: str = ""
    """Name or ARN in AWS Secrets Manager of a JSON object with each name in the table secrets."""
    max_run_s: Count = 5 * 86400
    """Time after which the job is stopped [s]."""


@dataclass(frozen=True)
class Serve:
    """Settings of the phase serve: an exported folder behind an HTTP server."""

    model: str = ""
    """Exported Hugging Face folder, from the working folder."""
    engine: Literal["vllm", "tgi", "llamax"] = "vllm"
    """Server: vLLM, Text Generation Inference or llamax serve."""
    instance: str = ""
    """Machine that serves; empty: instance."""
    devices: Natural = 0
    """GPUs or NeuronCores that share the model; 0: all of the machine, 1 with llamax [devices]."""
    image: str = ""
    """Container image; empty: the pinned one of the engine, or image with llamax."""
    port: Port = 8000
    """Port of the server."""
    length: Natural = 0
    """Longest prompt with its answer; 0: the engine's default [tokens]."""
    slots: Natural = 0
    """Requests computed at once; 0: the engine's default."""


@dataclass(frozen=True)
class Cluster:
    """Settings of the phase cluster: what AWS makes for the job."""

    region: str = ""
    """Region, such as us-west-2."""
    zone: str = ""
    """Availability zone of the nodes."""
    second_zone: str = ""
    """Kubernetes: another zone, for EKS itself."""
    subnet: str = ""
    """Slurm and torchrun: a subnet in the zone, with public addresses."""
    nodes_subnet: str = ""
    """Slurm: a private subnet of the nodes, with a NAT gateway; empty: subnet."""
    key: str = ""
    """Slurm and torchrun: EC2 key pair for ssh."""
    ssh_from: str = ""
    """Slurm and torchrun: addresses that may use ssh, such as 203.0.113.7/32."""
    disk_gib: Count = 512
    """Disk of a node [GiB]."""
    storage_gib: Count = 1200
    """Size of the FSx for Lustre file system [GiB]."""


@dataclass(frozen=True)
class JobFile:
    """One job; ``overrides``, ``environment`` and ``secrets`` are tables, kept as pairs."""

    name: str
    """Name of the job, its logs and its objects."""
    recipe: str
    """Name of a recipe, or a TOML file on the shared storage."""
    nodes: Count = 1
    """Machines [nodes]."""
    instance: str = "trn1.32xlarge"
    """Machine of a node; a TOML file that describes it, relative to the job file; or local: the
    machine that the command is given on."""
    ranks_per_node: Natural = 0
    """Processes on a node; 0: one per NeuronCore or GPU [ranks]."""
    image: str = ""
    """Container image, as docker build -t names it."""
    base_image: str = ""
    """Image that the container image is built upon; empty: AWS's, by instance."""
    neuron_sdk: str = ""
    """Neuron SDK of the nodes and of AWS's image; empty: the newest for the instance."""
    compile_cache: str = ""
    """Compile cache that jobs share: a folder, or s3://bucket/path, hf://datasets/org/name of
    fsspec; empty: none; not on SageMaker."""
    venv: str = ""
    """Virtual environment on the nodes; empty: PATH's Python."""
    port: Port = RENDEZVOUS_PORT
    """Port where rank 0 waits for the others."""
    storage: Storage = Storage()
    prepare: Prepare = Prepare()
    serve: Serve = Serve()
    cluster: Cluster = Cluster()
    torchrun: Torchrun = Torchrun()
    mpirun: Mpirun = Mpirun()
    slurm: Slurm = Slurm()
    kubernetes: Kubernetes = Kubernetes()
    sagemaker: SageMaker = SageMaker()
    overrides: tuple[tuple[str, str], ...] = ()
    """Table of settings on top of the recipe."""
    environment: tuple[tuple[str, str], ...] = ()
    """Table of environment variables on top of llamax's own, stored in plain text with the job."""
    secrets: tuple[tuple[str, str], ...] = ()
    """Table of environment variables with a file that holds each, read on the nodes."""

    @property
    def local(self) -> bool:
        """Whether the job runs on the machine that the command is given on."""
        return self.instance.lower() == LOCAL.name

    @cached_property
    def machine(self) -> Machine:
        """The machine of a node; raises ConfigError if it is unknown, or its file is wrong."""
        return _machine("instance", self.instance)

    @cached_property
    def server_machine(self) -> Machine:
        """The machine that serves; raises ConfigError if it is unknown, or its file is wrong."""
        return (
            _machine("serve.instance", self.serve.instance) if self.serve.instance else self.machine
        )

    @cached_property
    def sdk(self) -> Match:
        """The Neuron SDK of the job; raises ConfigError if ``neuron_sdk`` is not a version."""
        if self.neuron_sdk:
            try:
                return find_sdk(self.neuron_sdk)
            except ConfigError as error:
                raise ConfigError(f"neuron_sdk={error}") from None
        return Match(torchneuron_sdk() if self.machine.backend == "neuron" else trn1_sdk())

    @property
    def ranks(self) -> int:
        """Ranks of one node."""
        return self.ranks_per_node or self.machine.ranks

    @property
    def node_limit(self) -> int | None:
        """The ranks of a node where tensor and context ranks must share one, or None."""
        return node_limit(self.machine.backend, self.ranks)

    @property
    def folder(self) -> str:
        """The working folder of every process."""
        return self.storage.folder or self.storage.mount

    @property
    def arguments(self) -> list[str]:
        """The command line of the training program."""
        return ["--config", self.recipe, *(f"--{key}={value}" for key, value in self.overrides)]

    @cached_property
    def config(self) -> Config:
        """The run that the job asks for, on its ranks; raises ConfigError if it is impossible."""
        world_size = self.nodes * self.ranks
        arguments, folder = self.arguments[2:], Path(self.folder)
        return load_config(
            self.recipe, arguments, world_size, "overrides", folder, node_ranks=self.node_limit
        )


def _machine(key: str, name: str) -> Machine:
    if in_file(name):
        return load_machine(name)
    machine = LOCAL if name.lower() == LOCAL.name else find_machine(name)
    if machine is None:
        raise ConfigError(f"{key}={name!r} is unknown{near_machines(name, instances())}")
    return machine


def instances() -> list[str]:
    """The values that ``instance`` takes."""
    return [LOCAL.name, *known_machines()]


def load(path: str | Path) -> JobFile:
    """The job of a TOML file; raises one ConfigError that lists everything wrong with it."""
    kind = "a recipe" if not Path(path).exists() and str(path) in recipes() else ""
    tables = {} if kind else read_toml(path)
    if not {"name", "recipe"} & {*tables} and {each.name for each in fields(Config)} & {*tables}:
        kind = "the configuration of a run"
    if kind:
        raise ConfigError(
            f"{path} is {kind}, not a job file; write a job file with recipe = {to_toml(str(path))}"
            ", a name, and what it runs on (llamax launch --help)"
        )
    return parse(tables, str(path), Path(path).parent)


def parse(tables: dict[str, Any], where: str = "job", folder: Path = Path()) -> JobFile:
    """The job of parsed TOML ``tables``; the file of a machine is relative to ``folder``."""
    problems = Problems()
    pairs = {name: tuple(_pairs(name, tables.get(name, {}), problems.unknown)) for name in TABLES}
    for table in ("environment", "secrets"):
        for key, _ in pairs[table]:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
                problems.unknown.append(
                    f"{table}.{key} is not a name of a variable; use letters, digits and _"
                )
    run = {each.name for each in fields(Config)}
    problems.unknown += [
        f"{key} is a section of the run, not of the job; write it below [overrides]"
        for key in tables
        if key in run
    ]
    rest = {key: value for key, value in tables.items() if key not in run.union(TABLES)}
    job = build(JobFile, rest, problems, given=pairs, also=TABLES)
    if in_file(job.instance):
        job = replace(job, instance=str(folder / job.instance))
    if in_file(job.serve.instance):
        job = replace(job, serve=replace(job.serve, instance=str(folder / job.serve.instance)))
    refuse([*problems.lines(job), *_control_characters(job)], where)
    return job


def _pairs(prefix: str, table: Any, wrong: list[str]) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of a table, tables inside it included."""
    if not isinstance(table, dict):
        wrong.append(f"{prefix} is not a table; write [{prefix}] and lines of key = value")
        return
    for key, value in table.items():
        if isinstance(value, dict) and prefix.startswith("overrides"):
            inside = _pairs(f"{prefix}.{key}", value, wrong)
            yield from ((f"{key}.{rest}", text) for rest, text in inside)
        elif isinstance(value, (dict, datetime.date, datetime.time)):
            wrong.append(f"{prefix}.{key}={value} is not a text or number; put it in quotes")
        elif isinstance(value, str):
            yield key, value
        else:
            yield key, to_toml(tuple(value) if isinstance(value, list) else value)


def _control_characters(job: JobFile) -> Iterator[str]:
    """No value may hold a line break: it would end a comment, an option line or a log line.

    A system prompt may: it appears only as one quoted word.
    """
    texts = [
        (f"{prefix}.{each.name}" if prefix else each.name, value)
        for prefix, section in walk(job)
        for each in fields(section)
        if not is_dataclass(value := getattr(section, each.name)) and each.name not in TABLES
    ]
    texts += [(f"overrides.{key}", value) for key, value in job.overrides]
    texts += [(f"environment.{key}", value) for key, value in job.environment]
    texts += [(f"secrets.{key}", value) for key, value in job.secrets]
    for key, value in texts:
        for text in value if isinstance(value, tuple) else (value,):
            kept = BREAKS if key == "prepare.system" else ""
            if isinstance(text, str) and printable(text, kept) != text:
                yield f"{key}={text!r} holds a control character; use plain text on one line"


def help_text() -> str:
    """Every key of a job file with its sentence, unit and default, and the known instances."""
    lines = [line for o in options(JobFile) for line in (f"  {o.key}", *describe(explain(o)))]
    names = textwrap.wrap(f"instances: {', '.join(instances())}", 79, subsequent_indent="  ")
    return "\n".join([*lines, "", *names]) + "\n"
