"""The environment of every launcher, as recorded from real ones, and every contradiction in it."""

from __future__ import annotations

from typing import Any

import pytest

from llamax.parallel import rendezvous as env
from llamax.parallel.rendezvous import Rendezvous, first_host, ipv4, neuron_variables, rendezvous
from llamax.runtime.errors import BackendError


def resolve(name: str, wait_s: float) -> str:
    return {"trn1": "10.0.0.1", "algo-1": "10.0.0.2", "10.0.0.3": "10.0.0.3"}[name]


def read(**environ: object) -> Rendezvous:
    return rendezvous({key: str(value) for key, value in environ.items()}, resolve)


def torchrun(rank: int, size: int, local: int, local_size: int, **more: Any) -> dict[str, Any]:
    return {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": local_size,
        "MASTER_ADDR": "trn1",
        "MASTER_PORT": 29400,
        **more,
    }


def openmpi(rank: int, size: int, local: int, local_size: int, **more: Any) -> dict[str, Any]:
    values = (rank, size, local, local_size)
    return {**dict(zip(env.FAMILIES["mpirun"], values, strict=True)), **more}


def srun(rank: int, size: int, local: int, tasks: str, node: int, **more: Any) -> dict[str, Any]:
    values = (rank, size, local, tasks)
    found = dict(zip(env.FAMILIES["srun"], values, strict=True))
    return {**found, "SLURM_NODEID": node, "SLURM_STEP_NODELIST": "trn[1-2]", **more}


def where(rank: int, size: int, local: int, local_size: int, launcher: str, **more: Any) -> object:
    return Rendezvous(rank, size, local, local_size, launcher=launcher, **more)


