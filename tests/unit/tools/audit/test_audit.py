"""What ``llamax audit`` refuses before anything is traced, and its plans of ranks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from llamax.cli.audit import main
from llamax.config.hardware import load_machine
from llamax.config.load import load_config
from llamax.parallel.mesh import Mesh
from llamax.runtime.errors import BackendError, ConfigError
from llamax.tools.audit.auditor import audit, check_machine, corner_ranks, notes
from llamax.tools.audit.precompile import asked
from llamax.training.resolve import resolve

TRN1 = load_machine("trn1.32xlarge")


def test_the_mesh_of_a_cluster() -> None:
    config = load_config("llama2-7b")
    check_machine(TRN1)
    assert resolve(config, 128).on_trn1(32).mesh == Mesh(tp=8, dp=16)
    four = replace(config, parallel=replace(config.parallel, tensor=4))
    assert resolve(four, 32).on_trn1(32).mesh.groups("tp")[0] == (0, 8, 16, 24)


@pytest.mark.parametrize("tensor", [3, 12, 64])
def test_a_mesh_that_does_not_fit_a_node(tensor: int) -> None:
    config = load_config("llama2-7b")
    config = replace(config, parallel=replace(config.parallel, tensor=tensor))
    with pytest.raises(
        ConfigError, match=f"parallel.tensor={tensor} does not divide a node of 32 ranks"
    ):
        audit(config, TRN1, 3)


def test_a_machine_without_xla() -> None:
    with pytest.raises(ConfigError, match="compiles no XLA programs"):
        check_machine(load_machine("trn2.48xlarge"))


@pytest.mark.parametrize(("length", "use"), [(1000, 1024), (3000, 2944), (4000, 3968)])
def test_a_length_that_the_flash_kernel_refuses(length: int, use: int) -> None:
    config = load_config("llama2-7b")
    (note,) = notes(replace(config, data=replace(config.data, sequence_length=length)))
    assert note.startswith(f"the sequence length {length} is not a multiple of 128")
    assert note.endswith(f"; use {use}")
    (note,) = notes(config)
    assert "llamax's NKI kernel replaces them" in note


def test_a_loss_that_kernels_compute_is_noted() -> None:
    config = load_config("llama3.2-1b")
    loss, attention = notes(config)
    assert loss.startswith("the loss is traced as plain operations")
    assert attention.startswith("attention is traced")
    (attention,) = notes(replace(config, run=replace(config.run, dtype="float32")))
    assert attention.startswith("attention is traced")


def test_corners() -> None:
    assert corner_ranks(Mesh(tp=8, dp=16)) == [0, 7, 120, 127]
    assert corner_ranks(Mesh()) == [0]
    placed = Mesh(tp=4, dp=8).on_trn1(32)
    assert [(at.dp, at.tp) for at in map(placed.coordinate, corner_ranks(placed))] == [
        (0, 0),
        (7, 0),
        (0, 3),
        (7, 3),
    ]


def test_no_nodes() -> None:
    with pytest.raises(ConfigError, match="--nodes=0 is out of range"):
        main(["--config", "llama2-7b", "--nodes", "0"])


@pytest.mark.skipif(torch.__version__.startswith("2.9."), reason="torch-xla may be there")
def test_one_line_where_torch_xla_is_absent() -> None:
    with pytest.raises(BackendError, match="torch-xla"):
        main(["--config", "llama2-7b", "--nodes", "4"])
    done = subprocess.run(
        [sys.executable, "-m", "llamax", "audit", "--config", "llama2-7b", "--nodes", "4"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "torch==2.9.0" in done.stderr


def test_neuron_parallel_compile_asks_by_its_variable() -> None:
    assert asked({"NEURON_EXTRACT_GRAPHS_ONLY": "1"})
    assert not asked({"NEURON_EXTRACT_GRAPHS_ONLY": "0"})
    assert not asked({})


def test_the_library_function_is_exported_by_the_package() -> None:
    from llamax.tools import audit
    from llamax.tools.audit import auditor

    assert audit.audit is auditor.audit
    with pytest.raises(AttributeError, match="has no attribute 'audits'"):
        audit.audits  # noqa: B018
    code = "import sys, llamax.tools.audit.compile_cache; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
