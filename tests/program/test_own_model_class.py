"""A model class of a program's own, from the first step to the last: trained, saved, gone on with,
loaded, and refused where a format cannot hold it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.models import DECIDED, tiny
from support.own_modules import CentredNorm, OwnLlama
from support.tiny_run import MODEL, STEPS, config, forget, make_dataset
from torch import Tensor, nn

import llamax
from llamax.checkpoint import Checkpoint
from llamax.checkpoint.build_model import build_model
from llamax.config.schema import CheckpointConfig
from llamax.data.tokenizer.train import train_sentencepiece
from llamax.model.llama import Llama
from llamax.parallel.collectives import Axes
from llamax.parallel.sharding import Block, Replica, Shard
from llamax.runtime.errors import CheckpointError, ConfigError


class Named(OwnLlama):
    """With as many key/value heads as the tiny run has."""


class Frozen(OwnLlama):
    """Its scales of heads stay as they are; its embedding too."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.heads.scale.requires_grad_(False).fill_(1.5)
        self.model.embed_tokens.weight.requires_grad_(False)


class Counting(Llama):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("seen", torch.zeros(1))


class Smoothed(Llama):
    """Another loss; no tensors of its own."""

    def loss(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        total, count = super().loss(*args, **options)
        return total * 2, count


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> llamax.train:  # type: ignore
    folder = tmp_path_factory.mktemp("own") / "run"
    return llamax.train(config(data, folder), run={"log_every": 1}, model_class=Named)


def weights(folder: Path) -> dict[tuple[str, str], Tensor]:
    source = Checkpoint(folder)
    return {(n, k): source.read(n, k) for n in source.names() for k in source.kinds(n)}


@pytest.mark.parametrize("kind", [Named, Frozen])
def test_a_run_goes_on_to_the_same_bits(data: Path, tmp_path: Path, kind: type[Llama]) -> None:
    whole = llamax.train(config(data, tmp_path / "a"), run={"log_every": 1}, model_class=kind)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    forget(tmp_path / "b", 3)
    again = llamax.train(config(data, tmp_path / "b"), run={"log_every": 1}, model_class=kind)
    assert [r["loss"] for r in again.metrics] == [r["loss"] for r in whole.metrics]
    found, expected = (
        weights(tmp_path / name / f"checkpoints/step-{STEPS:08d}") for name in ("b", "a")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    kinds = {kind for name, kind in expected if name == "heads.scale"}
    assert kinds == ({"weight"} if kind is Frozen else {"weight", "exp_avg", "exp_avg_sq"})
    if kind is Frozen:
        assert (expected["heads.scale", "weight"] == 1.5).all()
        first = weights(tmp_path / "a/checkpoints/step-00000001")
        for name in ("model.embed_tokens.weight", "heads.scale"):
            assert torch.equal(first[name, "weight"], expected[name, "weight"]), "is not trained"


def test_a_checkpoint_names_the_class(trained: Any) -> None:
    assert Checkpoint(trained.checkpoint).state["model_class"].endswith("Named")


def test_going_on_without_the_class_is_refused(data: Path, trained: Any, tmp_path: Path) -> None:
    run = shutil.copytree(trained.folder, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"has .*, which the model lacks; .* as model_class"):
        llamax.train(config(data, run), run={"steps": STEPS + 1})
    plain = llamax.train(config(data, tmp_path / "plain"))
    with pytest.raises(CheckpointError, match=r"has no .*, which the model has; start a new run"):
        llamax.train(plain.config, run={"steps": STEPS + 1}, model_class=Named)


def test_formats_of_others_refuse_tensors_of_its_own(trained: Any, tmp_path: Path) -> None:
    words = r"holds .* and \d+ more: .*Named was trained, which {} cannot describe; use it with"
    with pytest.raises(CheckpointError, match=words.format("a Hugging Face folder")):
        llamax.consolidate(trained.folder, tmp_path / "hub")
    for to, name in (("hf", "a Hugging Face folder"), ("nxd", "NxD's for"), ("meta", "Meta's for")):
        with pytest.raises(
            CheckpointError, match=words.format(f"{name}.*").replace(" cannot", "cannot")
        ):
            llamax.export(trained.folder, tmp_path / to, to=to)  # type: ignore[arg-type]
    assert not [*tmp_path.iterdir()], "nothing was written"


def test_a_hub_folder_with_other_tensors_or_fewer_is_refused(tmp_path: Path) -> None:
    for change, words in (
        (lambda t: t.update({"model.layers.0.gate": torch.zeros(1)}), r"holds model.layers.0.gate"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"has no model.layers.1.mlp.up_pr"),
    ):
        folder = tmp_path / words[-4:]
        folder.mkdir()
        model = tiny(num_key_value_heads=4)
        tensors = {
            n: torch.zeros(s) for n, s in Llama(model).sharded_parameters().hub_shapes().items()
        }
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(model.to_hub("float32")))
        with pytest.raises(CheckpointError, match=words):
            llamax.export(folder, tmp_path / "out", to="meta")


def test_it_cannot_be_written_beside_checkpoints(data: Path, tmp_path: Path) -> None:
    cfg = config(data, tmp_path / "run")
    hub = replace(cfg, checkpoint=replace(cfg.checkpoint, also_hf=True))
    with pytest.raises(ConfigError, match=r"also_hf=true, but .* Named adds to Llama"):
        build_model(hub, None, True, Axes.solo(), torch.device("cpu"), Named)
    build_model(hub, None, True, Axes.solo(), torch.device("cpu"), Smoothed)
    with pytest.raises(ConfigError, match=r"seen of Counting is a buffer.*persistent=False"):
        llamax.train(cfg, model_class=Counting)


def test_adapters_are_refused(data: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    drawn = Llama(MODEL).init(0)
    parameters = drawn.sharded_parameters()
    tensors = {
        part.name: parameters[name].tensor.detach().narrow(part.how.dim, part.start, part.length)
        if isinstance(part.how, Shard)
        else parameters[name].tensor.detach()
        for name in parameters
        for part in parameters.parts(name)
    }
    save_file({n: t.contiguous() for n, t in tensors.items()}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(MODEL.to_hub("float32")))
    cfg = config(data, tmp_path / "run")
    start = {"init_from": str(base)}
    with pytest.raises(ConfigError, match=r"finetune.method=lora freezes all of Named"):
        llamax.train(cfg, checkpoint=start, finetune={"method": "lora"}, model_class=Named)
    # A base without its tensors starts it; they keep the values they were made with.
    run = llamax.train(cfg, checkpoint=start, optim={"lr": 1e-9, "min_lr": 0.0}, model_class=Named)
    found = weights(run.checkpoint)
    for name, tensor in tensors.items():
        if "post_attention_layernorm" not in name:  # centred, which the base's is not
            assert torch.allclose(found[name, "weight"], tensor, atol=1e-6), name
    assert found["model.layers.0.mlp.gate", "weight"].abs() < 1e-6
    assert torch.allclose(found["heads.scale", "weight"], torch.ones(()), atol=1e-6)


def test_a_class_with_another_loss_alone_is_written_with_a_warning(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = llamax.train(config(data, tmp_path / "run"), model_class=Smoothed)
    llamax.export(run.folder, tmp_path / "meta", to="meta")
    assert "trained as" in caplog.text
    assert "computes a plain Llama" in caplog.text


def test_it_is_loaded_by_its_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["def main(argv):", "for each in range(10): print(each)"] * 30
    pieces = train_sentencepiece(lines, 320, tmp_path / "tokenizer.model")
    (tmp_path / "a.txt").write_text("\n".join(lines))
    llamax.prepare(tmp_path / "a.txt", tmp_path / "data", tokenizer=pieces, validation=0.0)
    settings: dict[str, Any] = {
        "model": {k: v for k, v in vars(DECIDED).items() if v is not None} | {"vocab_size": 320},
        "data": {"path": tmp_path / "data", "sequence_length": 16, "global_batch": 2},
        "run": {"folder": tmp_path / "run", "steps": 2, "threads": 1, "progress": "off"},
    }
    run = llamax.train(settings, model_class=Named)
    model = llamax.load(run.folder, model_class=Named)
    shown = capsys.readouterr().err
    assert "model_class=Named) loads it" in shown
    assert "llamax consolidate" not in shown
    assert isinstance(model.model, Named)
    assert isinstance(model.generate("def", max_new_tokens=5), str)
    with pytest.raises(CheckpointError, match=r"it is not a tensor of Llama.* as model_class"):
        llamax.load(run.folder)
    plain = llamax.train(settings, run={"folder": str(tmp_path / "b")}, model_class=Smoothed)
    caplog.clear()
    llamax.load(plain.folder)
    assert "is loaded as a plain Llama; give `model_class`" in caplog.text
    caplog.clear()
    llamax.load(plain.folder, model_class=Smoothed)
    assert not caplog.text


class Odd(Llama):
    """A module whose declaration does not fit its parameter."""

    declared: Any = None
    value = torch.zeros(5)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.odd = nn.Module()
        self.odd.shard = self.declared
        self.odd.weight = nn.Parameter(self.value)


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        (Shard(0, (Block(6),)), r"odd.weight is \[5\], but its module declares 6 rows of dim 0"),
        (Shard(1, (Block(5),)), r"odd.weight is \[5\], but its module declares 5 rows of dim 1"),
        (Shard(2, (Block(5),)), r"has shard = .* use Replica\(\) or Shard"),
        (Shard(1, (Block(2), Block(3))), r"has shard = .* with dim 1 and a single block"),
        ("rows", r"the module of odd.weight has shard = 'rows'"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused(declared: Any, words: str) -> None:
    kind = type("Declared", (Odd,), {"declared": declared})
    with pytest.raises(ConfigError, match=words):
        kind(MODEL).sharded_parameters()


def test_declarations_that_fit() -> None:
    for declared, expected in (
        (None, Replica()),
        (Replica(partial=True), Replica(partial=True)),
        ({"weight": Shard(0, (Block(5),))}, Shard(0, (Block(5),))),
        ({"bias": Shard(0, (Block(5),))}, Replica()),
    ):
        kind = type("Declared", (Odd,), {"declared": declared})
        assert kind(MODEL).sharded_parameters()["odd.weight"].cut == expected
    model = Llama(MODEL)
    model.gate = nn.Parameter(torch.zeros(()))
    model.model.layers["0"].input_layernorm = CentredNorm(MODEL.hidden_size)
    assert model.sharded_parameters()["gate"].cut == Replica()
    assert not model.init(0).model.layers["0"].input_layernorm.weight.any()
    assert CheckpointConfig().also_hf is False


@pytest.mark.parametrize("kind", [Named, Llama])
def test_recomputing_calls_the_forward_of_the_class(kind: type[Llama]) -> None:
    ids = torch.arange(8).reshape(1, 8)
    gradients = []
    for mode in ("none", "selective", "full"):
        model = kind(tiny(num_key_value_heads=4), recompute=mode).init(0)
        model.loss(ids, ids)[0].backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        gradients.append(found)
    for found in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert torch.allclose(found[name], gradient, atol=1e-7), name
