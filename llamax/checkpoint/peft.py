"""LoRA adapters in files: checkpoints of adapters, and PEFT folders.

::

    checkpoint   step-00000100/   a llamax manifest with ``finetune`` and ``base`` in its state
    PEFT folder  adapter_config.json, adapter_model.safetensors, and base.json of llamax

Adapters are useless without their base model, so both forms record it: the folder it was loaded
from, and a fingerprint, the sha256 of every tensor's name, shape and a few of its elements.  The
elements are hashed as bfloat16, so that a base saved again in another precision or on another mesh
has the same fingerprint.  A PEFT folder from elsewhere has none; then only names and shapes are
compared.

PEFT puts ``base_model.model.`` before a name such as
``model.layers.0.self_attn.q_proj.lora_A.weight``
(https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llamax.checkpoint import slabs
from llamax.checkpoint.atomic import new_folder
from llamax.checkpoint.hf_folder import read_json
from llamax.checkpoint.hf_writer import write_json
from llamax.checkpoint.listing import find_checkpoint
from llamax.checkpoint.reader import Checkpoint
from llamax.checkpoint.runs import Run, whole_run
from llamax.checkpoint.safetensors_io import TensorEntry, read_header, write_safetensors
from llamax.checkpoint.source import Piece, Source
from llamax.config.rules.finetune import LINEAR
from llamax.config.schema import FinetuneConfig
from llamax.config.toml import Problems, build
from llamax.runtime.errors import CheckpointError

ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_JSON = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "base.json",
)
PEFT_PREFIX = "base_model.model."
SAMPLED_ELEMENTS = 64  # read for a fingerprint at the start, the middle and the end of a tensor
# PEFT settings of which llamax computes only this value.
SUPPORTED_VALUES = {
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
# Initialisations that leave the base unchanged; PiSSA, OLoRA, CorDA, LoftQ, ... subtract from it.
SUPPORTED_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal")
# Fields of FinetuneConfig with which an adapter was trained and must be used.
ADAPTER_FIELDS = ("method", "r", "alpha", "targets", "rslora", "quant", "double_quant")


FINGERPRINT = re.compile("[0-9a-f]{64}")


def _is_number(value: object, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value < high  # type: ignore[operator]


def _is_name(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.isprintable())


# Settings of PEFT that llamax reads: what they must be, in words and as a test.
SETTINGS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "r": ("a whole number above 0", lambda v: type(v) is int and 0 < v < 2**31),
    "lora_alpha": ("a number above 0", lambda v: _is_number(v, 0, 1e30) and v != 0),
    "lora_dropout": ("0 or more and below 1", lambda v: v is None or _is_number(v, 0, 1)),
    "use_rslora": ("true or false", lambda v: v is None or isinstance(v, bool)),
    "base_model_name_or_path": ("the name of a model", _is_name),
}


class AdapterInfo(NamedTuple):
    """How adapters were trained, and the folder and fingerprint of their base ("" if unknown)."""

    finetune: FinetuneConfig
    base: str
    fingerprint: str

    def state(self) -> dict[str, Any]:
        """The entries for a checkpoint's state."""
        base = {"folder": self.base, "fingerprint": self.fingerprint}
        return {"finetune": asdict(self.finetune), "base": base}

    def check_base(self, folder: Path, base: Source) -> None:
        """Raise CheckpointError unless the adapter in ``folder`` belongs to ``base``."""
        if self.fingerprint and self.fingerprint != (actual := fingerprint(base)):
            raise CheckpointError(
                f"{folder} is an adapter of another base: {base.folder} has the fingerprint "
                f"{actual[:12]}, the adapter's base {self.fingerprint[:12]}; use {self.base}"
            )


