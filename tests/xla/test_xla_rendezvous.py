"""torch-xla's own Neuron plugin reads the variables that ``parallel.rendezvous`` sets."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("torch_xla", reason="needs torch-xla: `make test` runs this in .venv-xla")

from torch_xla._internal import neuron

from llamax.parallel.rendezvous import (
    FAMILIES,
    NEURON_PORT,
    Rendezvous,
    neuron_variables,
    rendezvous,
)

TORCHRUN = {
    "RANK": "33",
    "WORLD_SIZE": "64",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "32",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}


def told(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> dict[str, str]:
    """What the plugin sets for the Neuron runtime in such an environment."""
    with monkeypatch.context() as patch:
        environ = dict(variables)
        patch.setattr(os, "environ", environ)
        neuron.configure_pjrt_environment()
        return {key: value for key, value in environ.items() if "NEURON" in key or "PJRT" in key}


def test_torchrun_is_the_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    found = told(monkeypatch, TORCHRUN)
    assert found["NEURON_PJRT_PROCESS_INDEX"] == "33"
    assert found["NEURON_PJRT_WORLD_SIZE"] == "64"
    assert found["NEURON_RT_VISIBLE_CORES"] == "1"
    assert found["NEURON_RT_ROOT_COMM_ID"] == f"10.0.0.1:{NEURON_PORT}"


@pytest.mark.parametrize("launcher", ["mpirun", "mpiexec"])
def test_other_launchers_lead_to_the_same(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    environ = dict(zip(FAMILIES[launcher], ("33", "64", "1", "32"), strict=True))
    environ["MASTER_ADDR"] = "10.0.0.1"
    variables = neuron_variables(environ, rendezvous(environ))
    expected = told(monkeypatch, TORCHRUN)
    assert told(monkeypatch, {**environ, **variables}) == expected
    del variables["TORCHELASTIC_RUN_ID"]
    assert "NEURON_PJRT_PROCESS_INDEX" not in told(monkeypatch, {**environ, **variables})


def test_a_rank_alone_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = told(monkeypatch, neuron_variables({}, Rendezvous()))
    assert found["NEURON_PJRT_WORLD_SIZE"] == "1"
    assert found["NEURON_RT_ROOT_COMM_ID"] == f"127.0.0.1:{NEURON_PORT}"
