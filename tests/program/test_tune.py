"""LoRA and QLoRA as a user runs them: resumed to the bit, on other meshes, and their mistakes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import MODEL, base_folder
from support.tiny_run import STEPS, config, forget, fork_ranks, hashes, log_of, make_dataset, write

from llamax.checkpoint.build_model import load_base, load_tuned
from llamax.checkpoint.hf_folder import open_source
from llamax.checkpoint.load import load_weights
from llamax.cli.train import main
from llamax.config.schema import Config, FinetuneConfig
from llamax.inference.engine import LoadedModel
from llamax.inference.serving.adapters import build_served
from llamax.model import lora
from llamax.model.llama import Llama
from llamax.model.qlora import held
from llamax.parallel.collectives import Solo
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime.process import run_main
from llamax.train import train

LORA = FinetuneConfig(method="lora", r=4, dropout=0.1)
QLORA = FinetuneConfig(method="qlora", r=4, dropout=0.1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and a base."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "data").mkdir()
    make_dataset(folder / "data")
    base_folder(folder / "base")
    return folder


def tuning(inputs: Path, folder: Path, finetune: FinetuneConfig, **run: Any) -> Config:
    cfg = config(inputs / "data", folder, **run)
    return dataclasses.replace(
        cfg,
        model=MODEL,
        finetune=finetune,
        checkpoint=dataclasses.replace(cfg.checkpoint, init_from=str(inputs / "base")),
        optim=dataclasses.replace(cfg.optim, lr=1e-2),
        parallel=dataclasses.replace(cfg.parallel, tensor=1),
    )


@pytest.mark.parametrize("finetune", [LORA, QLORA], ids=["lora", "qlora"])
@pytest.mark.parametrize("run", [{}, {"dtype": "bfloat16", "recompute": "full"}], ids=["", "bf16"])
def test_a_resumed_run_is_the_same_to_the_bit(
    inputs: Path, tmp_path: Path, finetune: FinetuneConfig, run: dict[str, Any]
) -> None:
    """With dropout, whose masks no random state remembers."""
    cfg = tuning(inputs, tmp_path, finetune, **run)
    train(cfg, Rendezvous())
    whole, end = log_of(tmp_path), hashes(tmp_path, STEPS)
    assert whole[-1]["loss"] < whole[0]["loss"]
    forget(tmp_path, 3)
    train(cfg, Rendezvous())
    assert log_of(tmp_path) == whole
    assert hashes(tmp_path, STEPS) == end


def test_meshes_agree_and_hand_a_run_to_each_other(inputs: Path, tmp_path: Path) -> None:
    """tp 2 x dp 2 with sequence parallelism and a sharded base does as one rank does; then one rank
    goes on from its third step."""
    one, four = tmp_path / "one", tmp_path / "four"
    train(tuning(inputs, one, QLORA), Rendezvous())
    alone = log_of(one)
    toml = write(tuning(inputs, four, QLORA), tmp_path / "four.toml")
    said = fork_ranks(4, "--config", toml, "--parallel.tensor=2").communicate()[1]
    together = log_of(four)
    assert len(together) == STEPS, said
    for a, b in zip(alone, together, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert "qlora: 14.8K parameters (5.67%)" in said
    assert "of rank 4 on all-linear beside" in said
    assert "makes a PEFT folder of it" in said
    assert "; a rank holds 31.3 KiB of it in nf4" in said
    forget(four, 3)
    train(tuning(inputs, four, QLORA), Rendezvous())
    for a, b in zip(alone, log_of(four), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_the_loss_of_qlora_is_close_to_that_of_lora(inputs: Path, tmp_path: Path) -> None:
    found = {}
    for name, finetune in (
        ("lora", LORA),
        ("nf4", QLORA),
        ("int8", dataclasses.replace(QLORA, quant="int8")),
    ):
        train(tuning(inputs, tmp_path / name, finetune, dtype="bfloat16"), Rendezvous())
        found[name] = log_of(tmp_path / name)[-1]["loss"]
    assert found["nf4"] == pytest.approx(found["lora"], rel=0.03)
    assert found["int8"] == pytest.approx(found["lora"], rel=0.003)


@pytest.mark.parametrize("quant", ["", "nf4", "int8"])
def test_adapters_are_served_beside_the_base_of_their_training(
    inputs: Path, tmp_path: Path, quant: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each row is as the run computes it alone; a warning says that the base is quantised."""
    finetune = dataclasses.replace(QLORA, quant=quant) if quant else LORA  # type: ignore[arg-type]
    train(tuning(inputs, tmp_path / "run", finetune), Rendezvous())
    caplog.clear()
    whole = LoadedModel(open_source(inputs / "base"), MODEL, None)  # type: ignore[arg-type]
    tuned = dataclasses.replace(whole, adapter=tmp_path / "run")
    model, adapters = build_served(whole, {"poet": tuned}, torch.device("cpu"), "")
    said = f"{inputs}/base is served in {quant}, in which its adapters were trained, also by its"
    assert [said in line for line in caplog.messages] == ([True] if quant else [])
    ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        adapters.choose(["poet", ""])
        poet, base = model(ids)
        alone = load_tuned(tmp_path / "run")(ids)
    torch.testing.assert_close(poet, alone[0], rtol=1e-5, atol=1e-5)
    plain = Llama(MODEL)
    load_weights(open_source(inputs / "base"), plain.sharded_parameters())
    dense = plain(ids)[1].detach()
    assert bool((base - dense).abs().max() > 1e-3) == bool(quant)


