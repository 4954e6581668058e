"""What the examples change in llamax, judged by transformers; and their scripts on two ranks."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.example_scripts import EXAMPLES, script
from support.models import tiny
from support.tiny_run import config, fork_ranks, make_dataset
from support.world import Worlds, axes
from torch import Tensor

import llamax
from llamax.checkpoint.load import load_weights
from llamax.checkpoint.reader import Checkpoint
from llamax.config.schema import Config
from llamax.model.llama import Llama
from llamax.parallel.collectives import Axes
from llamax.parallel.mesh import Mesh
from llamax.parallel.sharding import join
from llamax.runtime.files import sha256

MODEL = tiny(initializer_range=0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


def batch() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(4)
    ids = torch.randint(MODEL.vocab_size, (3, 16), generator=random)
    labels = torch.randint(MODEL.vocab_size, (3, 16), generator=random)
    return ids, labels.masked_fill(torch.rand(3, 16, generator=random) < 0.3, -100)


def hub_tensors(model: Llama) -> dict[str, Tensor]:
    """The Hub tensors of a whole model, fused ones apart."""
    parameters = model.sharded_parameters()
    return {
        part.name: tensor
        if part.length < 0
        else tensor.narrow(part.how.dim, part.start, part.length)
        for name, (tensor, _) in parameters.items()
        for part in parameters.parts(name)
    }


def judged(kind: type, shape: transformers.PretrainedConfig, model: Llama) -> Any:
    """A model of transformers with the weights of ``model``; biases are zero."""
    shape._attn_implementation = "eager"
    judge = kind(shape)
    found = judge.load_state_dict(
        {name: tensor.detach() for name, tensor in hub_tensors(model).items()}, strict=False
    )
    assert not found.unexpected_keys
    for name in found.missing_keys:
        assert name.endswith("bias")
        judge.get_parameter(name).data.zero_()
    return judge


def near(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal but for the rounding of float32."""
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


# --- the loss ------------------------------------------------------------------------------------


def z_loss(at: Axes, sequence: bool) -> tuple[float, float, dict[str, Tensor], dict[str, Any]]:
    kind = script("change-the-loss", "z_loss").ZLossLlama
    model = kind(MODEL, at.tp, sequence_parallel=sequence).init(0)
    total, count = model.loss(*batch())
    total.backward()
    parameters = model.sharded_parameters()
    grads = {name: tensor.grad for name, tensor in parameters.tensors.items()}
    for name, how in parameters.cuts.items():
        if sequence and type(how).__name__ == "Replica":
            grads[name] = at.tp.all_reduce(grads[name])
    return float(total), float(count), grads, parameters.cuts


def on_two(sequence: bool) -> Any:
    return z_loss(axes(Mesh(tp=2)), sequence)


def test_the_z_loss_is_that_of_torch_on_one_and_two_tensor_ranks(worlds: Worlds) -> None:
    module = script("change-the-loss", "z_loss")
    model = module.ZLossLlama(MODEL).init(0)
    judge = judged(
        transformers.LlamaForCausalLM, transformers.LlamaConfig(**MODEL.to_hub("float32")), model
    )
    ids, labels = batch()
    logits = judge(ids).logits
    counted = labels >= 0
    nats = torch.nn.functional.cross_entropy(logits[counted], labels[counted], reduction="sum")
    expected = nats + module.WEIGHT * (logits[counted].exp().sum(-1).log() ** 2).sum()
    expected.backward()
    model.loss(ids, labels)[0].backward()

    def check(total: float, count: float, grads: dict[str, Tensor]) -> None:
        assert total == pytest.approx(expected.item(), rel=1e-5)
        assert count == int(counted.sum())
        for name, parameter in model.named_parameters():
            found = grads[name]
            assert near(found, parameter.grad), name

    total, count, grads, _ = z_loss(Axes.solo(), False)
    check(total, count, grads)
    ours = hub_tensors(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    for name, gradient in hub_tensors(model).items():
        theirs = judge.get_parameter(name).grad
        assert near(gradient, theirs), name
    assert len(ours) == len(dict(judge.named_parameters()))
    for sequence in (False, True):
        results = worlds(2).run(on_two, sequence)
        cuts = results[0][3]
        whole = {name: join([r[2][name] for r in results], how) for name, how in cuts.items()}
        check(results[0][0], results[0][1], whole)


def test_the_z_loss_lowers_the_partitions(data: Path, tmp_path: Path) -> None:
    """After the same steps log Z, by transformers, is nearer to 0 than with cross-entropy alone."""
    module = script("change-the-loss", "z_loss")
    module.WEIGHT = 0.3
    size = {}
    for name, kind in (("plain", Llama), ("z", module.ZLossLlama)):
        cfg = config(data, tmp_path / name)
        cfg = replace(cfg, model=MODEL, run=replace(cfg.run, steps=20), checkpoint=replace(
            cfg.checkpoint, every=0))  # fmt: skip
        run = llamax.train(cfg, {"optim.lr": 1e-2}, model_class=kind)
        model = Llama(MODEL)
        assert run.checkpoint is not None
        load_weights(Checkpoint(run.checkpoint), model.sharded_parameters())
        shape = transformers.LlamaConfig(**MODEL.to_hub("float32"))
        judge = judged(transformers.LlamaForCausalLM, shape, model)
        with torch.no_grad():
            size[name] = float(judge(batch()[0]).logits.logsumexp(-1).square().mean())
    assert size["z"] < 0.8 * size["plain"], size


# --- the schedule --------------------------------------------------------------------------------


def test_the_schedule_is_that_of_transformers(data: Path, tmp_path: Path) -> None:
    module = script("change-the-schedule", "inverse_root")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-2)
    judge = transformers.get_inverse_sqrt_schedule(optimizer, num_warmup_steps=4, timescale=4)
    expected = []
    for _ in range(9):
        judge.step()  # transformers counts steps from 0
        expected.append(judge.get_last_lr()[0])
    cfg = config(data, tmp_path / "run")
    optim = replace(cfg.optim, lr=1e-2, warmup_steps=4, min_lr=0.0)
    run = module.train(replace(cfg, optim=optim, run=replace(cfg.run, steps=6)))
    assert [record["lr"] for record in run.metrics] == pytest.approx(expected[:6], rel=1e-6)
    again = module.train(replace(cfg, optim=optim, run=replace(cfg.run, steps=9)))
    assert [record["lr"] for record in again.metrics] == pytest.approx(expected, rel=1e-6)


