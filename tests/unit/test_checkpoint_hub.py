"""Checkpoint -> Hugging Face folder -> checkpoint: nothing is lost, transformers reads it."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.corpora import train_unlike_llama

from llamax.checkpoint import Checkpoint, Saver, hf_writer, load_weights
from llamax.checkpoint.consolidate import consolidate, size
from llamax.checkpoint.hf_folder import HubFolder, open_source
from llamax.checkpoint.safetensors_io import building
from llamax.checkpoint.shard_hf import shard
from llamax.cli import inspect as inspection
from llamax.cli.consolidate import main as consolidate_main
from llamax.cli.inspect import describe
from llamax.cli.shard import main as shard_main
from llamax.config.model import ModelConfig
from llamax.data.tokenizer.tokenizer import load_tokenizer, train_sentencepiece
from llamax.runtime.errors import CheckpointError, ConfigError, Terminated


def saved(
    folder: Path, model: ModelConfig, dtype: torch.dtype = torch.float32, tp: int = 4
) -> Path:
    ranks = worlds.world(model, tp, 2, True, worlds.wholes(model, dtype), dtype)
    return worlds.save(folder / "checkpoints", model, ranks, 3)


@pytest.mark.parametrize(
    ("tied", "dtype"), [*itertools.product((True, False), (torch.float32, torch.bfloat16))]
)
def test_transformers_reads_what_consolidate_writes(
    tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    model = worlds.llama(tied, kv=2)
    saved(tmp_path, model, dtype)
    out = consolidate(tmp_path, tmp_path / "hub")
    theirs = transformers.LlamaForCausalLM.from_pretrained(out)
    state = theirs.state_dict()
    values = worlds.wholes(model, dtype)
    named = {name for name, kind in values if kind == "weight"}
    assert named | ({"lm_head.weight"} if tied else set()) == set(state)
    for (name, kind), value in values.items():
        if kind == "weight":
            assert state[name].dtype == dtype
            assert torch.equal(state[name], value), name
    assert theirs.config.num_key_value_heads == 2
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (1, 2)
    assert ModelConfig.from_hub(json.loads((out / "config.json").read_text())) == model


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_shard_is_the_reverse_of_consolidate(tmp_path: Path, tensor: int) -> None:
    model = worlds.llama(kv=2)
    saved(tmp_path, model, torch.bfloat16, 2)
    hub = consolidate(tmp_path, tmp_path / "hub", max_shard_bytes=4000)
    again = Checkpoint(shard(hub, tmp_path / "again", tensor))
    again.verify()
    assert again.manifest.mesh["tensor"] == tensor
    assert len(again.manifest.files) == tensor
    twice = consolidate(tmp_path / "again", tmp_path / "twice")
    first = HubFolder(hub)
    assert sorted(first.names()) == sorted(HubFolder(twice).names())
    for name in first.names():
        assert torch.equal(first.read(name), HubFolder(twice).read(name))
        assert torch.equal(first.read(name), worlds.wholes(model, torch.bfloat16)[name, "weight"])
    for rank in range(4):
        mine = worlds.world(model, 4, 1, True, None, torch.bfloat16)[rank]
        load_weights(again, mine.parameters, mine.shards, 4, rank)
        wanted = worlds.world(model, 4, 1, True, worlds.wholes(model, torch.bfloat16),
                              torch.bfloat16)[rank]  # fmt: skip
        for name, value in mine.parameters.items():
            assert torch.equal(value, wanted.parameters[name])


@pytest.mark.parametrize(
    ("dtype", "tied", "limit"),
    [(torch.float32, False, "1GB"), (torch.bfloat16, True, "20KB"), (torch.float16, False, "20KB")],
)
def test_folders_that_transformers_saved(
    tmp_path: Path, dtype: torch.dtype, tied: bool, limit: str
) -> None:
    config = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=37, tie_word_embeddings=tied,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).to(dtype)
    theirs.save_pretrained(tmp_path / "hub", max_shard_size=limit)
    files = [*(tmp_path / "hub").glob("*.safetensors")]
    assert (len(files) == 1) == (limit == "1GB")
    source = Checkpoint(shard(tmp_path / "hub", tmp_path / "out", 2))
    assert ("lm_head.weight" in source.names()) == (not tied)
    for name in source.names():
        assert torch.equal(source.read(name), theirs.state_dict()[name])
    assert ModelConfig.from_hub(source.model).rms_norm_eps == 1e-6


def test_boxes_of_a_source(tmp_path: Path) -> None:
    model = worlds.llama()
    source = Checkpoint(saved(tmp_path, model))
    hub = HubFolder(consolidate(tmp_path, tmp_path / "hub"))
    for name in ("model.layers.0.mlp.down_proj.weight", "lm_head.weight"):
        value = worlds.wholes(model)[name, "weight"]
        for reader in (source, hub):
            assert torch.equal(reader.read(name, dim=0, start=3, stop=20), value[3:20])
            assert torch.equal(reader.read(name, dim=1, start=5, stop=9), value[:, 5:9])
            assert torch.equal(reader.read(name, dim=1, start=5), value[:, 5:])
    moment = worlds.wholes(model)["lm_head.weight", "exp_avg"]
    assert torch.equal(source.read("lm_head.weight", "exp_avg", 1, 2, 4), moment[:, 2:4])


def test_a_source_of_either_kind(tmp_path: Path) -> None:
    folder = saved(tmp_path, worlds.llama())
    hub = consolidate(tmp_path, tmp_path / "hub")
    assert isinstance(open_source(hub), HubFolder)
    assert [open_source(path).folder for path in (folder, tmp_path)] == [folder, folder]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty"):
        open_source(tmp_path / "empty")


def test_dtypes_and_file_sizes(tmp_path: Path) -> None:
    model = worlds.llama()
    saved(tmp_path, model, torch.bfloat16)
    values = worlds.wholes(model, torch.bfloat16)
    wide = HubFolder(consolidate(tmp_path, tmp_path / "wide", torch.float32, 5000))
    assert wide.model["dtype"] == "float32"
    for name in wide.names():
        assert torch.equal(wide.read(name), values[name, "master"])
    index = json.loads((tmp_path / "wide" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == wide.total_bytes()
    assert set(index["weight_map"]) == set(wide.names())
    for path in (tmp_path / "wide").glob("*.safetensors"):
        tensors = load_file(path)
        assert sum(t.nbytes for t in tensors.values()) <= 5000 or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {path.name}
    half = HubFolder(consolidate(tmp_path, tmp_path / "half", torch.float16))
    assert torch.equal(
        half.read("model.norm.weight"), values["model.norm.weight", "weight"].to(torch.float16)
    )


def test_sizes() -> None:
    assert [size(text) for text in ("5GB", "500 mb", "3kb", "17")] == [
        5 * 10**9,
        5 * 10**8,
        3000,
        17,
    ]
    for text in ("", "5TB", "-1", "0", "\u00b2", "\uff11GB"):
        with pytest.raises(ConfigError, match="write 5GB, 500MB or bytes"):
            size(text)


def test_processes_write_the_same_bytes(tmp_path: Path) -> None:
    saved(tmp_path, worlds.llama(), torch.bfloat16)
    done: list[int] = []
    for folder, processes in (("one", 1), ("three", 3)):
        options = {"max_shard_bytes": 5000, "progress": done.append, "processes": processes}
        consolidate(tmp_path, tmp_path / folder, torch.float32, **options)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) > 5
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    assert sum(done) == 2 * sum(p.nbytes for (_, k), p in worlds.wholes(worlds.llama()).items()
                                if k == "weight")  # fmt: skip


def test_a_process_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, worlds.llama())
    monkeypatch.setattr(hf_writer, "fill", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(CheckpointError, match="was killed; is there memory for --processes 2"):
        consolidate(tmp_path, tmp_path / "hub", processes=2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_adapters_are_no_model(tmp_path: Path) -> None:
    folder = saved(tmp_path, worlds.llama())
    source = Checkpoint(folder)
    del source.manifest.tensors["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match="holds adapters, not a whole model"):
        hf_writer.plan(source)
    with pytest.raises(ConfigError, match="--processes=0 is below 1"):
        consolidate_main([str(folder), "--out", str(tmp_path / "out"), "--processes", "0"])


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    folder = saved(tmp_path, worlds.llama())
    path = folder / "weights-tp01-dp00.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"weights-tp01-dp00.safetensors changed"):
        consolidate(tmp_path, tmp_path / "hub")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]
    consolidate(tmp_path, tmp_path / "unverified", verify=False)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="hub exists already; remove it or choose"):
        consolidate(tmp_path, tmp_path / "hub")
    assert (tmp_path / "hub" / "precious").read_text() == "x"


@pytest.mark.parametrize("processes", [1, 2])
def test_nobody_writes_on_when_writing_has_failed(tmp_path: Path, processes: int) -> None:
    saved(tmp_path, worlds.llama())
    threads = threading.active_count()

    def fail(size_bytes: int) -> None:
        raise ValueError("the bar broke")

    with pytest.raises(ValueError, match="the bar broke") as caught:
        consolidate(tmp_path, tmp_path / "hub", progress=fail, processes=processes)
    assert (threading.active_count(), multiprocessing.active_children()) == (threads, [])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert caught.tb  # which keeps all its frames alive


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    out, real, link = (tmp_path / name for name in ("hub", "real", "link"))
    (tmp_path / "hub.part" / "of" / "one").mkdir(parents=True)
    (tmp_path / "hub.part" / "that was killed").write_text("x")
    with building(out) as part:
        (part / "mine").write_text("x")
        other = r"hub.part is in use by pid \d+ on .*; wait for it"
        with pytest.raises(CheckpointError, match=other), building(out):
            pass
    assert [path.name for path in out.iterdir()] == ["mine"]
    link.symlink_to(real)
    with pytest.raises(CheckpointError, match="link exists already"), building(link):
        pass
    real.mkdir()
    with building(link) as part:
        (part / "mine").write_text("x")
    assert link.is_symlink()
    assert (real / "mine").exists()
    late = tmp_path / "late"
    with pytest.raises(CheckpointError, match=r"cannot write .*late"), building(late):
        late.write_text("made meanwhile")
    assert not list(tmp_path.glob("*.part"))


def test_sigterm_leaves_nothing(tmp_path: Path) -> None:
    told = r"stopped by SIGTERM: .*hub was not written"
    with pytest.raises(Terminated, match=told) as caught, building(tmp_path / "hub"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 143
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_degree_that_does_not_cut_the_model(tmp_path: Path) -> None:
    saved(tmp_path, worlds.llama())
    hub = consolidate(tmp_path, tmp_path / "hub")
    with pytest.raises(ConfigError, match=r"^--tensor=3 does not cut .* parts; use 1( or \d)+$"):
        shard(hub, tmp_path / "out", 3)
    with pytest.raises(ConfigError, match="--tensor=0 is below 1"):
        shard_main([str(hub), "--out", str(tmp_path / "out"), "--tensor", "0"])
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"has no model.layers.2"):
        shard(hub, tmp_path / "out", 2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [f"def name_{i}(x): return x + {i}\n" for i in range(200)]
    return train_sentencepiece(texts, 300, tmp_path_factory.mktemp("t") / "tokenizer.model")


def test_the_tokenizer_goes_with_the_model(tmp_path: Path, tokenizer: Path) -> None:
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    (dataset / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    model = worlds.llama(vocabulary=300)
    rank = worlds.world(model, 1, 1, True, worlds.wholes(model))[0]
    config = (
        "[model]\nhidden_size = 24\nintermediate_size = 40\nnum_hidden_layers = 2\n"
        "num_attention_heads = 4\nnum_key_value_heads = 2\nvocab_size = 300\n"
        f'[data]\npath = "{dataset}"\n'
    )

    def take(step: int, fingerprint: str) -> Path:
        saver = Saver(tmp_path / "run", rank.axes, rank.parameters, rank.shards, keep=0)
        state: dict[str, Any] = {"tokenizer": fingerprint}
        saver.save(step, rank.owned, state, model.to_hub("float32"), config)
        saver.wait()
        return tmp_path / "run" / f"step-{step:08d}"

    right = take(1, load_tokenizer(tokenizer).fingerprint)
    out = consolidate(right, tmp_path / "hub")
    text = "def name_3(x): return x"
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    ours = load_tokenizer(tokenizer).encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ours
    again = consolidate(right, tmp_path / "hub2", tokenizer=out)
    assert (again / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()

    wrong = take(2, "0" * 64)
    written: list[int] = []
    with pytest.raises(CheckpointError, match="holds another tokenizer"):
        consolidate(wrong, tmp_path / "hub3", progress=written.append)
    assert not written, "it is refused before hours of writing"
    consolidate(wrong, tmp_path / "hub3", tokenizer=tokenizer)
    assert (tmp_path / "hub3" / "tokenizer.json").is_file()
    saved(tmp_path / "small", worlds.llama())
    with pytest.raises(CheckpointError, match="has 300 tokens, the model's vocabulary is 37"):
        consolidate(tmp_path / "small", tmp_path / "hub4", tokenizer=tokenizer)


def test_programs_say_what_they_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, worlds.llama())
    out = tmp_path / "hub"
    assert consolidate_main([str(tmp_path), "--out", str(out), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: 11.1K parameters of step 3, 21.7 KiB, in " in printed
    assert "no tokenizer was found for it; --tokenizer adds one" in printed
    unlike = train_unlike_llama(tmp_path, model_type="unigram")
    given = ["--out", str(tmp_path / "spoken"), "--tokenizer", str(unlike)]
    saved(tmp_path / "speaker", worlds.llama(vocabulary=600), tp=1)
    assert consolidate_main([str(tmp_path / "speaker"), *given]) == 0
    assert "its tokenizer.model has no exact tokenizer.json" in capsys.readouterr().out
    assert shard_main([str(out), "--out", str(tmp_path / "s"), "--tensor", "2"]) == 0
    assert "21.7 KiB of weights for tensor 2, in " in capsys.readouterr().out


def rows(path: Path, verify: bool = False) -> dict[str, str]:
    return {label: str(value) for label, value in describe(path, verify)}


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path, worlds.llama(), torch.bfloat16, 2)
    hub = consolidate(tmp_path, tmp_path / "hub")
    found = rows(folder, verify=True)
    assert found["step"] == "3"
    assert found["saved on"].startswith("tensor 2 x data 2, llamax ")
    assert found["model"] == (
        "Llama of 11.1K parameters: 2 layers, hidden 24, feed-forward 40, heads 4/2, vocabulary 37"
    )
    assert "master F32 x 21" in found["kept"]
    assert found["consumed sequences"] == "24"
    assert found["files"].startswith("8, ")
    assert found["verified"] == "sha256 of all 8 files"
    assert "verified" not in rows(folder)
    assert rows(tmp_path)["checkpoints"] == "step-00000003"
    assert rows(hub)["kept"] == "weight bfloat16 x 21"
    assert rows(hub / "model.safetensors")["tensors"] == "21"
    for one in (hub, hub / "model.safetensors"):
        assert rows(one, verify=True)["verified"].startswith("nothing: ")
        assert "verified" not in rows(one)
    assert inspection.main([str(hub)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.index("  ") for line in lines if "Hugging Face" in line}) == 1
    assert lines[0].startswith("Hugging Face  ")
    with pytest.raises(CheckpointError, match=r"there is no .*nothing; check the path"):
        describe(tmp_path / "nothing")
    (tmp_path / "else").mkdir()
    with pytest.raises(CheckpointError, match=r"is no checkpoint, run, .* read by llamax import"):
        describe(tmp_path / "else")
    with pytest.raises(CheckpointError, match=r"it is no Hugging Face folder; .* llamax consolid"):
        shard(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"no complete .*hub \(a Hugging Face folder\)"):
        consolidate(hub, tmp_path / "out")
    os.truncate(next(folder.glob("weights*")), 10)
    with pytest.raises(CheckpointError, match="has 10 bytes"):
        rows(folder)


MEASURE = """
import sys
import threading
from pathlib import Path
import torch
from llamax.checkpoint.consolidate import consolidate
from llamax.checkpoint.shard_hf import shard

