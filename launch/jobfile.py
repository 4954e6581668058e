"""What a job is: one TOML file that every launcher renders.

::

    name = "llama2-7b"
    recipe = "llama2-7b"              what to train: a recipe and what is changed in it
    [overrides]
    data.path = "tokens"
    [storage]                         where it reads and writes: the same path on every node
    mount = "/fsx"
    claim = "fsx"
    nodes, instance, image            what it runs on
    [torchrun] [mpirun] [slurm] ...   what one launcher wants to know

Strict, as configurations are: unknown keys, wrong types and impossible values are all told at once
with the nearest name; ``llamax.launch.checks`` holds what each launcher refuses.  Relative paths of
the run lie in ``storage.folder``, the working folder of every process.
"""

from __future__ import annotations

import datetime
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from llamax.config.fields import COUNT, NATURAL, Range, about
from llamax.config.load import build, load_config, nearest, toml
from llamax.config.schema import Config
from llamax.launch.instances import INSTANCES, Instance
from llamax.runtime.errors import ConfigError, refuse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

PORTS = Range("1024 to 65535", lambda x: 1024 <= x < 65536)


@dataclass(frozen=True)
class Storage:
    """The folder that all nodes share."""

    mount: str = field(
        default="", metadata=about("where the shared file system is mounted on every node")
    )
    folder: str = field(
        default="", metadata=about("working folder of the job on it; empty: mount itself")
    )
    claim: str = field(
        default="", metadata=about("Kubernetes: PersistentVolumeClaim of the FSx file system")
    )


@dataclass(frozen=True)
class Prepare:
    """The phase before training: text to tokens, written to data.path."""

    inputs: tuple[str, ...] = field(default=(), metadata=about("text or JSONL files, or folders"))
    tokenizer: str = field(default="", metadata=about("tokenizer.model, tokenizer.json or folder"))
    key: str = field(default="text", metadata=about("JSONL: which key holds the text"))
    workers: int = field(default=32, metadata=about("tokenizing processes", "processes", COUNT))


@dataclass(frozen=True)
class Torchrun:
    """What torchrun wants to know."""

    master: str = field(
        default="", metadata=about("name or IPv4 address of the first node; one node needs none")
    )


@dataclass(frozen=True)
class Mpirun:
    """What mpirun wants to know."""

    hostfile: str = field(
        default="", metadata=about("file with the nodes, one a line; one node needs none")
    )
    per: Literal["node", "core"] = field(
        default="node", metadata=about("one process a node with torchrun inside, or one a rank")
    )


@dataclass(frozen=True)
class Slurm:
    """What sbatch wants to know."""

    partition: str = field(default="", metadata=about("partition; empty: the default one"))
    account: str = field(default="", metadata=about("account; empty: the default one"))
    time_limit: str = field(default="", metadata=about("days-hours:minutes:seconds; empty: none"))
    signal_s: int = field(
        default=600, metadata=about("save and requeue so long before the limit", "s", COUNT)
    )


@dataclass(frozen=True)
class Kubernetes:
    """What Kubernetes wants to know."""

    namespace: str = field(default="default", metadata=about("namespace of all objects"))
    service_account: str = field(default="", metadata=about("service account; empty: the default"))
    shm_gib: int = field(default=64, metadata=about("/dev/shm of a worker", "GiB", COUNT))


@dataclass(frozen=True)
class SageMaker:
    """What the SageMaker estimator wants to know."""

    local: bool = field(
        default=True, metadata=about("run in a container on this machine first, on its CPU")
    )
    role: str = field(default="", metadata=about("IAM role that SageMaker takes on"))
    output: str = field(default="", metadata=about("s3:// folder for checkpoints"))
    data: str = field(default="", metadata=about("s3:// or file:// folder of the dataset"))
    max_run_s: int = field(
        default=5 * 86400, metadata=about("the job is stopped after this", "s", COUNT)
    )


