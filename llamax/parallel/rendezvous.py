"""The launcher's environment variables -> one ``Rendezvous``.

::

    torchrun             RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; also inside any of these:
    mpirun (Open MPI)    OMPI_COMM_WORLD_RANK, .._SIZE, .._LOCAL_RANK, .._LOCAL_SIZE
    mpiexec (Hydra)      PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS
    srun                 SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, .._TASKS_PER_NODE
    Kubernetes, indexed  JOB_COMPLETION_INDEX, WORLD_SIZE: one rank a pod
    SageMaker            SM_CURRENT_HOST, SM_HOSTS: one rank a host
    nothing              a world of one

The first family that is present counts, for each is started inside those below it: torchrun by
mpirun or srun, mpirun's ranks by srun's daemons.  SLURM_PROCID alone says nothing: a batch script
has it too, where only srun's own steps have SLURM_STEP_NUM_TASKS.

Sources: "Environment variables set for MPI applications" (Open MPI), "Using the Hydra Process
Manager" (MPICH), srun(1) OUTPUT ENVIRONMENT VARIABLES, "Indexed Job" (Kubernetes), ENVIRONMENT
VARIABLES.md (sagemaker-training-toolkit).
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from llamax.runtime.errors import BackendError, LlamaxError

FAMILIES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "Kubernetes": ("JOB_COMPLETION_INDEX", "WORLD_SIZE"),
    "SageMaker": ("SM_CURRENT_HOST", "SM_HOSTS"),
}
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
# What launchers call a job: the scheduler before what it starts.
JOBS = ("SLURM_JOB_ID", "TRAINING_JOB_NAME", "PMIX_NAMESPACE", "TORCHELASTIC_RUN_ID")
IN_KUBERNETES = "KUBERNETES_SERVICE_HOST"
LOOPBACK = "127.0.0.1"
PORT = 29500
NEURON_PORT = 62182  # where torch-xla's Neuron plugin lets ranks meet unless told otherwise
DNS_WAIT_S = 60  # a pod's name resolves some time after the pod runs


@dataclass(frozen=True)
class Rendezvous:
    """Who I am in the world, and where rank 0 waits for the others.

    ``agent_store``: the launcher itself serves the key-value store at ``address:port``;
    ``attempt``: how often it has restarted the job; ``launcher``: a key of ``FAMILIES`` or "";
    ``job``: what the launcher calls the job, fit for a file's name.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = LOOPBACK
    port: int = PORT
    agent_store: bool = False
    attempt: int = 0
    launcher: str = ""
    job: str = "local"

    @property
    def one_machine(self) -> bool:
        return self.local_world_size == self.world_size


def first_here(environ: Mapping[str, str]) -> bool:
    """Whether this is the first rank of its machine, as far as a launcher tells; reads no more."""
    keys = [keys[2] for keys in FAMILIES.values() if len(keys) == 4]
    return next((environ[key] for key in keys if key in environ), "0") == "0"


@contextmanager
def first_to_speak(where: Rendezvous) -> Iterator[None]:
    """All ranks of a machine find the same mistakes here; its first one tells, the others wait."""
    try:
        yield
    except LlamaxError as error:
        if where.local_rank == 0:
            raise
        time.sleep(2)
        raise SystemExit(error.exit_code) from None


def ipv4(name: str, wait_s: float = 0.0) -> str:
    """The IPv4 address of a machine; tries again for ``wait_s``.

    Raises BackendError for a name without one.  Neuron's runtime resolves no name above 63
    characters, which a pod's full name has, and takes no IPv6.
    """
    limit = time.monotonic() + wait_s
    while True:
        try:
            found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
            return str(found[0][4][0])
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= limit:
                raise BackendError(
                    f"MASTER_ADDR={name!r} has no IPv4 address here ({error}); export the name or "
                    "the IPv4 address of rank 0's machine"
                ) from None
            time.sleep(1)


