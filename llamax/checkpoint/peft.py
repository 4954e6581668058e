"""Adapters in files: checkpoints that hold nothing else, and the folders of PEFT.

::

    checkpoint   step-00000100/   our manifest; its state says ``finetune`` and ``base``
    PEFT folder  adapter_config.json, adapter_model.safetensors, and our base.json

An adapter means nothing without its base, so both name it: the folder it was loaded from, and a
fingerprint, the sha256 of every tensor's name, shape and a few of its elements.  Elements count as
bfloat16, so that a base saved again in another precision, or by other ranks, is the same base.  A
PEFT folder from elsewhere has no fingerprint; then names and shapes must do.

PEFT spells our name ``model.layers.0.self_attn.q_proj.lora_A.weight`` with ``base_model.model.`` in
front (https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llamax.checkpoint import slabs
from llamax.checkpoint.atomic import explain_write_errors, new_folder
from llamax.checkpoint.hf_folder import read_json
from llamax.checkpoint.listing import find_checkpoint
from llamax.checkpoint.reader import Checkpoint
from llamax.checkpoint.runs import Run, whole_run
from llamax.checkpoint.safetensors_io import TensorEntry, read_header, write_safetensors
from llamax.checkpoint.source import Piece, Source
from llamax.config.rules.finetune import LINEAR
from llamax.config.schema import FinetuneConfig
from llamax.runtime.errors import CheckpointError

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
PREFIX = "base_model.model."
SAMPLED = 64  # elements of a tensor that its fingerprint reads at the start, middle and end
# What PEFT can do to an adapter and llamax does not compute, with the value that means "not done".
PLAIN = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "target_parameters": None,
    "lora_bias": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
# First weights that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ, ... take a part out of it.
FIRST = ("true", "false", "none", "gaussian", "eva", "orthogonal")
# Fields of Finetune that make an adapter what it is.
SHAPE = ("method", "r", "alpha", "targets", "rslora", "quant", "double_quant")


class AdapterInfo(NamedTuple):
    """What an adapter says of itself; an empty ``fingerprint``: it does not say."""

    finetune: FinetuneConfig
    base: str
    fingerprint: str

    def state(self) -> dict[str, Any]:
        """Its part of a checkpoint's state."""
        base = {"folder": self.base, "fingerprint": self.fingerprint}
        return {"finetune": asdict(self.finetune), "base": base}

    def check(self, folder: Path, base: Source) -> None:
        """Refuse the adapter in ``folder`` for another base than its own."""
        if self.fingerprint and self.fingerprint != (found := fingerprint(base)):
            raise CheckpointError(
                f"{folder} is an adapter of another base: {base.folder} has the fingerprint "
                f"{found[:12]}, the adapter's base {self.fingerprint[:12]}; use {self.base}"
            )