@dataclass(frozen=True)
class JobFile:
    """One job; ``overrides`` and ``environment`` are tables of the file, kept as pairs."""

    name: str = field(metadata=about("name of the job, its logs and its objects"))
    recipe: str = field(metadata=about("recipe's name, or a TOML file on the shared storage"))
    nodes: int = field(default=1, metadata=about("machines", "nodes", COUNT))
    instance: str = field(
        default="trn1.32xlarge", metadata=about(f"what a node is: {', '.join(INSTANCES)}")
    )
    ranks_per_node: int = field(
        default=0,
        metadata=about("processes on a node; 0: one per NeuronCore or GPU", "ranks", NATURAL),
    )
    image: str = field(default="", metadata=about("container image, as docker build -t names it"))
    base_image: str = field(
        default="", metadata=about("what the image is built upon; empty: AWS's, by instance")
    )
    venv: str = field(
        default="", metadata=about("virtual environment on the nodes; empty: PATH's Python")
    )
    port: int = field(default=29500, metadata=about("where rank 0 waits for the others", "", PORTS))
    storage: Storage = Storage()
    prepare: Prepare = Prepare()
    torchrun: Torchrun = Torchrun()
    mpirun: Mpirun = Mpirun()
    slurm: Slurm = Slurm()
    kubernetes: Kubernetes = Kubernetes()
    sagemaker: SageMaker = SageMaker()
    overrides: tuple[tuple[str, str], ...] = field(
        default=(), metadata=about("table of settings on top of the recipe")
    )
    environment: tuple[tuple[str, str], ...] = field(
        default=(), metadata=about("table of environment variables on top of llamax's own")
    )

    @property
    def hardware(self) -> Instance:
        """What a node has; ConfigError names the nearest instance for an unknown one."""
        if self.instance not in INSTANCES:
            raise ConfigError(
                f"instance={self.instance!r} is unknown{nearest(self.instance, INSTANCES)}"
            )
        return INSTANCES[self.instance]

    @property
    def ranks(self) -> int:
        """Ranks of one node."""
        return self.ranks_per_node or self.hardware.cores

    @property
    def folder(self) -> str:
        return self.storage.folder or self.storage.mount

    @property
    def arguments(self) -> list[str]:
        """What the training program is given."""
        return ["--config", self.recipe, *(f"--{key}={value}" for key, value in self.overrides)]

    @cached_property
    def config(self) -> Config:
        """The run that the job asks for, on the ranks it has; ConfigError if impossible."""
        return load_config(self.recipe, self.arguments[2:], self.nodes * self.ranks)


def load(path: str | Path) -> JobFile:
    """The job of a TOML file; one ConfigError tells all unknown names and wrong types."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None
    return parse(tables, str(path))


def parse(tables: dict[str, Any], where: str = "job") -> JobFile:
    """The job of parsed TOML ``tables``; see ``load``."""
    found: list[str] = []
    wrong: dict[str, str] = {}
    rest = {key: value for key, value in tables.items() if key not in ("overrides", "environment")}
    overrides = tuple(_pairs("overrides", tables.get("overrides", {}), found))
    environment = tuple(_pairs("environment", tables.get("environment", {}), found))
    for key, _ in environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            found.append(f"environment.{key} is no name of a variable; use letters, digits and _")
    plain = build(JobFile, rest, "", wrong, found)
    job: JobFile = replace(plain, overrides=overrides, environment=environment)
    found += [*wrong.values(), *_out_of_range(job), *_control_characters(job)]
    refuse(found, where)
    return job


def _pairs(prefix: str, table: Any, found: list[str]) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of a table, tables inside it included."""
    if not isinstance(table, dict):
        found.append(f"{prefix} is not a table; write [{prefix}] and lines of key = value")
        return
    for key, value in table.items():
        if isinstance(value, dict) and prefix.startswith("overrides"):
            inside = _pairs(f"{prefix}.{key}", value, found)
            yield from ((f"{key}.{rest}", text) for rest, text in inside)
        elif isinstance(value, (dict, datetime.date, datetime.time)):
            found.append(f"{prefix}.{key}={value} is no text or number; put it in quotes")
        elif isinstance(value, str):
            yield key, value
        else:
            yield key, toml(tuple(value) if isinstance(value, list) else value)


def _values(job: JobFile) -> Iterator[tuple[str, Field[Any], Any]]:
    """(key, field, value) of everything but the two tables."""
    for prefix, each in _fields():
        owner = getattr(job, prefix[:-1]) if prefix else job
        if each.name not in ("overrides", "environment"):
            yield prefix + each.name, each, getattr(owner, each.name)


def _fields() -> Iterator[tuple[str, Field[Any]]]:
    """(section with its dot, field) of everything a job file may say; plain keys first."""
    for each in fields(JobFile):
        if each.metadata:
            yield "", each
    for section in fields(JobFile):
        if is_dataclass(section.default):
            for each in fields(section.default):
                yield f"{section.name}.", each


def _out_of_range(job: JobFile) -> Iterator[str]:
    for key, each, value in _values(job):
        allowed = each.metadata["range"]
        if allowed and not allowed.holds(value):
            yield f"{key}={value} is out of range; use {allowed.words}"


def _control_characters(job: JobFile) -> Iterator[str]:
    """No value may hold a line break: it would end a comment, an option line or a log line."""
    texts = [(key, value) for key, _, value in _values(job)]
    texts += [(f"overrides.{key}", value) for key, value in job.overrides]
    texts += [(f"environment.{key}", value) for key, value in job.environment]
    for key, value in texts:
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and any(
                ord(letter) < 32 or letter == "\x7f" for letter in text
            ):
                yield f"{key}={text!r} holds a control character; use plain text on one line"


def help_text() -> str:
    """Every key of a job file with its line."""
    lines = []
    for prefix, each in _fields():
        unit = f"{each.metadata['unit']}; " if each.metadata["unit"] else ""
        default = "required" if each.default is MISSING else f"default {each.default}".lower()
        default = "default empty" if each.default in ("", ()) else default
        lines.append(f"  {prefix + each.name:<27}  {each.metadata['help']} ({unit}{default})")
    return "\n".join(lines) + "\n"
