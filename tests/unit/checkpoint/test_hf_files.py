"""Weights of Hugging Face folders: numbered files, shards of ranks, and bitsandbytes' 4 bits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import support.checkpoints as worlds
import torch
from safetensors.torch import load_file, save_file
from support.saving import refused
from torch import Tensor

from llamax.checkpoint.hf_folder import HfFolder
from llamax.checkpoint.safetensors_io import read_metadata
from llamax.cli.inspect import main as inspect_main

MODEL = worlds.llama()
WRITER = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
source, out = sys.argv[1:]
torch.set_num_threads(1)
def write(rank):
    store = dist.FileStore(out + ".store", 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2))
    state = {}
    for number, (name, whole) in enumerate(sorted(load_file(source).items())):
        second = Replicate() if whole.dim() == 1 else Shard(number % 2)
        state[name] = distribute_tensor(whole, mesh, [Shard(0), second])
    index = {name: 1 + number % 2 for number, name in enumerate(state)}
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(out, index, save_distributed=True))
    dist.destroy_process_group()
children = []
for rank in range(4):
    if not (child := os.fork()):
        try:
            write(rank)
            os._exit(0)
        finally:
            os._exit(1)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def folder_of(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL.to_hub("float32") | changes))
    return folder


def weights() -> dict[str, Tensor]:
    return {n: v for (n, kind), v in worlds.wholes(MODEL).items() if kind == "weight"}


def check(folder: Path, wanted: dict[str, Tensor]) -> None:
    source = HfFolder(folder)
    assert set(source.names()) == set(wanted)
    for name, whole in wanted.items():
        assert torch.equal(source.read(name), whole), name
        if whole.dim() == 2:
            for dim in (0, 1):
                part = source.read(name, dim=dim, start=3, stop=11)
                assert torch.equal(part, whole.narrow(dim, 3, 8)), name


def numbered(folder: Path, stem: str = "model") -> dict[str, Tensor]:
    wanted = weights()
    for number in range(3):
        names = sorted(wanted)[number::3]
        part = {name: wanted[name] for name in names}
        save_file(part, folder / f"{stem}-{number + 1:05d}-of-00003.safetensors")
    return wanted


@pytest.mark.parametrize("stem", ["model", "pytorch_model"])
def test_numbered_files_without_an_index(tmp_path: Path, stem: str) -> None:
    folder = folder_of(tmp_path / "a")
    check(folder, numbered(folder, stem))
    last = folder / f"{stem}-00003-of-00003.safetensors"
    last.rename(folder / "other-00001-of-00001.safetensors")
    refused("several sets of weights: .*; keep one", lambda: HfFolder(folder))
    (folder / "other-00001-of-00001.safetensors").unlink()
    refused(r"has 2 of 00003 files of weights; .*-00003-of-00003", lambda: HfFolder(folder))


@pytest.mark.parametrize("indexed", [False, True])
def test_a_tensor_in_two_files_is_refused(tmp_path: Path, indexed: bool) -> None:
    """Files of two checkpoints, of which nobody knows which is meant."""
    folder = folder_of(tmp_path / "a")
    wanted = numbered(folder, "model")
    if indexed:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        index = {name: file for file in files for name in load_file(folder / file)}
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    check(folder, wanted)
    first, last = (folder / f"model-0000{number}-of-00003.safetensors" for number in (1, 3))
    name, tensor = next(iter(load_file(last).items()))
    save_file({**load_file(first), name: tensor + 1}, first)
    refused(
        rf"{first.name} and {last.name} both have {name}; keep the files of one checkpoint",
        lambda: HfFolder(folder),
    )


def test_shards_of_ranks_as_torch_writes_them(tmp_path: Path) -> None:
    """HuggingFaceStorageWriter on four ranks, tensors cut by rows and by columns."""
    wanted = weights()
    save_file(wanted, tmp_path / "whole.safetensors")
    folder = folder_of(tmp_path / "a")
    whole = str(tmp_path / "whole.safetensors")
    subprocess.run([sys.executable, "-c", WRITER, whole, str(folder)], check=True)
    assert len([*folder.glob("shard-*.safetensors")]) == 4 * 2
    check(folder, wanted)
    path = next(iter(folder.glob("shard-00002-model-00001-*")))
    path.rename(tmp_path / "aside")
    refused("in its files make no whole tensor; copy all files", lambda: HfFolder(folder))
    save_file(load_file(tmp_path / "aside"), path)
    refused("does not state which: it has no DCP_SHARDING_INFO", lambda: HfFolder(folder))
    save_file(load_file(tmp_path / "aside"), path, {"DCP_SHARDING_INFO": "{"})
    refused("does not state which: it has no DCP_SHARDING_INFO", lambda: HfFolder(folder))
    stated = read_metadata(tmp_path / "aside")["DCP_SHARDING_INFO"]
    for far in (2**40, 2**63, 2**70):
        changed = re.sub(r'("saved_offsets": \[)\d+', rf"\g<1>{far}", stated)
        save_file(load_file(tmp_path / "aside"), path, {"DCP_SHARDING_INFO": changed})
        refused("in its files make no whole tensor; copy all files", lambda: HfFolder(folder))


QUANTIZED = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def four_bits(folder: Path, wanted: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Write the projections as bitsandbytes does, and return its dense values."""
    functional = pytest.importorskip("bitsandbytes.functional")
    stored: dict[str, Tensor] = {}
    dense = {}
    for name, whole in wanted.items():
        if "proj" not in name:
            stored[name] = dense[name] = whole
            continue
        packed, state = functional.quantize_4bit(whole, **options)
        stored[name] = packed
        for key, value in state.as_dict(packed=True).items():
            stored[f"{name}.{key}"] = value
        dense[name] = functional.dequantize_4bit(packed, state)
    save_file(stored, folder / "model.safetensors")
    return dense


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {"quant_type": "nf4", "compress_statistics": True},
        {"quant_type": "nf4", "compress_statistics": False, "blocksize": 128},
        {"quant_type": "nf4", "compress_statistics": True, "quant_storage": torch.bfloat16},
        {"quant_type": "fp4", "compress_statistics": True},
    ],
    ids=str,
)
def test_four_bits_have_the_values_of_bitsandbytes(
    tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    folder = folder_of(tmp_path / "a", quantization_config=QUANTIZED)
    wanted = {name: whole.to(dtype) for name, whole in weights().items()}
    check(folder, four_bits(folder, wanted, **options))
    assert "quantization_config" not in HfFolder(folder).model
    assert inspect_main([str(folder)]) == 0


def test_large_weights_in_four_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of scales, read in several parts."""
    monkeypatch.setattr("llamax.checkpoint.hf_quantized.AT_ONCE", 1000)
    folder = folder_of(tmp_path / "a", quantization_config=QUANTIZED)
    wanted = {n: v for n, v in weights().items() if "proj" not in n}
    wanted["model.layers.0.mlp.up_proj.weight"] = torch.randn(301, 173)
    check(folder, four_bits(folder, wanted, compress_statistics=True, quant_type="nf4"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"bitsandbytes in 8 bits"),
        ({"load_in_8bit": True}, "bitsandbytes in 8 bits"),
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq"),
        ({"quant_method": "fp8"}, "quantised by fp8"),
        ({"bits": 4}, "quantised by unknown"),
        ("awq", "quantised by unknown"),
    ],
)
def test_other_quantisations_are_named(tmp_path: Path, settings: object, told: str) -> None:
    folder = folder_of(tmp_path / "a", quantization_config=settings)
    save_file({"x.qweight": torch.ones(2, dtype=torch.int8)}, folder / "model.safetensors")
    refused(f"{told}.*, which llamax does not read; use the unq", lambda: HfFolder(folder))


@pytest.mark.parametrize("fault", ["absmax", "quant_map", "nested_absmax", "shape", "text"])
def test_four_bits_that_do_not_fit(tmp_path: Path, fault: str) -> None:
    folder = folder_of(tmp_path / "a", quantization_config=QUANTIZED)
    four_bits(folder, weights(), compress_statistics=True, quant_type="nf4")
    stored = load_file(folder / "model.safetensors")
    weight = "model.layers.0.mlp.up_proj.weight"
    name = f"{weight}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(stored[name].tolist()))
    if fault == "shape":
        state["shape"] = [1 << 20, 1 << 20]
    elif fault != "text":
        del stored[f"{weight}.{fault}"]
    text = b"\xff{" if fault == "text" else json.dumps(state).encode()
    stored[name] = torch.tensor([*text], dtype=torch.uint8)
    save_file(stored, folder / "model.safetensors")
    refused("up_proj.weight is in 4 bits of bitsandbytes, but .* not", lambda: HfFolder(folder))