AWAY = {"address": "10.0.0.1"}
UNDERSTOOD = [
    ({}, Rendezvous()),
    (
        torchrun(33, 64, 1, 32, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=2),
        where(33, 64, 1, 32, "torchrun", **AWAY, port=29400, agent_store=True, attempt=2),
    ),
    (torchrun(1, 4, 1, 4), where(1, 4, 1, 4, "torchrun", port=29400)),
    ({"RANK": 1, "WORLD_SIZE": 2}, where(1, 2, 1, 2, "torchrun")),
    ({"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}, where(1, 2, 1, 2, "torchrun")),
    (
        {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "trn1", env.IN_KUBERNETES: "10.0.0.9"},
        where(1, 2, 0, 1, "torchrun", **AWAY),
    ),
    (openmpi(3, 4, 3, 4), where(3, 4, 3, 4, "mpirun")),
    (openmpi(33, 64, 1, 32, MASTER_ADDR="trn1"), where(33, 64, 1, 32, "mpirun", **AWAY)),
    (
        {"PMI_RANK": 1, "PMI_SIZE": 2, "MPI_LOCALRANKID": 1, "MPI_LOCALNRANKS": 2},
        where(1, 2, 1, 2, "mpiexec"),
    ),
    (srun(3, 4, 1, "2(x2)", 1), where(3, 4, 1, 2, "srun", **AWAY)),
    (
        srun(3, 4, 0, "3,1", 1, MASTER_ADDR="10.0.0.3"),
        where(3, 4, 0, 1, "srun", address="10.0.0.3"),
    ),
    (srun(1, 2, 1, "2", 0, PMI_RANK=1, PMI_SIZE=2), where(1, 2, 1, 2, "srun")),
    ({"SLURM_PROCID": 0, "SLURM_NTASKS": 64, "SLURM_LOCALID": 0}, Rendezvous()),
    (
        {"JOB_COMPLETION_INDEX": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "trn1"},
        where(1, 2, 0, 1, "Kubernetes", **AWAY),
    ),
    (
        {"SM_HOSTS": '["algo-2","algo-1"]', "SM_CURRENT_HOST": "algo-2", "SM_NUM_GPUS": 0},
        where(1, 2, 0, 1, "SageMaker", address="10.0.0.2"),
    ),
    ({"SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-1"}, where(0, 1, 0, 1, "SageMaker")),
    # torchrun inside mpirun, one process a node; inside srun, by c10d in another order of nodes;
    # mpirun's own ranks inside srun's daemons
    (
        {**openmpi(1, 2, 0, 1), **torchrun(33, 64, 1, 32, GROUP_WORLD_SIZE=2)},
        where(33, 64, 1, 32, "torchrun", **AWAY, port=29400),
    ),
    (
        {**srun(1, 2, 0, "1(x2)", 1), **torchrun(1, 64, 1, 32, GROUP_WORLD_SIZE=2)},
        where(1, 64, 1, 32, "torchrun", **AWAY, port=29400),
    ),
    (
        {**srun(0, 1, 0, "1", 0), **openmpi(3, 4, 3, 4)},
        where(3, 4, 3, 4, "mpirun"),
    ),
    ({**openmpi(0, 1, 0, 1), **torchrun(3, 4, 3, 4)}, where(3, 4, 3, 4, "torchrun", port=29400)),
]


@pytest.mark.parametrize(("environ", "expected"), UNDERSTOOD)
def test_every_launcher_is_understood(environ: dict[str, Any], expected: Rendezvous) -> None:
    assert read(**environ) == expected


CONTRADICTIONS = [
    ({"RANK": 1}, "RANK is set but WORLD_SIZE is not: torchrun sets all of RANK, WORLD_SIZE"),
    ({"WORLD_SIZE": 4}, "WORLD_SIZE is set but RANK is not"),
    ({"RANK": "two", "WORLD_SIZE": 4}, "RANK='two' is not a number; unset or correct it"),
    (torchrun(4, 4, 0, 4), "torchrun says rank 4 of 4 and local rank 0 of 4"),
    (torchrun(0, 4, 0, 8), "contradict each other; check RANK, WORLD_SIZE"),
    (torchrun(0, 4, -1, 4), "local rank -1 of 4"),
    (
        {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "trn1"},
        "LOCAL_RANK and LOCAL_WORLD_SIZE are not set; set them, or start ranks with torchrun",
    ),
    ({"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}, "MASTER_ADDR is not"),
    ({"OMPI_COMM_WORLD_RANK": 1}, "OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_LOCAL_RANK, OMPI"),
    (openmpi(1, 64, 0, 32, MASTER_ADDR="trn1"), "dealt round-robin.*--map-by ppr:32:node"),
    ({"PMI_RANK": 1, "PMI_SIZE": 2}, "MPI_LOCALRANKID, MPI_LOCALNRANKS are not: mpiexec sets"),
    (srun(0, 2, 0, "2", 1), "SLURM_NODEID=1 but SLURM_STEP_TASKS_PER_NODE='2' lists 1 node"),
    (srun(0, 2, 0, "two", 0), "'two' is not Slurm's notation"),
    ({"JOB_COMPLETION_INDEX": 1}, "WORLD_SIZE is not: Kubernetes sets all of JOB_COMPLETION"),
    ({"SM_HOSTS": "algo-1", "SM_CURRENT_HOST": "algo-1"}, "is not a JSON list with"),
    ({"SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-2"}, "is not a JSON list with"),
    (
        {"SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-1", "SM_NUM_NEURONS": 32},
        "SM_NUM_NEURONS=32; give the estimator distribution=",
    ),
    (
        {**openmpi(1, 2, 0, 1), **torchrun(1, 32, 1, 32, GROUP_WORLD_SIZE=1)},
        r"mpirun started 2 processes, but torchrun made process 1 rank 1 of 32; give "
        r"torchrun --nnodes=2 --node-rank=\$OMPI_COMM_WORLD_RANK",
    ),
    ({**openmpi(1, 4, 1, 4), "RANK": 0, "WORLD_SIZE": 1}, "or unset RANK and WORLD_SIZE"),
    ({**srun(1, 2, 0, "1(x2)", 1), **torchrun(0, 32, 0, 32)}, "srun started 2 processes"),
]


@pytest.mark.parametrize(("environ", "message"), CONTRADICTIONS)
def test_contradictions_are_refused_in_one_line(environ: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message) as refused:
        read(**environ)
    assert "\n" not in str(refused.value)


def test_the_first_rank_of_a_machine_is_known_before_all_is_read() -> None:
    for start in (torchrun, openmpi):
        said = [{k: str(v) for k, v in start(8, 16, local, 8).items()} for local in (0, 1)]
        assert [*map(env.is_first_local_rank, said)] == [True, False]
    assert env.is_first_local_rank({})


def test_the_master_becomes_an_ipv4_address() -> None:
    assert ipv4("localhost") == "127.0.0.1"
    for name in ("no-such-host.invalid", "a" * 64 + ".invalid", "fd00::2"):
        with pytest.raises(BackendError, match="has no IPv4 address here"):
            ipv4(name)


def test_a_pods_name_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([OSError("not yet"), [(0, 0, 0, "", ("10.1.2.3", 0))]])

    def lookup(*_: object) -> object:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(env.socket, "getaddrinfo", lookup)
    monkeypatch.setattr(env.time, "sleep", lambda _: None)
    assert ipv4("pod-0", wait_s=5) == "10.1.2.3"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("trn1", "trn1"),
        ("trn[07-09,12],head", "trn07"),
        ("trn[3,5]", "trn3"),
        ("a-st-trn1-[1-4]", "a-st-trn1-1"),
        ("head,trn[1-2]", "head"),
        ("r[1-2]n[3-4].local", "r1n3.local"),
    ],
)
def test_the_first_host_of_a_nodelist(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_what_torch_xla_wants_before_its_import() -> None:
    environ = {key: str(value) for key, value in openmpi(33, 64, 1, 32, MASTER_ADDR="trn1").items()}
    found = neuron_variables(environ, rendezvous(environ, resolve))
    assert found == {
        "RANK": "33",
        "WORLD_SIZE": "64",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "32",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "llamax-mpirun",
        "NEURON_RT_ROOT_COMM_ID": "10.0.0.1:62182",
    }
    kept = {"TORCHELASTIC_RUN_ID": "mine", "NEURON_RT_ROOT_COMM_ID": "10.0.0.9:1"}
    assert kept.keys().isdisjoint(neuron_variables(kept, Rendezvous()))
    assert neuron_variables({}, Rendezvous())["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("world_size", "source", "root"),
    [(64, "10.0.0.7", "10.0.0.7"), (64, "", "127.0.1.1"), (32, "10.0.0.7", "127.0.1.1")],
    ids=["two machines", "no route", "one machine"],
)
def test_a_name_that_is_the_loopback_on_its_own_machine(
    monkeypatch: pytest.MonkeyPatch, world_size: int, source: str, root: str
) -> None:
    monkeypatch.setattr("llamax.parallel.rendezvous.source_address", lambda target: source)
    where = Rendezvous(0, world_size, 0, 32, "127.0.1.1")
    assert neuron_variables({}, where)["NEURON_RT_ROOT_COMM_ID"] == f"{root}:62182"
