"""The bytes that a GPU keeps for attention with a mask of documents, or in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.runs import share

from llamax.config.hardware import load_machine
from llamax.config.load import load_config
from llamax.parallel.mesh import Mesh
from llamax.tools.plan.context import kept_by_gpu

T, WIDTH = 4096, 4096  # tokens, and features of all query heads


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        ([], 2 * (2 * T * WIDTH + T * T)),  # keys and values of all heads, and a mask
        (["--data.separate_documents=false"], 0),
        (["--data.separate_documents=false", "--run.dtype=float32"], 4 * 2 * T * WIDTH),
    ],
)
def test_masks_and_copies_of_grouped_heads_are_planned(overrides: list[str], kept: int) -> None:
    gpus, whole = load_machine("p5.48xlarge"), ["--data.micro_batch=1", "--parallel.tensor=1"]
    settings = ["--run.backend=cuda", f"--data.sequence_length={T}", *whole, *overrides]
    found = share(load_config("llama3.1-8b", settings), Mesh())
    assert found.tokens == T
    assert kept_by_gpu(found, gpus) == kept
    assert kept_by_gpu(found, replace(gpus, backend="neuron")) == 0


def test_llama_2_has_no_grouped_heads() -> None:
    settings = ["--run.backend=cuda", "--data.micro_batch=1", "--parallel.tensor=1"]
    found = share(load_config("llama2-7b", settings), Mesh())
    T = found.tokens
    assert kept_by_gpu(found, load_machine("p5.48xlarge")) == 2 * T * T