def rendezvous(
    environ: Mapping[str, str], resolve: Callable[[str, float], str] = ipv4
) -> Rendezvous:
    """The rendezvous that ``environ`` describes, its address an IPv4 one.

    Raises BackendError where a launcher's variables are incomplete, no number or contradict each
    other.
    """
    present = [name for name in FAMILIES if _present(environ, name)]
    if not present:
        return Rendezvous()
    launcher = present[0]
    if launcher == "torchrun":
        where = _torchrun(environ)
        if starters := [name for name in present if name in ("mpirun", "mpiexec", "srun")]:
            _spans(environ, where, starters[0])
    elif launcher == "Kubernetes":
        rank, size = (_number(environ, key) for key in FAMILIES[launcher])
        where = Rendezvous(rank, size)
    elif launcher == "SageMaker":
        where = _sagemaker(environ)
    else:
        where = _ranks(environ, launcher)
    where = replace(where, launcher=launcher, job=job_id(environ))
    _consistent(where, FAMILIES[launcher])
    if where.one_machine:
        address = environ.get("MASTER_ADDR", LOOPBACK)
        where = replace(where, address=address if _is_ipv4(address) else LOOPBACK)
    else:
        where = replace(where, address=_master(environ, where, resolve))
    port = "MASTER_PORT"
    return replace(
        where,
        port=_number(environ, port) if port in environ else where.port,
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number(environ, ATTEMPT) if ATTEMPT in environ else 0,
    )


def job_id(environ: Mapping[str, str]) -> str:
    """What the launcher calls this job, in characters fit for a file's name."""
    named = (environ.get(name, "") for name in JOBS)
    found = next((name for name in named if name and name != "none"), "local")
    return re.sub(r"[^\w.-]", "-", found)


def neuron_variables(environ: Mapping[str, str], where: Rendezvous) -> dict[str, str]:
    """What must be set in a rank's environment before torch-xla is imported on Neuron.

    torch-xla's Neuron plugin (``torch_xla/_internal/neuron.py``) makes one world of all processes
    only where TORCHELASTIC_RUN_ID is set; it then reads torchrun's variables, which other
    launchers leave to us.  Ranks meet at NEURON_RT_ROOT_COMM_ID, an IPv4 address and a port.
    """
    found = {
        "RANK": str(where.rank),
        "WORLD_SIZE": str(where.world_size),
        "LOCAL_RANK": str(where.local_rank),
        "LOCAL_WORLD_SIZE": str(where.local_world_size),
        "MASTER_ADDR": where.address,
        "MASTER_PORT": str(where.port),
        "TORCHELASTIC_RUN_ID": f"llamax-{where.launcher or 'alone'}",
        "NEURON_RT_ROOT_COMM_ID": f"{where.address}:{NEURON_PORT}",
    }
    kept = ("TORCHELASTIC_RUN_ID", "NEURON_RT_ROOT_COMM_ID")
    return {key: value for key, value in found.items() if key not in kept or key not in environ}


# ---- one family each


def _present(environ: Mapping[str, str], launcher: str) -> bool:
    """Whether a family's variables are there; BackendError where some of them are missing."""
    keys = FAMILIES[launcher]
    rank, size = keys[:2]
    if launcher == "torchrun":
        has = "RANK" in environ or (
            "WORLD_SIZE" in environ and "JOB_COMPLETION_INDEX" not in environ
        )
        needed: tuple[str, ...] = (rank, size)
    elif launcher == "mpiexec":
        # srun --mpi=pmi2 has Hydra's first two variables, and its own for the rest.
        has, needed = rank in environ and FAMILIES["srun"][1] not in environ, keys
        has = has or keys[2] in environ
    elif launcher == "Kubernetes":
        has, needed = rank in environ and "RANK" not in environ, keys
    elif launcher == "srun":
        has, needed = size in environ, keys
    else:
        has, needed = rank in environ, keys
    if has and (missing := [key for key in needed if key not in environ]):
        raise BackendError(
            f"{next(key for key in keys if key in environ)} is set but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not: {launcher} sets all of "
            f"{', '.join(needed)}; unset what is left over, or set the rest"
        )
    return has


def _torchrun(environ: Mapping[str, str]) -> Rendezvous:
    rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if "LOCAL_RANK" in environ:
        local = _number(environ, "LOCAL_RANK")
        local_size = "LOCAL_WORLD_SIZE"
        return Rendezvous(
            rank, size, local, _number(environ, local_size) if local_size in environ else size
        )
    if IN_KUBERNETES in environ:  # the training operator starts one process a pod
        return Rendezvous(rank, size)
    address = environ.get("MASTER_ADDR", LOOPBACK)
    if address not in (LOOPBACK, "localhost"):
        raise BackendError(
            f"RANK={rank} of WORLD_SIZE={size} with MASTER_ADDR={address} but LOCAL_RANK and "
            "LOCAL_WORLD_SIZE are not set; set them, or start ranks with torchrun"
        )
    return Rendezvous(rank, size, rank, size)


