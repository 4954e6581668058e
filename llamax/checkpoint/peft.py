"""LoRA adapters in files: checkpoints of adapters, and PEFT folders.

::

    checkpoint   step-00000100/   a llamax manifest with ``finetune`` and ``base`` in its state
    PEFT folder  adapter_config.json, adapter_model.safetensors, and base.json of llamax
                 or adapter_shards/ of optimum-neuron in the place of adapter_model.safetensors

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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamax.checkpoint import slabs
from llamax.checkpoint.adapter_folders import ADAPTER_SHARDS, adapter_folder, holds_adapters
from llamax.checkpoint.adapter_record import AdapterInfo as AdapterInfo
from llamax.checkpoint.adapter_record import base_problems, recorded
from llamax.checkpoint.atomic import new_folder
from llamax.checkpoint.formats.optimum_adapters import AdapterShards, Factor
from llamax.checkpoint.hf_folder import PICKLED_WEIGHTS, check_floating, read_json, write_json
from llamax.checkpoint.listing import find_checkpoint
from llamax.checkpoint.peft_settings import PeftSettings, problems
from llamax.checkpoint.places import find_folder
from llamax.checkpoint.prompt_record import write_prompt
from llamax.checkpoint.reader import Checkpoint
from llamax.checkpoint.runs import Run, overlaps, whole_run
from llamax.checkpoint.safetensors_io import TensorEntry, read_header, write_safetensors
from llamax.checkpoint.source import FileSource, Piece, Source
from llamax.config.rules.finetune import LINEAR
from llamax.config.schema import FinetuneConfig
from llamax.runtime.errors import CheckpointError
from llamax.runtime.hub import local_folder
from llamax.runtime.hub_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_JSON, MODEL
from llamax.runtime.hub_name import hub_name

PEFT_PREFIX = "base_model.model."
SAMPLED_ELEMENTS = 64  # read for a fingerprint at the start, the middle and the end of a tensor
MLP = ("gate_proj", "up_proj", "down_proj")
# The tensors of a PEFT folder: a module of a Llama, and what is kept of it.
TENSOR = re.compile(
    rf"(model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(LINEAR)})|lm_head|model\.embed_tokens"
    r"|model\.norm|model\.layers\.\d+\.(input|post_attention)_layernorm)\.(weight"
    r"|(token_adapter\.)?base_layer\.weight|token_adapter\.trainable_tokens_delta"
    r"|lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector)"
)
# Fields of FinetuneConfig with which an adapter was trained and must be used.
ADAPTER_FIELDS = ("method", "r", "alpha", "targets", "rslora", "quant", "double_quant")


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


def check_base(info: AdapterInfo, folder: Path, base: Source) -> None:
    """Raise CheckpointError unless the adapter in ``folder`` belongs to ``base``."""
    if info.fingerprint and info.fingerprint != (actual := fingerprint(base)):
        raise CheckpointError(
            f"{folder} is an adapter of another base: {base.folder} has the fingerprint "
            f"{actual[:12]}, the adapter's base {info.fingerprint[:12]}; use {info.base}"
        )


def adapter_info(source: Source) -> AdapterInfo | None:
    """The description of a source of adapters; None for any other source."""
    if isinstance(source, PeftFolder):
        return source.info
    return recorded(source.folder, source.state) if isinstance(source, Checkpoint) else None


class PeftFolder(FileSource):
    """The LoRA adapters in a PEFT folder, under llamax names.

    Raises CheckpointError if files are missing or broken, or the adapter needs something that
    llamax does not compute.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder, self.model = Path(folder), {}
        config = read_json(self.folder / ADAPTER_CONFIG)
        for line in problems(config):
            raise CheckpointError(f"{self.folder / ADAPTER_CONFIG}: {line}")
        self.settings = PeftSettings.of(config)
        self._path = self.folder / ADAPTER_WEIGHTS
        self._shards: AdapterShards | None = None
        self._held: tuple[str, Tensor] | None = None  # the tensor that was joined last
        if not self._path.exists() and (self.folder / ADAPTER_SHARDS).is_dir():
            self._path, self._shards = self.folder / ADAPTER_SHARDS, AdapterShards(self.folder)
        elif not self._path.exists() and (self.folder / PICKLED_WEIGHTS).exists():
            raise CheckpointError(
                f"{self.folder} has {PICKLED_WEIGHTS}, a pickle, and no {ADAPTER_WEIGHTS}; load it "
                "with PEFT and save it with save_pretrained(safe_serialization=True)"
            )
        self._entries: dict[str, TensorEntry | Factor] = {}
        header = read_header(self._path) if self._shards is None else self._shards.factors
        for stored, entry in header.items():
            if (name := stored.removeprefix(PEFT_PREFIX)) in self._entries:
                raise CheckpointError(
                    f"{self._path} has {name[:80]} with and without {PEFT_PREFIX} before it; save "
                    "the adapter again"
                )
            self._entries[name] = entry
        check_floating({name: entry.dtype for name, entry in self._entries.items()}, self.folder)
        for name in self._entries:
            if not TENSOR.fullmatch(name):
                raise CheckpointError(
                    f"{self._path} has {name[:80]}, which is not a LoRA factor of a Llama "
                    "projection nor another tensor that llamax reads of an adapter; llamax adapts "
                    f"{', '.join(LINEAR)}, embed_tokens and lm_head"
                )
        base: Mapping[str, Any] = {}
        if (self.folder / BASE_JSON).is_file():
            base = read_json(self.folder / BASE_JSON)
            for line in base_problems(base):
                raise CheckpointError(f"{self.folder / BASE_JSON}: {line}; save the adapter again")
        targets, self._alike = _adapted(self.settings, self._entries)
        settings = FinetuneConfig(
            method="lora",
            r=self.settings.r,
            alpha=self.settings.alpha,
            dropout=float(config.get("lora_dropout") or 0.0),
            targets=targets,
            rslora=self.settings.rslora,
        )
        named = base.get("folder") or _base_of_peft(config)
        self.info = AdapterInfo(settings, named, base.get("fingerprint") or "")

    def is_uniform(self, layers: int) -> bool:
        """Whether all of so many layers have factors of one scale in the same projections."""
        numbers = {name.split(".")[2] for name in self._entries if name.startswith("model.layers.")}
        return self._alike and len(numbers) == layers

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        return self._entries[name].dtype

    def pieces(self, name: str, kind: str, run: Run) -> list[Piece]:
        entry = self._entries[name]
        assert isinstance(entry, TensorEntry), "shards are joined"
        return [Piece(self._path, entry.offset, whole_run(entry.shape))]

    def _fetch(self, name: str, kind: str, run: Run, into: Tensor) -> None:
        entry = self._entries[name]
        if isinstance(entry, TensorEntry):
            super()._fetch(name, kind, run, into)
            return
        if self._held is None or self._held[0] != name:
            assert self._shards is not None
            self._held = name, self._shards.read(entry).view(-1)
        whole = self._held[1]
        for copy in overlaps(whole_run(entry.shape), run):
            size = copy.rows, copy.columns
            rows = whole[copy.source :].as_strided(size, (copy.source_stride, 1))
            into[copy.target :].as_strided(size, (copy.target_stride, 1)).copy_(rows)


