"""The search for a mesh that fits."""

from __future__ import annotations

import pytest

from llamax.cli.plan import main
from llamax.config.hardware import (
    load_machine,
)
from llamax.config.load import load_config
from llamax.config.schema import Config
from llamax.tools.plan.report import show_search
from llamax.tools.plan.search import search

TRN1 = load_machine("trn1.32xlarge")


ONE = [f"--{key}" for key in ("data.separate_documents=false",)]


def recipe(name: str, *overrides: str) -> Config:
    return load_config(name, overrides)


def test_a_search_that_finds_nothing_reports_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "llama2-7b", "--ranks", "24", "--search"]) == 6
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "none of 144 layouts fits"
    assert rest[0] == "the others:"
    assert "  tensor 1: data.global_batch=1024 is not a multiple of" in rest[1]
    assert main(["--config", "llama2-7b", "--ranks", "1", "--search"]) == 6
    assert "tensor 1: 18 layouts do not fit; the smallest" in capsys.readouterr().out


def test_search_ranks_meshes_that_fit_and_counts_the_others() -> None:
    config = recipe("llama2-7b", *ONE)
    plans, refused = search(config, TRN1, 4)
    fitting = [each for each in plans if each.memory.fits]
    assert fitting == plans[: len(fitting)]
    speeds = [each.time.tokens_per_s for each in fitting]
    assert speeds == sorted(speeds, reverse=True)
    text = "\n".join(show_search(config, plans, refused))
    assert "tensor 1: 12 layouts do not fit" in text
    assert "parallel.tensor=64 does not divide model.num_attention_heads=32" in text


@pytest.mark.parametrize(
    ("name", "instance", "nodes"),
    [
        ("llama2-70b", "trn1.32xlarge", 32),
        ("llama3.1-8b-128k", "trn1.32xlarge", 32),
        ("llama2-70b", "p5.48xlarge", 8),
        ("llama3.2-1b", "g5.12xlarge", 2),
    ],
)
def test_tensor_and_context_ranks_share_a_node(name: str, instance: str, nodes: int) -> None:
    machine = load_machine(instance)
    plans, refused = search(recipe(name), machine, nodes)
    assert plans
    for each in plans:
        assert machine.ranks % (each.run.mesh.tp * each.run.mesh.cp) == 0
    assert any(f"a node of {machine.ranks} ranks" in each.reason for each in refused)