def test_the_optimizer_and_the_checkpoint_hold_adapters_alone(inputs: Path, tmp_path: Path) -> None:
    cfg = tuning(inputs, tmp_path, LORA)
    train(cfg, Rendezvous())
    folder = tmp_path / f"checkpoints/step-{STEPS:08d}"
    manifest = json.loads((folder / "manifest.json").read_text())
    stored = sum(torch.Size(t["shape"]).numel() for t in manifest["tensors"].values())
    assert stored == lora.num_parameters(MODEL, LORA)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 3 * 4 * stored < size < 3 * 4 * stored + 40_000
    assert manifest["state"]["base"]["folder"] == str(inputs / "base")


def test_a_base_is_read_a_tensor_at_a_time(inputs: Path) -> None:
    """No dense weight of a projection exists before it is used."""
    model = Llama(MODEL, Solo("tp"), device="meta")
    load_base(model, open_source(inputs / "base"), QLORA, torch.empty(0), Solo("data"))
    quantised, plain = held(model)
    assert quantised < 0.14 * 4 * (MODEL.num_parameters() - plain // 4)
    names = [name for name, _ in model.named_parameters()]
    assert not any("_proj.weight" in name for name in names)
    assert not any(p.is_meta for p in model.parameters())


# --- what is refused -----------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], cfg: Config, *overrides: str) -> str:
    """The one line that a run ends with."""
    toml = write(cfg, Path(cfg.run.folder).with_suffix(".toml"))
    arguments = ["--config", str(toml), *overrides]
    assert run_main(main, arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "\n".join(lines)
    return lines[-1]


def test_mistakes_are_reported_in_one_line(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tuning(inputs, tmp_path / "run", QLORA)
    assert "'query' matches no module" in refused(capsys, cfg, "--finetune.targets=query")
    line = refused(capsys, cfg, "--model.hidden_size=64", "--model.rms_norm_eps=1e-6")
    assert "model.hidden_size=64 but " in line
    assert f"has 128 (also model.rms_norm_eps=1e-06 but {inputs / 'base'} has 1e-05)" in line
    assert line.endswith("; leave it out: checkpoint.init_from supplies the model")
    assert "checkpoint.init_from is empty" in refused(capsys, cfg, "--checkpoint.init_from=")
    shutil.copytree(inputs / "base", tmp_path / "quantised")
    path = tmp_path / "quantised/config.json"
    path.write_text(path.read_text()[:-1] + ', "quantization_config": {"load_in_4bit": true}}')
    line = refused(capsys, cfg, f"--checkpoint.init_from={tmp_path / 'quantised'}")
    assert "states weights in 4 bits, but the files hold none" in line
    optim = dataclasses.replace(cfg.optim, warmup_steps=0)
    run = dataclasses.replace(cfg.run, steps=1)
    train(dataclasses.replace(cfg, optim=optim, run=run), Rendezvous())
    capsys.readouterr()
    line = refused(capsys, cfg, f"--checkpoint.init_from={tmp_path / 'run'}")
    assert "holds adapters, not a model; merge them with llamax merge first" in line