def _adapted(settings: PeftSettings, names: Iterable[str]) -> tuple[str, bool]:
    """The projections with factors, comma-separated, and whether layers from 0 on have the same.

    They must also be the ones that the settings name.  Adapters that training makes are of this
    kind; others are merged into the base to be used.
    """
    layers: dict[str, set[str]] = {}
    alike = not settings.special
    for name in names:
        pieces = name.split(".")
        known = len(pieces) == 7 and pieces[4] in LINEAR
        alike &= known and pieces[5] in ("lora_A", "lora_B")
        if known:
            layers.setdefault(pieces[2], set()).add(pieces[4])
    kinds = {tuple(sorted(found, key=LINEAR.index)) for found in layers.values()}
    alike &= len(kinds) == 1 and layers.keys() == {str(number) for number in range(len(layers))}
    alike &= not any(map(settings.adapts, ("lm_head", "model.embed_tokens")))
    for number, found in layers.items():
        for projection in LINEAR:
            owner = "mlp" if projection in MLP else "self_attn"
            module = f"model.layers.{number}.{owner}.{projection}"
            adapts = settings.adapts(module)
            alike &= adapts or projection not in found
            alike &= projection in found or not (adapts and settings.stated)
    adapted = set().union(*layers.values()) if layers else set()
    return ",".join(sorted(adapted, key=LINEAR.index)), alike


