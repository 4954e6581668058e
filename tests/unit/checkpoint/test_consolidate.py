"""Consolidation: a Hugging Face folder that transformers reads, by one process or several."""

from __future__ import annotations

import dataclasses
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
from support.saving import saved

from llamax.checkpoint import Checkpoint, Saver, hf_writer, load_weights
from llamax.checkpoint.consolidate import consolidate, size
from llamax.checkpoint.hf_folder import HfFolder
from llamax.cli.consolidate import main as consolidate_main
from llamax.config.model import ModelConfig
from llamax.config.schema import CheckpointConfig
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.data.tokenizer.train import train_sentencepiece
from llamax.model.llama import Llama
from llamax.runtime.errors import CheckpointError, ConfigError, Terminated


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


def test_a_width_of_heads_that_transformers_refuses_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Although config.json gives the width of a head, and nothing else follows from the hidden."""
    model = dataclasses.replace(worlds.llama(), hidden_size=26, head_dim=8)
    saved(tmp_path, model, torch.float32)
    out = consolidate(tmp_path, tmp_path / "hub")
    assert "whose num_attention_heads=4 does not divide hidden_size=26" in caplog.text
    with pytest.raises(Exception, match=r"hidden size \(26\) is not a multiple"):
        transformers.LlamaForCausalLM.from_pretrained(out)
    load_weights(HfFolder(out), Llama(model).sharded_parameters())


def test_dtypes_and_file_sizes(tmp_path: Path) -> None:
    model = worlds.llama()
    saved(tmp_path, model, torch.bfloat16)
    values = worlds.wholes(model, torch.bfloat16)
    wide = HfFolder(
        consolidate(tmp_path, tmp_path / "wide", dtype=torch.float32, max_shard_size=5000)
    )
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
    half = HfFolder(consolidate(tmp_path, tmp_path / "half", dtype=torch.float16))
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
        options = {"max_shard_size": 5000, "progress": done.append, "processes": processes}
        consolidate(tmp_path, tmp_path / folder, dtype=torch.float32, **options)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) > 5
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    assert sum(done) == 2 * sum(p.nbytes for (_, k), p in worlds.wholes(worlds.llama()).items()
                                if k == "weight")  # fmt: skip


def test_a_process_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, worlds.llama())
    monkeypatch.setattr(
        hf_writer, "write_tensor", lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    )
    with pytest.raises(CheckpointError, match="was killed; is there memory for `processes=2`"):
        consolidate(tmp_path, tmp_path / "hub", processes=2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_adapters_are_no_model(tmp_path: Path) -> None:
    folder = saved(tmp_path, worlds.llama())
    source = Checkpoint(folder)
    del source.manifest.tensors["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match="holds adapters, not a whole model"):
        hf_writer.plan_files(source)
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
    threads = {*threading.enumerate()}

    def fail(size_bytes: int) -> None:
        raise ValueError("the bar broke")

    with pytest.raises(ValueError, match="the bar broke") as caught:
        consolidate(tmp_path, tmp_path / "hub", progress=fail, processes=processes)
    assert {*threading.enumerate()} <= threads
    assert multiprocessing.active_children() == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert caught.tb  # which keeps all its frames alive


@pytest.mark.timeout(300)
def test_a_signal_while_processes_start_leaves_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool that is interrupted while it starts would forget its first workers."""
    saved(tmp_path, worlds.llama())
    fork, forked = os.fork, []

    def interrupted() -> int:
        child = fork()
        if child and not forked:
            os.kill(os.getpid(), signal.SIGTERM)
        forked.append(child)
        return child

    monkeypatch.setattr(os, "fork", interrupted)
    with pytest.raises(Terminated):
        consolidate(tmp_path, tmp_path / "hub", processes=2)
    assert len(forked) == 2
    assert multiprocessing.active_children() == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


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
        saver = Saver(tmp_path / "run", rank.axes, rank.sharded, CheckpointConfig(keep=0))
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
    first, last = HfFolder(tmp_path / "hub"), HfFolder(tmp_path / "joined")
    for name in first.names():
        assert torch.equal(first.read(name), last.read(name))
