"""The model card, README.md: what the model is, what it was trained on and how, and its losses.

The settings are those of the run's configuration that another person needs to train it again; no
path of this machine is among them.

Source: the metadata of model cards in the Hub's documentation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llamax.checkpoint.places import find_folder
from llamax.config.constants import METRICS_FILE
from llamax.config.data_path import datasets_in
from llamax.config.schema import Config
from llamax.data.prepare.hub_dataset import made_from
from llamax.runtime.hub_name import HubName, hub_name
from llamax.runtime.units import perplexity, show_number
from llamax.training.metrics import Record, read_jsonl

SETTINGS = {
    "optim": ("lr", "min_lr", "schedule", "beta1", "beta2", "weight_decay", "max_grad_norm"),
    "data": ("sequence_length", "global_batch", "packing", "labels"),
    "run": ("dtype", "seed"),
    "parallel": ("tensor", "pipeline", "context", "zero"),
    "finetune": ("method", "r", "alpha", "dropout", "targets"),
}
FILL_IN = (
    "**To be filled in.** The licence of the base and of the data may bind this model; name yours "
    "as `license:` at the top of this file."
)


class Subject(NamedTuple):
    """What is described: the repository, the size of the model, whether it is adapters, its base.

    ``base`` is a repository on the Hub or empty, ``license`` an identifier of the Hub or empty.
    """

    name: HubName
    parameters: int
    adapters: bool
    base: str
    license: str


def model_card(subject: Subject, run: Path | None, config: Config | None) -> str:
    """The text of README.md; ``run`` and ``config``: the training, if it is known."""
    records = [] if run is None else read_jsonl(run / METRICS_FILE)
    datasets = [] if run is None or config is None else datasets_of(config.data.path, run)
    head: dict[str, Any] = {
        **({"license": subject.license} if subject.license else {}),
        **({"base_model": subject.base.partition("@")[0]} if subject.base else {}),
        **({"base_model_relation": _relation(subject)} if subject.base else {}),
        **({"datasets": [name.repo for name in datasets]} if datasets else {}),
        "library_name": "peft" if subject.adapters else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "llamax", *(["lora"] if subject.adapters else [])],
    }
    title = subject.name.repo.partition("/")[2]
    kind = "LoRA adapters" if subject.adapters else "A Llama"
    beside = f" of [{subject.base}](https://huggingface.co/{subject.base.partition('@')[0]})"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {title}",
        f"{kind} with {show_number(subject.parameters)} parameters"
        f"{beside if subject.base and subject.adapters else ''}, trained with llamax"
        f"{f' from {subject.base}' if subject.base and not subject.adapters else ''}.",
        "## Licence",
        f"`{subject.license}`" if subject.license else FILL_IN,
        "## Use",
        _use(subject),
    ]
    if config is not None:
        parts += ["## Data", _data(config, datasets), "## Training", _table(_settings(config))]
    if records:
        parts += ["## Losses", _table(_losses(records))]
    return "\n\n".join(parts) + "\n"


def datasets_of(path: str, run: Path) -> list[HubName]:
    """The datasets on the Hub from which the dataset folders of a run were made."""
    names: list[HubName] = []
    for part in datasets_in(path):
        folder = find_folder(part, run)
        texts = made_from(folder) if folder is not None else []
        texts = [text for text in texts if text.startswith("hf://datasets/")]
        names += [name for text in texts if (name := hub_name(text, "dataset")) is not None]
    return names


def _relation(subject: Subject) -> str:
    return "adapter" if subject.adapters else "finetune"


def _use(subject: Subject) -> str:
    name = json.dumps(subject.name.repo)
    if subject.adapters:
        base = json.dumps(subject.base.partition("@")[0])
        code = (
            "from peft import AutoPeftModelForCausalLM\n"
            "from transformers import AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({base})\n"
            f"model = AutoPeftModelForCausalLM.from_pretrained({name})"
        )
    else:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({name})\n"
            f"model = AutoModelForCausalLM.from_pretrained({name})"
        )
    command = f'llamax generate {subject.name.repo} --prompt "..."'
    return f"```python\n{code}\n```\n\n```sh\n{command}\n```"


def _data(config: Config, datasets: list[HubName]) -> str:
    if not datasets:
        names = (f"`{Path(part).name}`" for part in datasets_in(config.data.path))
        return f"Prepared from local files: {', '.join(names)}."
    return "\n".join(
        f"* [{name.repo}](https://huggingface.co/{name.page}), commit `{name.revision}`"
        for name in datasets
    )


def _settings(config: Config) -> Iterator[tuple[str, str]]:
    for section, names in SETTINGS.items():
        values = getattr(config, section)
        if section == "finetune" and values.method == "full":
            names = ("method",)
        for name in names:
            yield f"{section}.{name}", str(getattr(values, name))


def _losses(records: list[Record]) -> Iterator[tuple[str, str]]:
    last = records[-1]
    yield "steps", f"{last.step:,}"
    yield "tokens", f"{last.consumed_tokens:,}"
    yield "training loss at the end", f"{last.loss:.4f}"
    held_out = [r for r in records if r.validation_loss is not None]
    if held_out:
        best = min(held_out, key=lambda r: _sortable(r.validation_loss))
        for label, record in (("at the end", held_out[-1]), (f"best, step {best.step:,}", best)):
            loss = record.validation_loss or 0.0
            yield f"validation loss, {label}", f"{loss:.4f} (perplexity {perplexity(loss):.4g})"


def _sortable(loss: float | None) -> float:
    return math.inf if loss is None or math.isnan(loss) else loss


def _table(rows: Iterator[tuple[str, str]]) -> str:
    lines = [f"| {label} | {value} |" for label, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])