def test_a_function_with_the_rates_of_a_setting_makes_the_same_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(name: str, **optional: Any) -> tuple[list[Any], str]:
        cfg = config(data, tmp_path / name)
        constant = replace(cfg.optim, schedule="constant", warmup_steps=0)
        run = llamax.train(replace(cfg, optim=constant), **optional)
        assert run.checkpoint is not None
        weights = next(run.checkpoint.glob("weights-*.safetensors"))
        return [record["loss"] for record in run.metrics], sha256(weights)

    rate = config(data, tmp_path).optim.lr
    assert trained("own", learning_rate=lambda step: rate) == trained("setting")
    assert trained("lower", learning_rate=lambda step: rate / 2) != trained("setting")
    capsys.readouterr()
    cfg = config(data, tmp_path / "own")
    llamax.train(cfg, {"run.steps": 8, "optim.warmup_steps": 0}, learning_rate=lambda step: rate)
    line = next(x for x in capsys.readouterr().err.splitlines() if "changed since then" in x)
    assert "run.steps 6 -> 8" in line
    assert "learning rate of step" not in line, "llamax does not know the rate before"


# --- the attention -------------------------------------------------------------------------------


def test_the_window_is_that_of_transformers() -> None:
    """Qwen2 mixes layers with a window and without, and is a Llama but for biases, here zero."""
    module = script("change-the-attention", "sliding_window")
    module.WINDOW = 5
    model = module.SlidingWindowLlama(MODEL).init(0)
    hub = MODEL.to_hub("float32")
    named = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    named += ("num_key_value_heads", "vocab_size", "rms_norm_eps", "rope_parameters")
    shape = transformers.Qwen2Config(
        **{name: hub[name] for name in named},
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"],
        tie_word_embeddings=False,
    )
    judge = judged(transformers.Qwen2ForCausalLM, shape, model)
    ids, labels = batch()
    logits = judge(ids).logits
    counted = labels >= 0
    expected = torch.nn.functional.cross_entropy(logits[counted], labels[counted], reduction="sum")
    total, _ = model.loss(ids, labels)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    full = Llama(MODEL).init(0).loss(ids, labels)[0].item()
    assert abs(full - total.item()) > 1e-2, "the window must matter"


# --- on ranks ------------------------------------------------------------------------------------

SCRIPTS = {
    "change-the-attention": ("sliding_window", "sliding-window"),
    "change-the-loss": ("z_loss", "z-loss"),
    "change-the-schedule": ("inverse_root", "inverse-root"),
    "custom-dataset": ("sums", "sums"),
}


def settings(cfg: Config, folder: Path, tensor: int, own_data: bool) -> list[str]:
    tokens = [] if own_data else [f"--data.path={cfg.data.path}", "--data.sequence_length=32"]
    return [
        *(
            "--model.hidden_size=32",
            "--model.intermediate_size=48",
            "--model.num_attention_heads=4",
        ),
        *("--model.num_key_value_heads=2", "--model.num_hidden_layers=2", "--run.steps=5"),
        *("--model.bos_token_id=none", "--model.eos_token_id=none", "--data.global_batch=4"),
        *("--data.micro_batch=4", "--run.log_every=1", "--optim.warmup_steps=2"),
        *(f"--run.folder={folder}", f"--parallel.tensor={tensor}", "--run.threads=1"),
        *tokens,
    ]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_on_two_tensor_ranks_trains_as_on_one(
    data: Path, tmp_path: Path, name: str
) -> None:
    file, toml = SCRIPTS[name]
    found = []
    for ranks in (1, 2):
        command = [EXAMPLES / name / f"{file}.py", "--config", EXAMPLES / name / f"{toml}.toml"]
        cfg = config(data, tmp_path)
        more = settings(cfg, tmp_path / f"{ranks}", ranks, name == "custom-dataset")
        job = fork_ranks(ranks, *command, *more, folder=tmp_path)
        lines = "\n".join(job.communicate(timeout=300))
        assert job.returncode == 0, lines
        found.append([float(x) for x in re.findall(r"step \d/5 +loss +([\d.]+)", lines)])
    alone, shared = found
    assert len(alone) == 5
    assert shared == pytest.approx(alone, rel=1e-4, abs=1.1e-4)
