"""From the environment variables of any launcher to one ``Rendezvous``: rank, world and address.

::

    torchrun             RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; also inside the others:
    mpirun (Open MPI)    OMPI_COMM_WORLD_RANK, .._SIZE, .._LOCAL_RANK, .._LOCAL_SIZE
    mpiexec (Hydra)      PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS
    srun                 SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, .._TASKS_PER_NODE
    Kubernetes, indexed  JOB_COMPLETION_INDEX, WORLD_SIZE: one rank per pod
    SageMaker            SM_CURRENT_HOST, SM_HOSTS: one rank per host
    no launcher          a world of one rank

The first launcher in this list whose variables are set counts, because one may run inside another
further down: torchrun inside mpirun or srun, the ranks of mpirun inside daemons of srun.
SLURM_PROCID alone is no sign of srun, because a batch script has it too; only the steps of srun
have SLURM_STEP_NUM_TASKS.

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

from llamax.config.constants import RENDEZVOUS_PORT
from llamax.parallel.network import is_loopback, source_address
from llamax.runtime.errors import BackendError, LlamaxError
from llamax.runtime.units import count

# The variables of a launcher: rank, world size, local rank, local world size.
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
# The job id of each launcher; a scheduler comes before the launchers it starts.
JOBS = ("SLURM_JOB_ID", "TRAINING_JOB_NAME", "PMIX_NAMESPACE", "TORCHELASTIC_RUN_ID")
IN_KUBERNETES = "KUBERNETES_SERVICE_HOST"
LOOPBACK = "127.0.0.1"
NEURON_PORT = 62182  # the default port of torch-xla's Neuron plugin, at which ranks meet
ANY_OTHER = "192.0.2.1"  # no machine has this address (RFC 5737); nothing is sent to it
DNS_WAIT_S = 60  # the name of a pod may resolve only some time after the pod starts


@dataclass(frozen=True)
class Rendezvous:
    """This process' rank in the world, and the address at which rank 0 waits for the others.

    ``agent_store``: whether the launcher serves the key-value store at ``address:port``;
    ``attempt``: how often it has restarted the job; ``launcher``: a key of ``FAMILIES`` or "";
    ``job``: the launcher's job id, in characters that are valid in a file name.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = LOOPBACK
    port: int = RENDEZVOUS_PORT
    agent_store: bool = False
    attempt: int = 0
    launcher: str = ""
    job: str = "local"

    @property
    def one_machine(self) -> bool:
        """Whether all ranks run on this machine."""
        return self.local_world_size == self.world_size


def is_first_local_rank(environ: Mapping[str, str]) -> bool:
    """Whether this is the first rank of its machine; true if no launcher sets a local rank.

    Needs no complete rendezvous, so errors can be logged before there is one.
    """
    keys = [keys[2] for keys in FAMILIES.values() if len(keys) == 4]
    return next((environ[key] for key in keys if key in environ), "0") == "0"


@contextmanager
def report_errors_once(where: Rendezvous) -> Iterator[None]:
    """Let only the first rank of a machine report an error that all its ranks meet.

    The others wait 2 s and exit with the same code.
    """
    try:
        yield
    except LlamaxError as error:
        if where.local_rank == 0:
            raise
        time.sleep(2)
        raise SystemExit(error.exit_code) from None


def ipv4(name: str, wait_s: float = 0.0) -> str:
    """The IPv4 address of a machine, retried for ``wait_s`` seconds.

    Neuron's runtime accepts no IPv6 address and resolves no name above 63 characters, and the full
    name of a pod may be longer.  Raises BackendError if the name has no IPv4 address.
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
    """The rendezvous that the environment describes, with an IPv4 address.

    Raises BackendError if the variables of a launcher are incomplete, are not numbers or contradict
    each other.
    """
    present = [name for name in FAMILIES if _present(environ, name)]
    if not present:
        return Rendezvous()
    launcher = present[0]
    if launcher == "torchrun":
        where = _torchrun(environ)
        if starters := [name for name in present if name in ("mpirun", "mpiexec", "srun")]:
            _check_spans(environ, where, starters[0])
    elif launcher == "Kubernetes":
        rank, size = (_number(environ, key) for key in FAMILIES[launcher])
        where = Rendezvous(rank, size)
    elif launcher == "SageMaker":
        where = _sagemaker(environ)
    else:
        where = _ranks(environ, launcher)
    where = replace(where, launcher=launcher, job=job_id(environ))
    _check_consistent(where, FAMILIES[launcher])
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
    """The launcher's job id, in characters that are valid in a file name; "local" without one."""
    named = (environ.get(name, "") for name in JOBS)
    found = next((name for name in named if name and name != "none"), "local")
    return re.sub(r"[^\w.-]", "-", found)


def neuron_variables(environ: Mapping[str, str], where: Rendezvous) -> dict[str, str]:
    """The environment variables to set before torch-xla is imported on Neuron.

    torch-xla's Neuron plugin (``torch_xla/_internal/neuron.py``) joins processes into one world
    only if TORCHELASTIC_RUN_ID is set; it then reads the variables of torchrun, which other
    launchers do not set.  Ranks meet at NEURON_RT_ROOT_COMM_ID, an IPv4 address and a port.
    """
    found = {
        "RANK": str(where.rank),
        "WORLD_SIZE": str(where.world_size),
        "LOCAL_RANK": str(where.local_rank),
        "LOCAL_WORLD_SIZE": str(where.local_world_size),
        "MASTER_ADDR": where.address,
        "MASTER_PORT": str(where.port),
        "TORCHELASTIC_RUN_ID": f"llamax-{where.launcher or 'alone'}",
        "NEURON_RT_ROOT_COMM_ID": f"{_address_for_others(where)}:{NEURON_PORT}",
    }
    kept = ("TORCHELASTIC_RUN_ID", "NEURON_RT_ROOT_COMM_ID")
    return {key: value for key, value in found.items() if key not in kept or key not in environ}


