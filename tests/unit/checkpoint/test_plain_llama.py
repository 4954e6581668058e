"""The names, shapes and cuts of a plain Llama, known without a module for each layer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import support.checkpoints as worlds
from support import foreign
from support.models import tiny

from llamax.checkpoint import plain_llama
from llamax.checkpoint.formats import convert
from llamax.config.model import MAX_LAYERS, ModelConfig
from llamax.model.llama import Llama
from llamax.runtime.errors import CheckpointError


@pytest.mark.parametrize("layers", [1, 2, 3, 12])
@pytest.mark.parametrize("tied", [False, True])
def test_layers_are_those_of_the_whole_model(layers: int, tied: bool) -> None:
    model = tiny(num_hidden_layers=layers, tie_word_embeddings=tied)
    whole = Llama(model, device="meta").sharded_parameters()
    assert [*plain_llama.plain_shapes(model).items()] == [*whole.hub_shapes().items()]
    assert [*plain_llama.plain_cuts(model).items()] == [*whole.hub_cuts().items()]


def test_a_configuration_of_many_layers_builds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take a gigabyte before the first missing tensor is named."""
    built: list[int] = []

    def build(model: ModelConfig, device: str) -> Llama:
        built.append(model.num_hidden_layers)
        assert model.num_hidden_layers < 3
        return Llama(model, device=device)

    monkeypatch.setattr(plain_llama, "Llama", build)
    model = worlds.llama(vocabulary=40)
    (tmp_path / "in").mkdir()
    foreign.nxd(tmp_path / "in", worlds.wholes(model), model, tp=1)
    many = replace(model, num_hidden_layers=MAX_LAYERS)
    (tmp_path / "config.json").write_text(json.dumps(many.to_hub("float32")))
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.2\.input_layernorm\.weight"):
        convert.import_checkpoint(
            tmp_path / "in", tmp_path / "out", config=str(tmp_path / "config.json")
        )
    assert set(built) == {1}
