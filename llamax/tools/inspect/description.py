"""Describe a checkpoint, run, model, adapter or dataset: rows of labels and values.

With ``verify`` everything is read and compared with the hashes that are kept, if there are any.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamax.checkpoint import hf_folder
from llamax.checkpoint import manifest as files
from llamax.checkpoint.listing import list_checkpoints
from llamax.checkpoint.peft import (
    AdapterInfo,
    PeftFolder,
    adapter_info,
)
from llamax.checkpoint.reader import Checkpoint
from llamax.checkpoint.safetensors_io import read_header
from llamax.checkpoint.source import Source
from llamax.config.model import ModelConfig
from llamax.data.dataset import blend_words
from llamax.runtime.errors import CheckpointError
from llamax.runtime.progress import Progress
from llamax.runtime.text import printable_line
from llamax.runtime.units import show_bytes, show_number

Rows = Iterator[tuple[str, object]]


def describe(path: Path | str, verify: bool = False) -> Rows:
    """Rows of (label, value) that describe what lies at ``path``; ``verify`` reads all of it.

    Raises CheckpointError or DataError if it is damaged or of no known kind; also while the rows
    are read.
    """
    if words := blend_words(str(path)):
        return _blend(words, verify)
    path = Path(path)
    if path.suffix == ".tokens" or (path / "train.tokens").is_file():
        return _dataset(path, verify)
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if Path(f"{prefix}.idx").is_file() or (path / "dataset.json").is_file():
        return _megatron(prefix, verify)
    if path.suffix == ".safetensors":
        return _container(path, verify)
    if (path / files.MANIFEST).exists() or files.STEP_FOLDER.match(path.name):
        return _checkpoint(path, verify)
    if (path / hf_folder.ADAPTER_CONFIG).is_file():
        return _adapter(path, verify)
    if (path / hf_folder.CONFIG_JSON).is_file():
        return _hub(path, verify)
    if list_checkpoints(path):
        return _run(path, verify)
    if not path.exists():
        raise CheckpointError(f"there is no {path}; check the path")
    raise CheckpointError(
        f"{path} is not a checkpoint, run, Hugging Face or PEFT folder or dataset that llamax "
        "knows; "
        "checkpoints of NxD, optimum-neuron, NeMo and Meta are read by llamax import"
    )


def _checkpoint(path: Path, verify: bool) -> Rows:
    source = Checkpoint(path, verify=False)
    manifest = source.manifest
    yield "checkpoint", path
    yield "step", manifest.step
    degrees = {name: manifest.mesh.get(name) for name in ("tensor", "context", "data")}
    mesh = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree)
    yield "saved on", f"{mesh}, llamax {manifest.llamax}, torch {manifest.torch}"
    yield from _model(source)
    if trained := adapter_info(source):
        yield from _lora(trained)
    kept = Counter((k, one.dtype) for t in manifest.tensors.values() for k, one in t.kinds.items())
    yield "kept", ", ".join(f"{kind} {dtype} x {n}" for (kind, dtype), n in kept.items())
    shown = ("base", "finetune") if trained else ()
    for key, value in manifest.state.items():
        if key not in shown:
            yield key.replace("_", " "), value
    yield "files", _files(file.size_bytes for file in manifest.files)
    if verify:
        total = sum(file.size_bytes for file in manifest.files)
        with Progress("verifying", total) as bar:
            source.verify(progress=bar.update)
        yield "verified", f"sha256 of all {len(manifest.files)} files"


def _run(path: Path, verify: bool) -> Rows:
    found = list_checkpoints(path)
    yield "run", path
    yield "checkpoints", ", ".join(one.name for one in found)
    yield from _checkpoint(found[-1], verify)


def _hub(path: Path, verify: bool) -> Rows:
    source = hf_folder.HfFolder(path)
    yield "Hugging Face", path
    yield from _model(source)
    yield from _weights(source)
    tokenizer = [name for name in hf_folder.TOKENIZER_FILES if (path / name).is_file()]
    yield "tokenizer", ", ".join(tokenizer) or "none"
    yield from _no_hashes(verify)


def _adapter(path: Path, verify: bool) -> Rows:
    source = PeftFolder(path)
    yield "PEFT adapter", path
    yield from _lora(source.info)
    if source.settings.special:
        yield "PEFT settings", ", ".join(source.settings.special)
    yield from _weights(source)
    yield from _no_hashes(verify)


def _lora(info: AdapterInfo) -> Rows:
    settings, base, fingerprint = info
    yield "base", (base or "not named") + (f", fingerprint {fingerprint[:12]}" * bool(fingerprint))
    yield (
        "adapters",
        f"LoRA of rank {settings.r}, alpha {settings.alpha:g}, dropout {settings.dropout:g} "
        f"on {settings.targets}",
    )


def _weights(source: hf_folder.HfFolder | PeftFolder) -> Rows:
    dtypes = Counter(str(source.dtype(name)).removeprefix("torch.") for name in source.names())
    yield "kept", ", ".join(f"weight {dtype} x {n}" for dtype, n in dtypes.items())
    yield "files", _files(file.stat().st_size for file in source.folder.glob("*.safetensors"))


def _no_hashes(verify: bool) -> Rows:
    if verify:
        yield "verified", "nothing: files of this kind keep no hashes"


def _model(source: Source) -> Rows:
    model = ModelConfig.from_hub(source.model)
    yield (
        "model",
        f"Llama of {show_number(model.num_parameters())} parameters: "
        f"{model.num_hidden_layers} layers, hidden {model.hidden_size}, "
        f"feed-forward {model.intermediate_size}, "
        f"heads {model.num_attention_heads}/{model.num_key_value_heads}, "
        f"vocabulary {model.vocab_size}"
        f"{', tied' if model.tie_word_embeddings else ''}",
    )


def _container(path: Path, verify: bool) -> Rows:
    header = read_header(path)
    yield "safetensors", path
    yield "tensors", len(header)
    yield "elements", show_number(sum(math.prod(entry.shape) for entry in header.values()))
    yield "files", _files([path.stat().st_size])
    yield from _no_hashes(verify)


def _dataset(path: Path, verify: bool) -> Rows:
    from llamax.data.token_file import TokenFile

    paths = [path] if path.is_file() else sorted(path.glob("*.tokens"))
    yield "dataset", path
    for one in paths:
        header = TokenFile(one, "start" if verify else "off").header
        yield (
            one.stem,
            f"{show_number(header.tokens)} tokens, {show_number(header.documents)} documents, "
            f"{show_bytes(header.text_bytes)} of text, {header.dtype.name}",
        )
    yield "vocabulary", header.vocab_size
    yield "tokenizer", header.tokenizer
    yield "files", _files(one.stat().st_size for one in paths)
    if verify:
        yield "verified", f"checksums of all {len(paths)} files"


def _blend(words: Sequence[str], verify: bool) -> Rows:
    for weight, path in zip(words[::2], words[1::2], strict=False):
        yield "weight", weight
        yield from describe(path, verify)


def _megatron(path: Path, verify: bool) -> Rows:
    from llamax.data.dataset import open_dataset
    from llamax.data.megatron import IndexedFile

    header = open_dataset(path, "off").train.header
    found = open_dataset(path, "off", header.vocab_size)
    splits = {"train" if path.is_dir() else path.name: found.train, "validation": found.validation}
    indexed = {name: one for name, one in splits.items() if isinstance(one, IndexedFile)}
    yield "Megatron data", path
    for name, one in indexed.items():
        documents = show_number(len(one.marks) - 1)
        yield name, f"{show_number(len(one))} tokens, {documents} documents, {one.dtype.name}"
    yield "vocabulary", header.vocab_size or "not named"
    yield "tokenizer", header.tokenizer or "not named"
    halves = (Path(f"{one.path}{half}") for one in indexed.values() for half in (".bin", ".idx"))
    yield "files", _files(half.stat().st_size for half in halves)
    if verify:
        found.verify()
        known = " and tokens are in the vocabulary" if header.vocab_size else ""
        yield "verified", f"that sequences lie end to end{known}; the format keeps no checksums"


def _files(sizes: Any) -> str:
    sizes = [*sizes]
    return f"{len(sizes)}, {show_bytes(sum(sizes))}"


def table(rows: Mapping[str, object] | Sequence[tuple[str, object]]) -> str:
    """Rows as aligned lines."""
    pairs = [*rows]
    width = max(len(label) for label, _ in pairs)
    return "\n".join(f"{label:<{width}}  {printable_line(value)}" for label, value in pairs)
