"""The environment variables of a job: each is set once, in this table, with its reason.

Variables that depend on the rank are set in ``llamax.parallel.rendezvous``, those that depend on
the configuration of the run (stochastic rounding, device) in ``llamax.backends``.

Sources: AWS Neuron documentation, "NeuronX runtime configuration", "Neuron persistent cache",
"PyTorch NeuronX environment variables", "EFA"; glibc, mallopt(3); torchrun.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from llamax.config.neuron_sdk import absent, trn1_names
from llamax.launch.jobfile import JobFile

LARGE = 10_000_000_000  # parameters; host buffers of larger models need more malloc arenas

# Set for each rank by launchers or by llamax: a job file must not set them.
RESERVED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NEURON_RT_ROOT_COMM_ID",
    "NEURON_RT_VISIBLE_CORES",
    "NEURON_PJRT_PROCESS_INDEX",
    "NEURON_EXTRACT_GRAPHS_ONLY",
)


# A name that is probably a secret's, such as WANDB_API_KEY; not one such as NEURON_FUSE_SOFTMAX.
SECRET = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:$|_)", re.I)


# A variable in the form of a shell, such as $PATH; not ${rank} of torchrun's template.
NAMED = re.compile(r"\$(?:[A-Z_][A-Z0-9_]*|\{[A-Z_][A-Z0-9_]*\})")


class Variable(NamedTuple):
    """An environment variable and the reason why it is set."""

    name: str
    value: str
    reason: str


def variables(job: JobFile, container: bool = False) -> list[Variable]:
    """The variables of every process of a job, those of the job file last; they replace others."""
    custom = dict(job.environment)
    table = [variable for variable in _table(job, container) if variable.name not in custom]
    return table + [Variable(name, value, "from the job file") for name, value in custom.items()]


def sdk_notes(job: JobFile) -> Iterator[str]:
    """What the Neuron SDK of a job does not support, one line each."""
    if not job.machine.neuron:
        return
    sdk, note = job.sdk
    if note:
        yield f"{note}; set neuron_sdk to the one on the nodes, or update llamax"
    if job.machine.backend == "xla" and not sdk.trains_trn1:
        yield (
            f"Neuron SDK {sdk.name} does not support training with torch-xla, which "
            f"{job.machine.name} needs; use {trn1_names()}"
        )
    for name, _ in job.environment:
        if not sdk.has(name):
            yield f"environment.{name}: {absent(name, sdk)}"


def plain_text_secrets(job: JobFile) -> list[str]:
    """The names in the table environment that sound like secrets."""
    return [name for name, _ in job.environment if SECRET.search(name)]


def literal_values(job: JobFile) -> Iterator[str]:
    """What looks like another variable in the table environment, one line each."""
    for name, value in job.environment:
        if found := NAMED.search(value):
            yield (
                f"environment.{name} holds {found[0]} as text: no variable is expanded there; "
                "write the whole value"
            )


def _table(job: JobFile, container: bool) -> Iterator[Variable]:
    machine = job.machine
    yield Variable("PYTHONUNBUFFERED", "1", "log lines appear immediately")
    yield Variable(
        "PYTHONSAFEPATH", "1", "Python 3.11 and later import no module from the working folder"
    )
    if job.config.run.backend != "cpu":
        yield Variable(
            "OMP_NUM_THREADS", "1", "the host only feeds devices; also the default of torchrun"
        )
    yield Variable(
        "MALLOC_ARENA_MAX",
        "128" if job.config.model.num_parameters() > LARGE else "64",
        "glibc allows 8 arenas per CPU, and tracing threads fill all: host memory would run out",
    )
    yield Variable(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
        "180",
        "seconds for ranks to save after SIGTERM; torch 2.9 ignores it and kills after 30",
    )
    yield Variable(
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE",
        "[rank ${rank}] ",
        "the output of each node's first rank is prefixed by its number",
    )
    if machine.neuron:
        yield from (each for each in _neuron(job) if job.sdk.sdk.has(each.name))
    if job.nodes == 1:
        return
    if machine.efa:
        yield Variable("FI_PROVIDER", "efa", "libfabric uses the EFA adapters, not TCP")
        yield Variable(
            "FI_EFA_USE_DEVICE_RDMA", "1", "adapters read device memory, without a copy on the host"
        )
        yield Variable(
            "FI_EFA_FORK_SAFE", "1", "Linux before 5.15 corrupts memory on fork without it"
        )
    if container and machine.neuron:
        yield Variable(
            "CCOM_SOCKET_IFNAME", "eth0", "the only network of a pod; set in containers only"
        )


def _neuron(job: JobFile) -> Iterator[Variable]:
    yield Variable(
        "NEURON_CC_FLAGS",
        "--model-type transformer --retry_failed_compilation",
        "schedule for transformers; compile again what failed before, as failures are cached",
    )
    yield Variable(
        "NEURON_COMPILE_CACHE_URL",
        f"{job.folder.rstrip('/')}/neuron-cache",
        "on shared storage: programs compiled by one node are loaded by all, also after a restart",
    )
    yield Variable(
        "NEURON_FUSE_SOFTMAX",
        "1",
        "fused softmax; changes the programs, so precompile sets it as well",
    )
    yield Variable(
        "NEURON_RT_EXEC_TIMEOUT",
        "600",
        "seconds that a program waits for other ranks; the default 30 is less than a slow start",
    )
    yield Variable(
        "NEURON_PROCESS_TAG", job.name, "name of the job in neuron-top and neuron-monitor"
    )
