"""Describe a checkpoint, run, model, adapter or dataset: rows of labels and values.

With ``verify`` everything is read and compared with the hashes that are kept, if there are any.
Describing a checkpoint or a dataset imports no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamax.checkpoint import manifest as files
from llamax.checkpoint.adapter_folders import ADAPTER_SHARDS, adapter_folder, holds_adapters
from llamax.checkpoint.adapter_record import AdapterInfo, recorded
from llamax.checkpoint.listing import suggest_intact
from llamax.checkpoint.safetensors_header import DTYPE_NAMES
from llamax.config.constants import LOSS_SCALE_STATE, SPIKES_STATE
from llamax.config.data_path import blend_words
from llamax.config.model import ModelConfig
from llamax.config.step_folders import is_checkpoint, list_checkpoints
from llamax.data.chat.record import PROMPT, PromptRecord
from llamax.runtime.errors import CheckpointError
from llamax.runtime.hub import local_folder
from llamax.runtime.hub_files import CONFIG_JSON, MODEL, TOKENIZER_FILES
from llamax.runtime.progress import Progress
from llamax.runtime.text import printable_line
from llamax.runtime.units import amount, count, show_bytes, show_number

if TYPE_CHECKING:
    import torch

    from llamax.checkpoint.hf_folder import HfFolder
    from llamax.checkpoint.peft import PeftFolder

Rows = Iterator[tuple[str, object]]


class Row(tuple[str, object]):
    """A label and a value for readers, and the same as ``facts`` for programs (``as_json``)."""

    facts: dict[str, Any]

    def __new__(cls, label: str, value: object, **facts: Any) -> Row:
        row = super().__new__(cls, (label, value))
        row.facts = facts
        return row


def describe(path: Path | str, verify: bool = False) -> Rows:
    """Rows of (label, value) that describe what lies at ``path``; ``verify`` reads all of it.

    Of a repository on the Hub a model is described.  Raises CheckpointError or DataError if it is
    damaged or of no known kind, also while the rows are read, and HubError for the Hub.
    """
    if words := blend_words(str(path)):
        return _blend(words, verify)
    path = local_folder(path, MODEL)
    if path.suffix == ".tokens" or (path / "train.tokens").is_file():
        return _dataset(path, verify)
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if Path(f"{prefix}.idx").is_file() or (path / "dataset.json").is_file():
        return _megatron(prefix, verify)
    if path.suffix == ".safetensors":
        return _container(path, verify)
    if is_checkpoint(path):
        return _checkpoint(path, verify)
    if holds_adapters(folder := adapter_folder(path)):
        return _adapter(folder, verify)
    if (path / CONFIG_JSON).is_file():
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
    with suggest_intact(path):
        manifest = files.read_manifest(path)
    yield Row("checkpoint", path, kind="checkpoint", path=path, checkpoint=path)
    yield Row("step", manifest.step, step=manifest.step)
    degrees = {name: manifest.mesh.get(name) for name in ("tensor", "context", "pipeline", "data")}
    mesh = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree)
    yield Row(
        "saved on",
        f"{mesh}, llamax {manifest.llamax}, torch {manifest.torch}",
        mesh=manifest.mesh,
        versions={"llamax": manifest.llamax, "torch": manifest.torch},
    )
    yield from _model(manifest.model)
    if trained := recorded(path, manifest.state):
        yield from _lora(trained)
    stored = (pair for tensor in manifest.tensors.values() for pair in tensor.kinds.items())
    yield _tensors(Counter((kind, DTYPE_NAMES[one.dtype]) for kind, one in stored))
    shown = ("base", "finetune") if trained else ()
    for key, value in manifest.state.items():
        if key == SPIKES_STATE and isinstance(value, dict):
            yield Row("skipped steps", value.get("skipped"), state={key: value})
        elif key == LOSS_SCALE_STATE and isinstance(value, dict):
            yield Row("loss scale", value.get("scale"), state={key: value})
        elif key == PROMPT and (record := PromptRecord.of(value)):
            yield Row("prompt", _prompt(record), state={key: value})
        elif key not in shown:
            yield Row(key.replace("_", " "), value, state={key: value})
    yield _files(file.size_bytes for file in manifest.files)
    if verify:
        from llamax.checkpoint.verify import verify_files

        total = sum(file.size_bytes for file in manifest.files)
        with suggest_intact(path), Progress("verifying", total) as bar:
            verify_files(path, manifest.files, bar.update)
        yield Row("verified", f"checksums of {_all_files(len(manifest.files))}", verified=True)


def _run(path: Path, verify: bool) -> Rows:
    found = list_checkpoints(path)
    yield Row("run", path, kind="run", path=path)
    names = [one.name for one in found]
    yield Row("checkpoints", ", ".join(names), checkpoints=names)
    yield from _checkpoint(found[-1], verify)


def _hub(path: Path, verify: bool) -> Rows:
    from llamax.checkpoint.hf_folder import HfFolder

    source = HfFolder(path)
    yield Row("Hugging Face", path, kind="hugging-face", path=path)
    yield from _model(source.model)
    yield from _weights(source)
    tokenizer = [name for name in TOKENIZER_FILES if (path / name).is_file()]
    yield Row("tokenizer", ", ".join(tokenizer) or "none", tokenizer_files=tokenizer)
    yield from _no_hashes(verify)


def _adapter(path: Path, verify: bool) -> Rows:
    from llamax.checkpoint.peft import PeftFolder

    source = PeftFolder(path)
    yield Row("PEFT adapter", path, kind="peft-adapter", path=path)
    yield from _lora(source.info)
    if source.settings.special:
        special = source.settings.special
        yield Row("PEFT settings", ", ".join(special), peft_settings=[*special])
    yield from _weights(source)
    yield from _no_hashes(verify)


def _lora(info: AdapterInfo) -> Rows:
    settings, base, fingerprint = info
    yield Row(
        "base",
        (base or "not named") + (f", fingerprint {fingerprint[:12]}" * bool(fingerprint)),
        base={"name": base or None, "fingerprint": fingerprint or None},
    )
    yield Row(
        "adapters",
        f"LoRA of rank {settings.r}, alpha {settings.alpha:g}, dropout {settings.dropout:g} "
        f"on {settings.targets}",
        adapters={
            "r": settings.r,
            "alpha": settings.alpha,
            "dropout": settings.dropout,
            "targets": settings.targets,
        },
    )


def _weights(source: HfFolder | PeftFolder) -> Rows:
    yield _tensors(Counter(("weight", _name(source.dtype(name))) for name in source.names()))
    patterns = ("*.safetensors", f"{ADAPTER_SHARDS}/model/**/*.pt")
    files = (file for pattern in patterns for file in source.folder.glob(pattern))
    yield _files(file.stat().st_size for file in files)


def _tensors(counts: Mapping[tuple[str, str], int]) -> Row:
    """How many tensors there are of each kind and dtype."""
    return Row(
        "tensors",
        ", ".join(f"{kind} {dtype} x {n}" for (kind, dtype), n in counts.items()),
        tensors=[{"kind": kind, "dtype": dtype, "count": n} for (kind, dtype), n in counts.items()],
    )


def _name(dtype: torch.dtype) -> str:
    """The name of a dtype, as settings have it."""
    return str(dtype).removeprefix("torch.")


def _no_hashes(verify: bool) -> Rows:
    if verify:
        yield Row("verified", "nothing: files of this kind keep no hashes", verified=False)


def _model(hub: Mapping[str, Any]) -> Rows:
    model = ModelConfig.from_hub(hub)
    yield Row(
        "model",
        f"Llama of {show_number(model.num_parameters())} parameters: "
        f"{count(model.num_hidden_layers, 'layer')}, hidden {model.hidden_size}, "
        f"feed-forward {model.intermediate_size}, "
        f"heads {model.num_attention_heads}/{model.num_key_value_heads}, "
        f"vocabulary {model.vocab_size}"
        f"{', tied' if model.tie_word_embeddings else ''}",
        parameters=model.num_parameters(),
        model=hub,
    )


def _container(path: Path, verify: bool) -> Rows:
    from llamax.checkpoint.safetensors_io import read_header

    header = read_header(path)
    yield Row("safetensors", path, kind="safetensors", path=path)
    yield _tensors(Counter(("tensor", _name(entry.dtype)) for entry in header.values()))
    elements = sum(math.prod(entry.shape) for entry in header.values())
    yield Row("elements", show_number(elements), elements=elements)
    yield _files([path.stat().st_size])
    yield from _no_hashes(verify)


def _dataset(path: Path, verify: bool) -> Rows:
    from llamax.data.token_file import TokenFile

    paths = [path] if path.is_file() else sorted(path.glob("*.tokens"))
    yield Row("dataset", path, kind="dataset", path=path)
    for one in paths:
        header = TokenFile(one, "start" if verify else "off").header
        counts = {"tokens": header.tokens, "documents": header.documents}
        yield Row(
            one.stem,
            f"{_tokens(**counts)}, {show_bytes(header.text_bytes)} of text, {header.dtype.name}",
            splits={
                one.stem: {
                    **counts,
                    "text_bytes": header.text_bytes,
                    "dtype": header.dtype.name,
                }
            },
        )
    yield Row("vocabulary", header.vocab_size, vocab_size=header.vocab_size)
    yield Row("tokenizer", header.tokenizer, tokenizer=header.tokenizer)
    yield _files(one.stat().st_size for one in paths)
    if verify:
        yield Row("verified", f"checksums of {_all_files(len(paths))}", verified=True)


def _blend(words: Sequence[str], verify: bool) -> Rows:
    for weight, path in zip(words[::2], words[1::2], strict=False):
        yield Row("weight", weight, weight=float(weight))
        yield from describe(path, verify)


def _megatron(path: Path, verify: bool) -> Rows:
    from llamax.data.dataset import open_dataset
    from llamax.data.megatron import IndexedFile

    header = open_dataset(path, "off").train.header
    found = open_dataset(path, "off", header.vocab_size)
    splits = {"train" if path.is_dir() else path.name: found.train, "validation": found.validation}
    indexed = {name: one for name, one in splits.items() if isinstance(one, IndexedFile)}
    yield Row("Megatron data", path, kind="megatron", path=path)
    for name, one in indexed.items():
        counts = {"tokens": len(one), "documents": len(one.marks) - 1}
        yield Row(
            name,
            f"{_tokens(**counts)}, {one.dtype.name}",
            splits={name: {**counts, "dtype": one.dtype.name}},
        )
    vocabulary, tokenizer = header.vocab_size or None, header.tokenizer or None
    yield Row("vocabulary", vocabulary or "not named", vocab_size=vocabulary)
    yield Row("tokenizer", tokenizer or "not named", tokenizer=tokenizer)
    halves = (Path(f"{one.path}{half}") for one in indexed.values() for half in (".bin", ".idx"))
    yield _files(half.stat().st_size for half in halves)
    if verify:
        found.verify()
        known = " and tokens are in the vocabulary" if header.vocab_size else ""
        what = f"that sequences lie end to end{known}; the format keeps no checksums"
        yield Row("verified", what, verified=False)


def _prompt(record: PromptRecord) -> str:
    """What training made of rows: the template, its system text, and columns with other names."""
    system = f", system text {record.system!r}" if record.system else ""
    fields = "".join(f", {name} from {column}" for name, column in record.fields.items())
    return f"template {record.template}{system}{fields}"


def _all_files(number: int) -> str:
    return f"{'all ' if number > 1 else ''}{count(number, 'file')}"


def _tokens(tokens: int, documents: int) -> str:
    return f"{amount(tokens, 'token')}, {amount(documents, 'document')}"


def _files(sizes: Iterable[int]) -> Row:
    each = [*sizes]
    value = f"{len(each)}, {show_bytes(sum(each))}"
    return Row("files", value, files={"count": len(each), "bytes": sum(each)})


def as_json(rows: Iterable[tuple[str, object]]) -> dict[str, Any]:
    """What ``describe`` found, for programs; a blend is a list of datasets with their weights."""
    found: dict[str, Any] = {}
    datasets: list[dict[str, Any]] = []
    into = found
    for row in rows:
        facts = row.facts if isinstance(row, Row) else {row[0]: row[1]}
        if "weight" in facts:
            into = {}
            datasets.append(into)
        for key, value in facts.items():
            if key not in into:
                into[key] = value
            elif isinstance(value, dict) and isinstance(into[key], dict):
                into[key] = {**into[key], **value}
    return {"kind": "blend", "datasets": datasets} if datasets else found


def table(rows: Mapping[str, object] | Sequence[tuple[str, object]]) -> str:
    """Rows as aligned lines; labels and values are safe for a terminal, labels are cut to 40."""
    found: list[Any] = [*rows]
    pairs = [(printable_line(label, 40), value) for label, value in found]
    width = max(len(label) for label, _ in pairs)
    return "\n".join(f"{label:<{width}}  {printable_line(value)}" for label, value in pairs)