def _ranks(environ: Mapping[str, str], launcher: str) -> Rendezvous:
    """mpirun, mpiexec or srun, each rank a process of theirs."""
    keys = FAMILIES[launcher]
    rank, size, local = (_number(environ, key) for key in keys[:3])
    if launcher != "srun":
        return Rendezvous(rank, size, local, _number(environ, keys[3]))
    node = _number(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    tasks = list(_tasks_per_node(environ[keys[3]]))
    if node >= len(tasks):
        raise BackendError(
            f"SLURM_NODEID={node} but {keys[3]}={environ[keys[3]]!r} tells of {len(tasks)} nodes; "
            "start ranks with srun"
        )
    return Rendezvous(rank, size, local, tasks[node])


def _sagemaker(environ: Mapping[str, str]) -> Rendezvous:
    me = environ["SM_CURRENT_HOST"]
    try:
        hosts = sorted(json.loads(environ["SM_HOSTS"]))
        rank = hosts.index(me)
    except (ValueError, TypeError):
        raise BackendError(
            f"SM_HOSTS={environ['SM_HOSTS']!r} is no JSON list that holds SM_CURRENT_HOST={me!r}; "
            "leave both as SageMaker sets them"
        ) from None
    for key in ("SM_NUM_NEURONS", "SM_NUM_GPUS"):
        if key in environ and _number(environ, key) > 1:
            raise BackendError(
                f"SageMaker started one process on a host with {key}={environ[key]}; give the "
                'estimator distribution={"torch_distributed": {"enabled": True}}'
            )
    return Rendezvous(rank, len(hosts))


# ---- what must hold


def _spans(environ: Mapping[str, str], where: Rendezvous, starter: str) -> None:
    """Refuse a torchrun that does not span the processes of the launcher which started it."""
    rank, size = (_number(environ, key) for key in FAMILIES[starter][:2])
    nodes = _number(environ, "GROUP_WORLD_SIZE") if "GROUP_WORLD_SIZE" in environ else 1
    if size > 1 and nodes == 1 and (where.rank, where.world_size) != (rank, size):
        raise BackendError(
            f"{starter} started {size} processes, but number {rank} of them believes to be rank "
            f"{where.rank} of {where.world_size}; give torchrun --nnodes={size} "
            f"--node-rank=${FAMILIES[starter][0]}, or unset RANK and WORLD_SIZE"
        )


def _consistent(where: Rendezvous, keys: tuple[str, ...]) -> None:
    rank, size = where.rank, where.world_size
    local, local_size = where.local_rank, where.local_world_size
    if not 0 <= rank < size or not 0 <= local < local_size <= size:
        raise BackendError(
            f"{where.launcher} says rank {rank} of {size} and local rank {local} of {local_size}, "
            f"which contradict each other; check {', '.join(keys)}"
        )
    if size % local_size == 0 and rank % local_size != local:
        raise BackendError(
            f"rank {rank} is number {local} of the {local_size} on its machine: ranks are dealt "
            "round-robin, which puts tensor-parallel neighbours on different machines; use "
            f"mpirun --map-by ppr:{local_size}:node or srun --distribution=block"
        )


def _master(
    environ: Mapping[str, str], where: Rendezvous, resolve: Callable[[str, float], str]
) -> str:
    """The IPv4 address of rank 0's machine, for a world of several machines."""
    name = environ.get("MASTER_ADDR")
    if name is None and where.launcher == "srun":
        nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST"))
        name = None if nodes is None else first_host(nodes)
    if name is None and where.launcher == "SageMaker":
        name = sorted(json.loads(environ["SM_HOSTS"]))[0]
    if name is None:
        raise BackendError(
            f"{where.launcher} started {where.world_size} ranks on several machines but "
            "MASTER_ADDR is not set; export the address of rank 0's machine"
        )
    return resolve(name, DNS_WAIT_S if IN_KUBERNETES in environ else 0.0)


# ---- small readers


def first_host(nodelist: str) -> str:
    """The first host of Slurm's notation: ``trn[07-09,12],head`` is ``trn07``."""
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodelist)[0])


def _tasks_per_node(text: str) -> Iterator[int]:
    """``32(x2),16`` is 32, 32, 16."""
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise BackendError(
                f"SLURM_STEP_TASKS_PER_NODE={text!r} is not Slurm's notation; leave it as srun "
                "sets it"
            )
        yield from [int(found[1])] * int(found[2] or 1)


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def _number(environ: Mapping[str, str], key: str) -> int:
    try:
        return int(environ[key])
    except ValueError:
        raise BackendError(f"{key}={environ[key]!r} is not a number; unset or mend it") from None
