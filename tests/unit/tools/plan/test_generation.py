"""The plan of generating: its bytes are those of a model and a cache."""

from __future__ import annotations

import json

import pytest
import torch
from support.models import TIED, tiny

from llamax.cli.plan import main
from llamax.config.model import ModelConfig
from llamax.config.schema import Config, ParallelConfig, RunConfig
from llamax.inference.kv_pool import KVPool
from llamax.model.llama import Llama
from llamax.parallel.collectives import Solo
from llamax.runtime.errors import ConfigError
from llamax.tools.plan.generation import plan_generation


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("model", [tiny(), TIED])
def test_weights_and_cache_are_those_of_a_rank(model: ModelConfig, tensor: int) -> None:
    config = Config(model, ParallelConfig(tensor=tensor), run=RunConfig(dtype="bfloat16"))
    plan = plan_generation(config, 3, 40, "trn1.32xlarge")
    found = {line.name: line.value for line in plan.memory}
    axis = Solo("tp")
    axis.size = tensor
    built = Llama(model, axis, dtype=torch.bfloat16, device="meta")
    assert found["weights"] == sum(each.nbytes for each in built.parameters())
    assert found["keys and values"] == KVPool(built, 3, 40, memory=False).num_bytes
    assert plan.fits
    assert plan.peak < plan_generation(config, 6, 40, "trn1.32xlarge").peak


def test_the_command_prints_both_and_refuses_what_does_not_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["--config", "llama3-8b", "--parallel.tensor=8", "--generate"]
    assert main([*command, "4x1000"]) == 0
    text = capsys.readouterr().out
    assert "8 ranks of trn1.32xlarge: generating 4 x 1000 tokens" in text
    assert "tokens/s" in text
    assert main([*command, "4x1000", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["tokens_per_s"] == pytest.approx(4 / plan["step_s"])
    assert main([*command, "400x8192"]) == 6
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("0x64", "a batch of 0 is out of range; use 1 or more"),
        ("1x1", "a length of 1 tokens is out of range; use 2 to max_position_embeddings=8192"),
        ("1x8193", "a length of 8193 tokens is out of range"),
    ],
)
def test_a_shape_out_of_range_is_an_error(shape: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--config", "llama3-8b", "--generate", shape])


def test_a_shape_of_another_form_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--config", "llama3-8b", "--generate", "8"])
    assert "'8' is not BATCHxLENGTH" in capsys.readouterr().err