def fingerprint(source: Source) -> str:
    """A sha256 in hex of the names, shapes and sampled elements of a model's tensors."""
    digest = hashlib.sha256()
    for name in sorted(source.names()):
        shape = source.shape(name)
        size = math.prod(shape)
        digest.update(f"{name}{list(shape)}".encode())
        count, width = min(SAMPLED_ELEMENTS, size), math.prod(shape[1:])
        for start in (0, (size - count) // 2, size - count):
            sample = torch.empty(count, dtype=source.dtype(name))
            source.fill(name, "weight", Run(0, width, start, count), sample)
            digest.update(sample.bfloat16().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def adapter_info(source: Source) -> AdapterInfo | None:
    """The description of a source of adapters; None for any other source."""
    if isinstance(source, PeftFolder):
        return source.info
    if not isinstance(source, Checkpoint) or "finetune" not in source.state:
        return None
    trained, base = source.state["finetune"], source.state.get("base")
    if not isinstance(trained, dict) or not isinstance(base, dict):
        missing = "base" if isinstance(trained, dict) else "finetune"
        raise CheckpointError(
            f"{source.folder}: its state has no table {missing}, as adapters need; save it again"
        )
    known, problems = {field.name for field in fields(FinetuneConfig)}, Problems()
    table = {name: value for name, value in trained.items() if name in known}
    finetune = build(FinetuneConfig, table, problems, "finetune")
    for line in (*problems.lines(finetune, "finetune"), *_base_problems(base)):
        raise CheckpointError(f"{source.folder}: {line}; save it again")
    return AdapterInfo(finetune, base.get("folder") or "", base.get("fingerprint") or "")


class PeftFolder(Source):
    """The LoRA adapters in a PEFT folder, under llamax names.

    Raises CheckpointError if files are missing or broken, or the adapter needs something that
    llamax does not compute.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder, self.model = Path(folder), {}
        config = read_json(self.folder / ADAPTER_CONFIG)
        for line in _problems(config):
            raise CheckpointError(f"{self.folder / ADAPTER_CONFIG}: {line}")
        self._path = self.folder / ADAPTER_WEIGHTS
        self._entries: dict[str, TensorEntry] = {}
        for name, entry in read_header(self._path).items():
            self._entries[name.removeprefix(PEFT_PREFIX)] = entry
        base: Mapping[str, Any] = {}
        if (self.folder / BASE_JSON).is_file():
            base = read_json(self.folder / BASE_JSON)
            for line in _base_problems(base):
                raise CheckpointError(f"{self.folder / BASE_JSON}: {line}; save the adapter again")
        settings = FinetuneConfig(
            method="lora",
            r=config["r"],
            alpha=float(config["lora_alpha"]),
            dropout=float(config.get("lora_dropout") or 0.0),
            targets=_targets(self.folder, self._entries),
            rslora=bool(config.get("use_rslora")),
        )
        named = base.get("folder") or config.get("base_model_name_or_path") or ""
        self.info = AdapterInfo(settings, named, base.get("fingerprint") or "")

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
    """Everything in an adapter_config.json that llamax does not support."""
    found = []
    if config.get("peft_type") != "LORA":
        kind = _shown(config.get("peft_type"))
        found.append(f"peft_type={kind} is not supported; llamax reads LORA")
    for key, plain in SUPPORTED_VALUES.items():
        if (value := config.get(key)) not in (plain, None, False) and value != {}:
            found.append(f"{key}={_shown(value)} is not supported; llamax computes {plain!r} only")
    first = config.get("init_lora_weights")
    if not isinstance(first, str | bool | None) or str(first).lower() not in SUPPORTED_INITS:
        found.append(
            f"init_lora_weights={_shown(first)} changes the base of the adapter; save it as "
            "LoRA of the original base with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, (words, fits) in SETTINGS.items():
        if not fits(value := config.get(key)):
            found.append(f"{key}={_shown(value)} is not {words}; save the adapter again")
    return found


def _base_problems(base: Mapping[str, Any]) -> list[str]:
    """Everything in the description of a base that llamax did not write."""
    found = []
    if not _is_name(folder := base.get("folder")):
        found.append(f"folder={_shown(folder)} is not the name of a folder")
    printed = base.get("fingerprint")
    if printed and not (isinstance(printed, str) and FINGERPRINT.fullmatch(printed)):
        found.append(f"fingerprint={_shown(printed)} is not a sha256")
    return found


def _shown(value: object) -> str:
    """A value from a file, for a message of one line."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _targets(folder: Path, names: Mapping[str, TensorEntry]) -> str:
    """The projections with adapters, comma-separated; CheckpointError if layers differ."""
    layers: dict[str, set[str]] = {}
    for name in names:
        pieces = name.split(".")
        known = name.startswith("model.layers.") and len(pieces) == 7 and pieces[4] in LINEAR
        if not known or pieces[5] not in ("lora_A", "lora_B"):
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS} has {name}, which is not a LoRA factor of a Llama "
                f"projection; llamax adapts {', '.join(LINEAR)}"
            )
        layers.setdefault(pieces[2], set()).add(pieces[4])
    kinds = {tuple(sorted(found, key=LINEAR.index)) for found in layers.values()}
    if len(kinds) != 1 or layers.keys() != {str(number) for number in range(len(layers))}:
        raise CheckpointError(
            f"{folder / ADAPTER_WEIGHTS} adapts different projections in different layers; llamax "
            "adapts the same ones in every layer"
        )
    return ",".join(kinds.pop())


