"""What a program gives to the functions of ``import llamax`` by mistake: refused in one line."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import tiny
from support.tiny_run import config, make_dataset
from torch import Tensor, nn

import llamax
from llamax.model.llama import Llama
from llamax.runtime.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    (folder / "text.txt").write_text("def main(argv):\n    return len(argv) + 1\n" * 300)
    llamax.prepare(folder / "text.txt", folder / "data", train_tokenizer=300, validation=0.0)
    settings = {
        "model": dataclasses.asdict(tiny(vocab_size=300)),
        "data": {"path": str(folder / "data"), "sequence_length": 16},
        "run": {"steps": 1, "folder": str(folder / "run")},
    }
    return llamax.train(settings).folder


class Mean(Llama):
    """A mean where the sum and the number of tokens are expected."""

    def loss(self, *args: Any, **options: Any) -> Any:
        total, count = super().loss(*args, **options)
        return total / count


class Detached(Llama):
    def loss(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        total, count = super().loss(*args, **options)
        return total.detach(), count


class PerToken(Llama):
    def loss(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        total, count = super().loss(*args, **options)
        return total * torch.ones(3), count


class Counted(Llama):
    """The number of tokens as a Python number."""

    def loss(self, *args: Any, **options: Any) -> Any:
        total, count = super().loss(*args, **options)
        return total, int(count)


class Closed(Llama):
    """Takes nothing but a configuration."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)


RETURN = "return the sum of the losses of this rank's tokens and their number, two 0-d tensors"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Mean, f"the loss of Mean returns Tensor; {RETURN}"),
        (Detached, "the loss of Detached has no gradient"),
        (PerToken, f"the loss of PerToken returns a tensor of [3]; {RETURN}"),
        (Counted, f"the loss of Counted returns a number of tokens that is int; {RETURN}"),
        (Closed, "Closed cannot be made as a run makes it: too many positional arguments"),
    ],
)
def test_a_class_of_its_own_that_a_step_cannot_use(
    data: Path, tmp_path: Path, kind: type[Llama], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        llamax.train(config(data, tmp_path / "run"), model_class=kind)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_class": nn.Linear}, "`model_class` is Linear, not a subclass of llamax.model"),
        ({"model_class": "Llama"}, "`model_class` is 'Llama', not a subclass of llamax.model"),
        ({"learning_rate": 3e-4}, "`learning_rate=0.0003` is no function of step; give one"),
        ({"ranks": "2"}, "`ranks='2'` is not a whole number; use 0 for none"),
        ({"ranks": True}, "`ranks=True` is not a whole number; use 0 for none"),
        ({"learning_rate": lambda step: None}, "`learning_rate` gives None for step 1; return a"),
        ({"learning_rate": lambda step: math.nan}, "`learning_rate` gives nan for step 1; return"),
        ({"learning_rate": lambda step: -1.0}, "`learning_rate` gives -1.0 for step 1; return"),
        ({"learning_rate": lambda: 1.0}, "`learning_rate` cannot be called with step: "),
        ({"lr_scale": 0.1}, "`lr_scale=0.1` is no function of name; give one from a parameter's"),
        ({"lr_scale": lambda name: -1}, "`lr_scale` gives -1 for model.embed_tokens.weight; retur"),
        ({"update": "lion"}, "`update='lion'` is no function of p, g, m, v, by; give one as llam"),
        ({"update": lambda p, g: None}, "`update` cannot be called with p, g, m, v, by: too many"),
    ],
)
def test_parts_that_are_none(
    data: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        llamax.train(config(data, tmp_path / "run"), **options)
    assert str(refused.value).startswith(words)
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_bytes()


def test_numbers_of_torch_and_whole_numbers_are_rates(data: Path, tmp_path: Path) -> None:
    def rate(step: int) -> Any:
        return torch.tensor(1e-3) if step == 1 else 0

    done = llamax.train(config(data, tmp_path / "run"), run={"steps": 2}, learning_rate=rate)
    assert [record["lr"] for record in done.metrics] == pytest.approx([1e-3, 0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.generate(3), "the prompt is int; give a text, a row or a list"),
        (lambda model: model.generate(None), "the prompt is NoneType; give a text, a row or a"),
        (lambda model: model.generate("a", max_new_tokens="3"), "`max_new_tokens='3'` is not a"),
        (lambda model: model.generate("a", temperature="hot"), "`temperature='hot'` is not a"),
        (
            lambda model: model.generate("a", top_k=1.5, max_new_tokens=3),
            "`top_k=1.5` is not a whole number",
        ),
        (lambda model: model.generate("a", top_p="x"), "`top_p='x'` is not a number"),
        (lambda model: model.generate("a", batch="x"), "`batch='x'` is not a whole number"),
        (lambda model: model.generate("a", stop=b"x"), "`stop=b'x'` is no list of texts"),
        (lambda model: model.generate("a", stop=[3]), "`stop=[3]` is no list of texts"),
        (lambda model: model.generate("a", stop=None), "`stop=None` is no list of texts"),
        (lambda model: model.generate("a", stop_ids=3), "`stop_ids=3` is no list; give the tok"),
        (lambda model: model.generate("a", stop_ids=["3"]), "`stop_ids='3'` is not a whole num"),
        (lambda model: model.generate([["a"]]), "prompt ['a'] is neither a text, a list of mes"),
        (lambda model: model.logits("\ud800"), "'\\ud800' holds half of a surrogate pair"),
        (lambda model: model.logits(3), "ids are int; give a text, or ids as a list or tensor"),
        (lambda model: model.logits({}), "ids are dict; give a text, or ids as a list or tensor"),
        (lambda model: model.logits([[1, 2], [3]]), "ids are no table of numbers; give"),
    ],
)
def test_what_a_model_is_asked_by_mistake(run: Path, call: Any, words: str) -> None:
    with pytest.raises((ConfigError, DataError)) as refused:
        call(llamax.load(run))
    assert str(refused.value).startswith(words)


def test_a_model_is_made_of_the_section_model(data: Path, tmp_path: Path) -> None:
    for given, what in ((config(data, tmp_path), "Config"), (dataclasses.asdict(tiny()), "dict")):
        with pytest.raises(ConfigError, match=rf"^Llama takes a ModelConfig, not {what}; give"):
            Llama(given)  # type: ignore[arg-type]