def bytes_of(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024

torch.set_num_threads(1)
folder = Path(sys.argv[1])
shard(folder / "small", folder / "warm", 8)
consolidate(folder / "warm", folder / "warm_hub")
for act in (lambda: shard(folder / "hub", folder / "cut", 8),
            lambda: consolidate(folder / "cut", folder / "joined")):
    Path("/proc/self/clear_refs").write_text("5")
    before = bytes_of("VmRSS")
    act()
    print(bytes_of("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """170 MB through tensor 8 and back, in 64 MiB at most."""
    for name, hidden in (("small", 64), ("hub", 1536)):
        config = transformers.LlamaConfig(
            hidden_size=hidden, intermediate_size=5 * hidden, num_hidden_layers=2,
            num_attention_heads=16, num_key_value_heads=8, vocab_size=1000,
        )  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config.to_json_string(use_diff=False))
        with torch.device("meta"):
            state = transformers.LlamaForCausalLM(config).state_dict()
        tensors = {  # bit patterns below infinity, that differ from place to place
            n: (torch.arange(t.numel(), dtype=torch.int32) % 30011).short().view(torch.bfloat16)
            for n, t in state.items()
        }
        tensors = {n: t.view(state[n].shape) for n, t in tensors.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert (tmp_path / "hub" / "model.safetensors").stat().st_size > 160e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], check=True, capture_output=True, text=True
    )
    grown = [int(line) for line in done.stdout.split()]
    assert max(grown) <= 64 << 20, grown
    first, last = HubFolder(tmp_path / "hub"), HubFolder(tmp_path / "joined")
    for name in first.names():
        assert torch.equal(first.read(name), last.read(name))