def _address_for_others(where: Rendezvous) -> str:
    """Rank 0's IPv4 address as other machines know it.

    Debian and Ubuntu write a machine's own name as 127.0.1.1 into /etc/hosts.  On rank 0's machine
    the address of the interface with the default route takes its place.
    """
    if where.world_size > where.local_world_size and is_loopback(where.address):
        return source_address(ANY_OTHER) or where.address
    return where.address


# ---- one function per launcher


def _present(environ: Mapping[str, str], launcher: str) -> bool:
    """Whether the variables of a launcher are set; BackendError if only some of them are."""
    keys = FAMILIES[launcher]
    rank, size = keys[:2]
    if launcher == "torchrun":
        has = "RANK" in environ or (
            "WORLD_SIZE" in environ and "JOB_COMPLETION_INDEX" not in environ
        )
        needed: tuple[str, ...] = (rank, size)
    elif launcher == "mpiexec":
        # srun --mpi=pmi2 sets the first two variables of Hydra too, and its own for the others.
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
            f"{', '.join(needed)}; unset what is left over, or set the others"
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
    if IN_KUBERNETES in environ:  # the training operator starts one process per pod
        return Rendezvous(rank, size)
    address = environ.get("MASTER_ADDR", LOOPBACK)
    if address not in (LOOPBACK, "localhost"):
        raise BackendError(
            f"RANK={rank} of WORLD_SIZE={size} with MASTER_ADDR={address} but LOCAL_RANK and "
            "LOCAL_WORLD_SIZE are not set; set them, or start ranks with torchrun"
        )
    return Rendezvous(rank, size, rank, size)


def _ranks(environ: Mapping[str, str], launcher: str) -> Rendezvous:
    """The rendezvous of mpirun, mpiexec or srun, which start one process per rank."""
    keys = FAMILIES[launcher]
    rank, size, local = (_number(environ, key) for key in keys[:3])
    if launcher != "srun":
        return Rendezvous(rank, size, local, _number(environ, keys[3]))
    node = _number(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    tasks = list(_tasks_per_node(environ[keys[3]]))
    if node >= len(tasks):
        raise BackendError(
            f"SLURM_NODEID={node} but {keys[3]}={environ[keys[3]]!r} lists "
            f"{count(len(tasks), 'node')}; start ranks with srun"
        )
    return Rendezvous(rank, size, local, tasks[node])


def _sagemaker(environ: Mapping[str, str]) -> Rendezvous:
    host = environ["SM_CURRENT_HOST"]
    try:
        hosts = sorted(json.loads(environ["SM_HOSTS"]))
        rank = hosts.index(host)
    except (ValueError, TypeError, RecursionError):
        raise BackendError(
            f"SM_HOSTS={environ['SM_HOSTS']!r} is not a JSON list with SM_CURRENT_HOST={host!r}; "
            "leave both as SageMaker sets them"
        ) from None
    for key in ("SM_NUM_NEURONS", "SM_NUM_GPUS"):
        if key in environ and _number(environ, key) > 1:
            raise BackendError(
                f"SageMaker started one process on a host with {key}={environ[key]}; give the "
                'estimator distribution={"torch_distributed": {"enabled": True}}'
            )
    return Rendezvous(rank, len(hosts))


# ---- consistency


def _check_spans(environ: Mapping[str, str], where: Rendezvous, starter: str) -> None:
    """Raise BackendError if every process of another launcher started a separate torchrun."""
    rank, size = (_number(environ, key) for key in FAMILIES[starter][:2])
    nodes = _number(environ, "GROUP_WORLD_SIZE") if "GROUP_WORLD_SIZE" in environ else 1
    if size > 1 and nodes == 1 and (where.rank, where.world_size) != (rank, size):
        raise BackendError(
            f"{starter} started {size} processes, but torchrun made process {rank} rank "
            f"{where.rank} of {where.world_size}; give torchrun --nnodes={size} "
            f"--node-rank=${FAMILIES[starter][0]}, or unset RANK and WORLD_SIZE"
        )


def _check_consistent(where: Rendezvous, keys: tuple[str, ...]) -> None:
    """Raise BackendError if the numbers contradict each other or ranks are dealt round-robin."""
    rank, size = where.rank, where.world_size
    local, local_size = where.local_rank, where.local_world_size
    if not 0 <= rank < size or not 0 <= local < local_size <= size:
        raise BackendError(
            f"{where.launcher} says rank {rank} of {size} and local rank {local} of {local_size}, "
            f"which contradict each other; check {', '.join(keys)}"
        )
    if size % local_size == 0 and rank % local_size != local:
        raise BackendError(
            f"rank {rank} is local rank {local} of {local_size}: ranks are dealt round-robin, "
            "which puts tensor-parallel neighbours on different machines; use "
            f"mpirun --map-by ppr:{local_size}:node or srun --distribution=block"
        )


def _master(
    environ: Mapping[str, str], where: Rendezvous, resolve: Callable[[str, float], str]
) -> str:
    """The IPv4 address of rank 0's machine, in a world of several machines."""
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


# ---- parsing


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: ``trn[07-09,12],head`` gives ``trn07``."""
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", nodelist)[0])


def _tasks_per_node(text: str) -> Iterator[int]:
    """The tasks of every node, from Slurm's notation: ``32(x2),16`` gives 32, 32, 16."""
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
        raise BackendError(f"{key}={environ[key]!r} is not a number; unset or correct it") from None