def fingerprint(source: Source) -> str:
    """What tells a base from others, in hex."""
    digest = hashlib.sha256()
    for name in sorted(source.names()):
        shape = source.shape(name)
        size = math.prod(shape)
        digest.update(f"{name}{list(shape)}".encode())
        count, width = min(SAMPLED, size), math.prod(shape[1:])
        for start in (0, (size - count) // 2, size - count):
            found = torch.empty(count, dtype=source.dtype(name))
            source.fill(name, "weight", Run(0, width, start, count), found)
            digest.update(found.bfloat16().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def adapter_info(source: Source) -> AdapterInfo | None:
    """What an adapter checkpoint says of itself; None for any other source."""
    if isinstance(source, PeftFolder):
        return source.about
    if not isinstance(source, Checkpoint) or "finetune" not in source.state:
        return None
    known = {field.name for field in fields(FinetuneConfig)}
    settings = {k: v for k, v in source.state["finetune"].items() if k in known}
    base = source.state["base"]
    return AdapterInfo(FinetuneConfig(**settings), base["folder"], base["fingerprint"])


class PeftFolder(Source):
    """The LoRA adapters that PEFT saved (or ``export``), under our names.

    Raises CheckpointError for files that are missing or broken, and for what llamax does not
    compute.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder, self.model = Path(folder), {}
        config = read_json(self.folder / CONFIG)
        for line in _problems(config):
            raise CheckpointError(f"{self.folder / CONFIG}: {line}")
        self._path = self.folder / WEIGHTS
        self._entries: dict[str, TensorEntry] = {}
        for name, entry in read_header(self._path).items():
            self._entries[name.removeprefix(PREFIX)] = entry
        base: Mapping[str, Any] = {}
        if (self.folder / BASE).is_file():
            base = read_json(self.folder / BASE)
        settings = FinetuneConfig(
            method="lora",
            r=config["r"],
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout") or 0.0),
            targets=_targets(self.folder, self._entries),
            rslora=bool(config.get("use_rslora")),
        )
        named = str(base.get("folder") or config.get("base_model_name_or_path") or "")
        self.about = AdapterInfo(settings, named, str(base.get("fingerprint", "")))

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def kinds(self, name: str) -> tuple[str, ...]:
        return ("weight",)

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        return self._entries[name].dtype

    def pieces(self, name: str, kind: str) -> list[Piece]:
        entry = self._entries[name]
        return [Piece(self._path, entry.offset, whole_run(entry.shape))]


def _problems(config: Mapping[str, Any]) -> list[str]:
    found = []
    if config.get("peft_type") != "LORA":
        found.append(f"peft_type={config.get('peft_type')!r} is not supported; llamax reads LORA")
    for key, plain in PLAIN.items():
        if (value := config.get(key)) not in (plain, None, False) and value != {}:
            found.append(f"{key}={value!r} is not supported; llamax computes {plain!r} only")
    if str(first := config.get("init_lora_weights")).lower() not in FIRST:
        found.append(
            f"init_lora_weights={first!r} changes the base that the adapter belongs to; save it as "
            "LoRA of the first base with PEFT's path_initial_model_for_weight_conversion"
        )
    for key in ("r", "lora_alpha"):
        if type(config.get(key)) not in (int, float) or config[key] <= 0:
            found.append(f"{key}={config.get(key)!r} is no number above 0; save the adapter anew")
    return found


def _targets(folder: Path, names: Mapping[str, TensorEntry]) -> str:
    """The projections that have adapters, the same in every layer."""
    layers: dict[str, set[str]] = {}
    for name in names:
        pieces = name.split(".")
        known = name.startswith("model.layers.") and len(pieces) == 7 and pieces[4] in LINEAR
        if not known or pieces[5] not in ("lora_A", "lora_B"):
            raise CheckpointError(
                f"{folder / WEIGHTS} has {name}, which is no LoRA factor of a Llama's projection; "
                f"llamax adapts {', '.join(LINEAR)}"
            )
        layers.setdefault(pieces[2], set()).add(pieces[4])
    kinds = {tuple(sorted(found, key=LINEAR.index)) for found in layers.values()}
    if len(kinds) != 1 or layers.keys() != {str(number) for number in range(len(layers))}:
        raise CheckpointError(
            f"{folder / WEIGHTS} adapts other projections in one layer than in another; llamax "
            "adapts the same in every layer"
        )
    return ",".join(kinds.pop())


def is_adapter(path: Path) -> bool:
    """Whether ``path`` is a PEFT folder, or a checkpoint or run of adapters."""
    if (path / CONFIG).is_file():
        return True
    try:
        return adapter_info(Checkpoint(find_checkpoint(path), verify=False)) is not None
    except CheckpointError:
        return False


def open_adapter(path: Path | str) -> tuple[Source, AdapterInfo]:
    """A PEFT folder, or the newest checkpoint of a run of adapters, and what it says of itself.

    Raises CheckpointError where ``path`` holds no adapters.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}; give a folder with adapters in it")
    source: Source | None = None
    if (path / CONFIG).is_file():
        source = PeftFolder(path)
    elif not (path / "config.json").is_file():
        source = Checkpoint(find_checkpoint(path))
    found = None if source is None else adapter_info(source)
    if source is None or found is None:
        raise CheckpointError(
            f"{path} holds a whole model, not adapters; give a PEFT folder or a run with "
            "finetune.method=lora or qlora"
        )
    return source, found


def base_of(folder: Path, found: AdapterInfo) -> Path:
    """The folder of the base that an adapter names; CheckpointError where it is not here."""
    if not found.base or not Path(found.base).is_dir():
        raise CheckpointError(
            f"{folder} is an adapter of {found.base or 'an unnamed base'}, which is not here; "
            "give the base's folder"
        )
    return Path(found.base)


def export_adapter(adapter: Checkpoint, out: Path | str) -> Path:
    """Write an adapter checkpoint as a folder that PEFT loads.

    Raises CheckpointError where ``out`` is in use or the disk is full.
    """
    found = adapter_info(adapter)
    assert found is not None, "only adapters are exported"
    finetune, buffers = found.finetune, slabs.new_buffers()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": found.base,
        "r": finetune.r,
        "lora_alpha": int(finetune.alpha) if finetune.alpha.is_integer() else finetune.alpha,
        "lora_dropout": finetune.dropout,
        "use_rslora": finetune.rslora,
        "target_modules": sorted({name.split(".")[4] for name in adapter.names()}),
        "bias": "none",
        "inference_mode": True,
    }
    with new_folder(Path(out)) as folder:
        outgoing = []
        for name in adapter.names():
            one = slabs.stream_tensor(adapter, name, "weight", adapter.dtype(name), buffers)
            outgoing.append(one._replace(name=PREFIX + name))
        write_safetensors(folder / WEIGHTS, outgoing)
        for name, value in ((CONFIG, config), (BASE, found.state()["base"])):
            text = json.dumps(value, indent=2) + "\n"
            with explain_write_errors(folder / name, len(text)):
                (folder / name).write_text(text, encoding="utf-8")
    return Path(out)