def is_adapter(path: Path) -> bool:
    """Whether ``path`` is a PEFT folder, or a checkpoint or run of adapters."""
    if (path / ADAPTER_CONFIG).is_file():
        return True
    try:
        return adapter_info(Checkpoint(find_checkpoint(path), verify=False)) is not None
    except CheckpointError:
        return False


def open_adapter(path: Path | str) -> tuple[Source, AdapterInfo]:
    """Open a PEFT folder, a checkpoint of adapters or a run's newest one; return its info too.

    Raises CheckpointError if ``path`` holds no adapters.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}; give a folder with adapters in it")
    source: Source | None = None
    if (path / ADAPTER_CONFIG).is_file():
        source = PeftFolder(path)
    elif not (path / "config.json").is_file():
        source = Checkpoint(find_checkpoint(path))
    info = None if source is None else adapter_info(source)
    if source is None or info is None:
        raise CheckpointError(
            f"{path} holds a complete model, not adapters; give a PEFT folder or a run with "
            "finetune.method=lora or qlora"
        )
    return source, info


def find_base_folder(folder: Path, info: AdapterInfo) -> Path:
    """The folder of the base that an adapter names; CheckpointError if it does not exist here."""
    if not info.base or not Path(info.base).is_dir():
        raise CheckpointError(
            f"{folder} is an adapter of {info.base or 'an unnamed base'}, which does not exist "
            "here; give the folder of the base"
        )
    return Path(info.base)


def export_adapter(adapter: Checkpoint, out: Path | str) -> Path:
    """Write a checkpoint of adapters as a folder that PEFT loads; return that folder.

    Raises CheckpointError if ``out`` exists or the disk is full.
    """
    info = adapter_info(adapter)
    assert info is not None, "only adapters are exported"
    finetune, buffers = info.finetune, slabs.new_buffers()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": info.base,
        "r": finetune.r,
        "lora_alpha": int(finetune.alpha) if finetune.alpha.is_integer() else finetune.alpha,
        "lora_dropout": finetune.dropout,
        "use_rslora": finetune.rslora,
        "target_modules": sorted({name.split(".")[4] for name in adapter.names()}),
        "bias": "none",
        "inference_mode": True,
    }
    with new_folder(Path(out)) as folder:
        streams = []
        for name in adapter.names():
            stream = slabs.stream_tensor(adapter, name, "weight", adapter.dtype(name), buffers)
            streams.append(stream._replace(name=PEFT_PREFIX + name))
        write_safetensors(folder / ADAPTER_WEIGHTS, streams)
        for name, value in ((ADAPTER_CONFIG, config), (BASE_JSON, info.state()["base"])):
            write_json(folder / name, value)
    return Path(out)