def is_adapter(path: Path) -> bool:
    """Whether ``path`` is a PEFT folder, a checkpoint or run of adapters, or optimum-neuron's."""
    if holds_adapters(path := adapter_folder(path)):
        return True
    try:
        return adapter_info(Checkpoint(find_checkpoint(path), verify=False)) is not None
    except CheckpointError:
        return False


def open_adapter(path: Path | str) -> tuple[Source, AdapterInfo]:
    """Open a PEFT folder, a checkpoint of adapters or a run's newest one; return its info too.

    Of optimum-neuron's trainer also the folder that it saved in, see ``adapter_folder``.

    Raises CheckpointError if ``path`` holds no adapters.
    """
    path = local_folder(path, MODEL)
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}; give a folder with adapters in it")
    source: Source | None = None
    if holds_adapters(path := adapter_folder(path)):
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
    found = find_folder(info.base, folder) if info.base else None
    if found is None and info.base and hub_name(info.base) is not None:
        return local_folder(info.base, MODEL)
    if found is None:
        raise CheckpointError(
            f"{folder} is an adapter of {info.base or 'an unnamed base'}, which does not exist "
            "here; give the folder of the base"
        )
    return found


def _base_in_peft(base: str) -> dict[str, str]:
    """The fields of adapter_config.json for the base: a folder, or a repository and its commit."""
    name = hub_name(base) if base else None
    if name is None:
        return {"base_model_name_or_path": base}
    return {"base_model_name_or_path": name.repo, "revision": name.revision}


def _base_of_peft(config: Mapping[str, Any]) -> str:
    """The base that adapter_config.json names."""
    base, revision = (config.get(key) or "" for key in ("base_model_name_or_path", "revision"))
    return f"{base}@{revision}" if revision and hub_name(str(base)) is not None else str(base)


def export_adapter(adapter: Checkpoint, out: Path | str) -> Path:
    """Write a checkpoint of adapters as a folder that PEFT loads; return that folder.

    Raises CheckpointError if ``out`` exists or the disk is full.
    """
    info = adapter_info(adapter)
    assert info is not None, "only adapters are exported"
    finetune = info.finetune
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **_base_in_peft(info.base),
        "r": finetune.r,
        "lora_alpha": int(finetune.alpha) if finetune.alpha.is_integer() else finetune.alpha,
        "lora_dropout": finetune.dropout,
        "use_rslora": finetune.rslora,
        "target_modules": sorted({name.split(".")[4] for name in adapter.names()}),
        "bias": "none",
        "inference_mode": True,
    }
    with new_folder(Path(out)) as folder:
        _write_factors(adapter, folder)
        for name, value in ((ADAPTER_CONFIG, config), (BASE_JSON, info.state()["base"])):
            write_json(folder / name, value)
        write_prompt(adapter, folder)
    return Path(out)


def write_joined(adapter: PeftFolder, out: Path | str) -> Path:
    """Write adapters in shards as a folder that PEFT loads; return that folder.

    Raises CheckpointError if ``out`` exists or the disk is full.
    """
    with new_folder(Path(out)) as folder:
        _write_factors(adapter, folder)
        write_json(folder / ADAPTER_CONFIG, read_json(adapter.folder / ADAPTER_CONFIG))
    return Path(out)


def _write_factors(adapter: Source, folder: Path) -> None:
    """Write the tensors of adapters as PEFT names them."""
    buffers, streams = slabs.new_buffers(), []
    for name in adapter.names():
        stream = slabs.stream_tensor(adapter, name, "weight", adapter.dtype(name), buffers)
        streams.append(stream._replace(name=PEFT_PREFIX + name))
    write_safetensors(folder / ADAPTER_WEIGHTS, streams)
