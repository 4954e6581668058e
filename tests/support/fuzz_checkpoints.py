"""Checkpoints and models of every kind to change, and what reads them."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import support.checkpoints as worlds
from llamax.checkpoint import Checkpoint, hf_folder
from llamax.checkpoint.atomic import failure_of, read_note
from llamax.checkpoint.formats import convert, torch_pickle
from llamax.checkpoint.peft import adapter_info, open_adapter
from llamax.checkpoint.places import STARTED_IN, dataset_of
from llamax.checkpoint.plain_llama import MODEL_CLASS, plain_shapes
from llamax.checkpoint.prompt_record import prompt_of
from llamax.checkpoint.safetensors_io import read_header, read_metadata
from llamax.config.model import ModelConfig
from llamax.config.rules.finetune import LINEAR
from llamax.data.chat.record import PROMPT, PromptRecord, with_system
from llamax.data.chat.templates import Template, make_sample
from llamax.inference.sampling import sampling_of
from llamax.runtime.hub_files import PROMPT_JSON
from llamax.runtime.text import printable
from llamax.tools.inspect.description import describe, table
from llamax.training.early_stopping import EarlyStopping
from support import foreign, foreign_megatron, foreign_nnm
from support.foreign_adapters import optimum_adapter
from support.fuzz_data import TEMPLATE
from support.fuzzing import change_value, shown

MODEL = worlds.llama(kv=2, vocabulary=40)
PROMPTED = PromptRecord("chat", TEMPLATE, "", {"question": "q"}, (2,), TEMPLATE)


def checkpoint(folder: Path) -> None:
    worlds.save(folder, MODEL, worlds.world(MODEL, 2, 1, True, worlds.wholes(MODEL)))


def checkpoint_of_stages(folder: Path) -> None:
    """A checkpoint of two stages, each with two tensor ranks, of adapters and of a class."""
    checkpoint(folder)
    (step,) = folder.glob("step-*")
    manifest = json.loads((step / "manifest.json").read_text())
    for file in manifest["files"]:
        name = file["name"].replace("-tp", "-pp01-tp" if "tp01" in file["name"] else "-pp00-tp")
        (step / file["name"]).rename(step / name)
        file["name"] = name
    manifest["mesh"] |= {"pipeline": 2, "context": 2}
    manifest["state"] |= {
        PROMPT: PROMPTED.to_json(),
        STARTED_IN: str(folder),
        MODEL_CLASS: "program.Mine",
        "tokenizer": "0" * 64,
        "finetune": {"method": "lora", "r": 2, "alpha": 4.0, "targets": "q_proj"},
        "base": {"folder": "base", "fingerprint": "0" * 64},
        "best_validation_loss": 1.5,
        "validations_waited": 1,
    }
    (step / "manifest.json").write_text(json.dumps(manifest))


def read_checkpoint(folder: Path) -> None:
    (step,) = folder.glob("step-*")
    path = step / "manifest.json"
    with suppress(ValueError, RecursionError):  # a changed index counts as the one that was saved
        manifest = json.loads(path.read_bytes())
        if isinstance(manifest, dict) and "index_sha256" in manifest:
            index = hashlib.sha256((step / "index.bin").read_bytes()).hexdigest()
            path.write_text(json.dumps(manifest | {"index_sha256": index}))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (step / "done").write_text(digest + "\n")
    checkpoint = Checkpoint(step, verify=False)
    shown(table([*describe(step)]))
    prompt_of(checkpoint)
    adapter_info(checkpoint)
    dataset_of(step, checkpoint.state)
    EarlyStopping(3, checkpoint.state)


def prompt(folder: Path) -> None:
    hf(folder)
    (folder / PROMPT_JSON).write_text(json.dumps(PROMPTED.to_json()))


def read_prompt(folder: Path) -> None:
    found = prompt_of(hf_folder.HfFolder(folder))
    if found is not None:
        template = Template(found.template, with_system(found.source, found.system))
        template.prompt(make_sample("What?"))


def note(folder: Path) -> None:
    note = [{"file": ["weights-tp00-dp00.safetensors", 1, "0" * 64, ""], "runs": []}]
    (folder / "rank-tp00-dp00.json").write_text(json.dumps(note))
    (folder / "failed-tp01-dp00.json").write_text(json.dumps({"why": "full", "no_room": True}))


def read_notes(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        shown(printable(str(failure_of(read_note(path), "rank 1 could not save"))))


def hf(folder: Path) -> None:
    weights = {n: t for (n, kind), t in worlds.wholes(MODEL).items() if kind == "weight"}
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[:5]}
    files["model-00002-of-00002.safetensors"] = names[5:]
    for file, some in files.items():
        save_file({name: weights[name] for name in some}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, some in files.items() for name in some}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(MODEL.to_hub("float32")))
    (folder / "generation_config.json").write_text(
        json.dumps({"temperature": 0.5, "top_k": 3, "eos_token_id": [2], "do_sample": True})
    )


def read_hf(folder: Path) -> None:
    source = hf_folder.HfFolder(folder)
    ModelConfig.from_hub(source.model)
    for name in source.names():
        source.read(name)
    shown(table([*describe(folder)]))
    sampling_of(hf_folder.read_json(folder / "generation_config.json"))


def quantized(folder: Path) -> None:
    """A folder of which one weight is in 4 bits."""
    hf(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [24, 24]}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path) | {
        name: torch.zeros(288, 1, dtype=torch.uint8),
        f"{name}.absmax": torch.ones(9),
        f"{name}.quant_map": torch.linspace(-1, 1, 16),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(
            [*json.dumps(state).encode()], dtype=torch.uint8
        ),
    }
    save_file(tensors, path, {"format": "pt"})
    index["weight_map"] |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))


def adapter(folder: Path) -> None:
    factors = {}
    for layer in range(2):
        home = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        factors |= {f"{home}A.weight": torch.ones(2, 8), f"{home}B.weight": torch.ones(8, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    more = {"lora_dropout": 0.1, "use_rslora": False, "base_model_name_or_path": "base"}
    kept = {"init_lora_weights": True, "rank_pattern": {}, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | more | kept))
    (folder / "base.json").write_text(json.dumps({"folder": "b", "fingerprint": "0" * 64}))


def adapter_shards(folder: Path) -> None:
    shapes = plain_shapes(MODEL)
    whole = {}
    for name, shape in shapes.items():
        if name.endswith("_proj.weight"):
            home = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            whole[f"{home}A.weight"] = torch.ones(2, shape[1])
            whole[f"{home}B.weight"] = torch.ones(shape[0], 2)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [*LINEAR]}
    optimum_adapter(folder, whole, settings, MODEL, tp=2, copies=2)


def read_adapter(folder: Path) -> None:
    source, _ = open_adapter(folder)
    for name in source.names():
        source.read(name)
    shown(table([*describe(folder)]))


def read_safetensors(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    read_header(path)
    read_metadata(path)


def pickled(folder: Path) -> None:
    state = {"step": 1, "names": ["a", ("b", 2)], "nested": {"x": [None, True, 1.5, b"c"]}}
    (folder / "data.pkl").write_bytes(pickle.dumps(state, 2))


def read_pickle(folder: Path) -> None:
    torch_pickle.read_pickle((folder / "data.pkl").read_bytes(), "data.pkl")


def foreign_checkpoint(kind: str) -> Callable[[Path], None]:
    values = worlds.wholes(MODEL)

    def make(folder: Path) -> None:
        (folder / "given.json").write_text(json.dumps(MODEL.to_hub("float32")))
        at = folder / "in"
        at.mkdir()
        if kind == "nxd":
            foreign.nxd(at, values, MODEL, tp=2)
        elif kind == "nxd-xser":
            foreign.nxd(at, values, MODEL, tp=1, xser=True)
        elif kind == "optimum":
            foreign.optimum(at, values, MODEL, tp=1, copies=1)
        elif kind == "nemo":
            foreign_megatron.nemo(at, values, MODEL, tp=1)
        elif kind == "nnm":
            foreign_nnm.nnm(at, values, MODEL, xser=True)
        else:
            foreign_megatron.meta(at, values, MODEL)

    return make


def read_foreign(folder: Path) -> None:
    source = convert.open_folder(folder / "in", "auto", str(folder / "given.json"))
    for name in [*source.shapes][:4]:
        source.read(name)


def change_state(data: bytes, chance: random.Random) -> bytes:
    """A manifest with a changed state or mesh, of which the tensors stay as they are."""
    manifest = json.loads(data)
    key = chance.choice(("state", "state", "mesh"))
    manifest[key] = change_value(manifest[key], chance)
    return json.dumps(manifest).encode(errors="surrogatepass")
