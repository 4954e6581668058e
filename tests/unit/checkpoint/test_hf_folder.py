"""Hugging Face folders: missing files, links, and what they do not hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import support.checkpoints as worlds
import torch
from safetensors.torch import save_file
from support.saving import refused

from llamax.checkpoint import load_owned
from llamax.checkpoint.hf_folder import HfFolder

MODEL = worlds.llama()


def hub(folder: Path, **change: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", "tie_word_embeddings": False, **change}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": torch.zeros(2, 2), "lm_head.weight": torch.ones(2, 2)}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_hub_folders(tmp_path: Path) -> None:
    embedding = "model.embed_tokens.weight"
    assert sorted(HfFolder(hub(tmp_path / "a")).names()) == ["lm_head.weight", embedding]
    own = HfFolder(hub(tmp_path / "b", tie_word_embeddings=True))
    assert sorted(own.names()) == ["lm_head.weight", embedding]
    assert own.model["tie_word_embeddings"] is False
    refused("holds a 'mistral' model", lambda: HfFolder(hub(tmp_path / "c", model_type="mistral")))
    refused("there is no folder", lambda: HfFolder(tmp_path / "nowhere"))

    folder = hub(tmp_path / "d")
    for text, match in (("[]", "not a JSON object"), ("{", "is not JSON")):
        (folder / "config.json").write_text(text)
        refused(match, lambda folder=folder: HfFolder(folder))
    with open(folder / "config.json", "wb") as file:
        file.truncate(65 << 20)
    refused("is larger than 64 MiB", lambda: HfFolder(folder))
    (folder / "config.json").unlink()
    refused("has no config.json: it is not a Hugging Face", lambda: HfFolder(folder))


def test_hub_weights_from_outside_the_folder(tmp_path: Path) -> None:
    folder = hub(tmp_path / "a")
    os.rename(folder / "model.safetensors", tmp_path / "real")
    refused("has no weights; model.safetensors or", lambda: HfFolder(folder))
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused("has only pytorch_model.bin, a pickle", lambda: HfFolder(folder))
    (folder / "model.safetensors").symlink_to(tmp_path / "real")
    refused("is a link out of its folder", lambda: HfFolder(folder))
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    for name in ("../real", str(tmp_path / "real"), 3, "..", "", "a\0b", "\ud800", ["x"] * 9):
        index.write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": name}}))
        refused("which is not a file beside it", lambda: HfFolder(folder))
    index.write_text("{}")
    refused("has no weight_map", lambda: HfFolder(folder))
    save_file({"encoder.weight": torch.zeros(2)}, folder / "model.safetensors")
    refused("is not a LlamaForCausalLM", lambda: HfFolder(folder))
    save_file({"model.embed_tokens.weight": torch.zeros(2)}, folder / "model.safetensors")
    refused("has no lm_head.weight, and its config.json does not tie", lambda: HfFolder(folder))


def test_the_hubs_own_cache_is_made_of_links(tmp_path: Path) -> None:
    folder = tmp_path / "models--x--y" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    hub(folder)
    blobs = tmp_path / "models--x--y" / "blobs"
    blobs.mkdir()
    os.rename(folder / "model.safetensors", blobs / "abcd")
    (folder / "model.safetensors").symlink_to("../../blobs/abcd")
    assert HfFolder(folder).shape("lm_head.weight") == (2, 2)


def test_a_hub_folder_has_no_moments(tmp_path: Path) -> None:
    model = worlds.llama(layers=1)
    rank = worlds.world(model, 1, 1, True, worlds.wholes(model))[0]
    folder = hub(tmp_path / "a")
    tensors = {n: v for (n, k), v in worlds.wholes(model).items() if k == "weight"}
    save_file(tensors, folder / "model.safetensors")
    refused(
        "holds no exp_avg of model.* it has weights only",
        lambda: load_owned(HfFolder(folder), rank.owned, rank.sharded),
    )
