"""The launcher's environment variables -> one ``Rendezvous``.

Understood: torchrun (RANK, WORLD_SIZE, LOCAL_RANK, ...), Open MPI with one process per rank
(OMPI_COMM_WORLD_*), Slurm's srun (SLURM_PROCID, ...), and nothing at all: a world of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llamax.errors import BackendError

FAMILIES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}

ATTEMPT = "TORCHELASTIC_RESTART_COUNT"


@dataclass(frozen=True)
class Rendezvous:
    """Who I am in the world, and where rank 0 waits for the others.

    ``agent_store``: the launcher itself serves the key-value store at ``address:port``;
    ``attempt``: how often it has restarted the job.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 29500
    agent_store: bool = False
    attempt: int = 0

    @property
    def one_machine(self) -> bool:
        return self.local_world_size == self.world_size


def rendezvous(environ: Mapping[str, str]) -> Rendezvous:
    """The rendezvous that ``environ`` describes.

    Raises BackendError where a launcher's variables are incomplete, no number or contradict each
    other.
    """
    for launcher, keys in FAMILIES.items():
        if keys[0] not in environ or keys[1] not in environ:
            continue
        rank, world_size = (_number(environ, key) for key in keys[:2])
        local_rank = _number(environ, keys[2]) if keys[2] in environ else rank
        local_size = _number(environ, keys[3]) if keys[3] in environ else world_size
        if not 0 <= rank < world_size or not 0 <= local_rank < local_size <= world_size:
            raise BackendError(
                f"{launcher} says rank {rank} of {world_size} and local rank {local_rank} of "
                f"{local_size}, which contradict each other; check {', '.join(keys)}"
            )
        if local_size < world_size and "MASTER_ADDR" not in environ:
            raise BackendError(
                f"{launcher} started {world_size} ranks on several machines but MASTER_ADDR is not "
                "set; export the address of rank 0's machine"
            )
        return Rendezvous(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_size,
            address=environ.get("MASTER_ADDR", "127.0.0.1"),
            port=_number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else 29500,
            agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=_number(environ, ATTEMPT) if ATTEMPT in environ else 0,
        )
    return Rendezvous()


def _number(environ: Mapping[str, str], key: str) -> int:
    try:
        return int(environ[key])
    except ValueError:
        raise BackendError(f"{key}={environ[key]!r} is not a number; unset or mend it") from None
