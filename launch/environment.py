"""The variables of a job: each is set in this table, once, with its reason.

Not here: what depends on the rank (``llamax.parallel.rendezvous``) and what the run's configuration
decides (stochastic rounding, device: ``llamax.backends``).

Sources: AWS Neuron documentation, "NeuronX runtime configuration", "Neuron persistent cache",
"PyTorch NeuronX environment variables", "EFA"; glibc, mallopt(3); torchrun.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from llamax.launch.jobfile import JobFile

LARGE = 10_000_000_000  # parameters above which host buffers want more malloc arenas

# Set by launchers, or by llamax for each rank: a job file may not pin them.
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


class Variable(NamedTuple):
    name: str
    value: str
    reason: str


def variables(job: JobFile, container: bool = False) -> list[Variable]:
    """What every process of a job has in its environment; the job file's own come last and win."""
    own = dict(job.environment)
    table = [each for each in _table(job, container) if each.name not in own]
    return table + [Variable(name, value, "from the job file") for name, value in own.items()]


def _table(job: JobFile, container: bool) -> Iterator[Variable]:
    machine = job.machine
    yield Variable("PYTHONUNBUFFERED", "1", "log lines appear when they are written")
    yield Variable("OMP_NUM_THREADS", "1", "the host only feeds devices; torchrun's own default")
    yield Variable(
        "MALLOC_ARENA_MAX",
        "128" if job.config.model.num_parameters() > LARGE else "64",
        "glibc makes 8 arenas a CPU, and tracing threads fill them all: host memory would run out",
    )
    yield Variable(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
        "180",
        "s for ranks to save after SIGTERM; torch 2.9 does not know it and kills after 30",
    )
    yield Variable(
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE",
        "[rank ${rank}] ",
        "what each node's first rank says is shown behind its number",
    )
    if machine.neuron:
        yield from _neuron(job)
    if job.nodes == 1:
        return
    if machine.efa:
        yield Variable("FI_PROVIDER", "efa", "libfabric takes the EFA adapters, not TCP")
        yield Variable(
            "FI_EFA_USE_DEVICE_RDMA", "1", "adapters read device memory, not a copy on the host"
        )
        yield Variable("FI_EFA_FORK_SAFE", "1", "kernels before 5.15 corrupt memory on fork")
    if container and machine.neuron:
        yield Variable(
            "CCOM_SOCKET_IFNAME", "eth0", "the pod's only network; set in containers alone"
        )


def _neuron(job: JobFile) -> Iterator[Variable]:
    yield Variable(
        "NEURON_CC_FLAGS",
        "--model-type transformer --retry_failed_compilation",
        "the compiler's schedule for transformers; failures are cached, and would stay",
    )
    yield Variable(
        "NEURON_COMPILE_CACHE_URL",
        f"{job.folder.rstrip('/')}/neuron-cache",
        "on shared storage: what one node compiled all nodes load, and a restart too",
    )
    yield Variable(
        "NEURON_FUSE_SOFTMAX", "1", "fused softmax; changes graphs, so precompile has it as well"
    )
    yield Variable(
        "NEURON_RT_EXEC_TIMEOUT",
        "600",
        "s a program may wait for the other ranks; the default 30 is less than a slow start",
    )
    yield Variable("NEURON_PROCESS_TAG", job.name, "neuron-top and neuron-monitor show whose it is")
