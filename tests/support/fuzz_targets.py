"""Every parser of files: a folder of sound files, which of them is changed, and what reads them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llamax.checkpoint.manifest import read_manifest
from llamax.config.hardware import load_machine
from llamax.config.load import dump_config, load_config
from llamax.config.toml import to_toml
from llamax.launch import cluster, jobfile
from llamax.launch.checks import problems
from llamax.launch.render import PHASES, action, render
from llamax.runtime.hub_files import PROMPT_JSON
from llamax.tools.doctor.storage import _read_beacons
from llamax.tools.monitor.columns import read_columns
from llamax.tools.monitor.html_report import page
from llamax.tools.monitor.live_log import LiveLog
from llamax.tools.monitor.run_folder import COLUMNS, read_run
from llamax.tools.monitor.watch import render as lines_of
from support import fuzz_checkpoints as models
from support import fuzz_data as data
from support import fuzz_shared as shared
from support.fuzz_serving import answer, requests
from support.fuzzing import change_bytes, change_json, change_toml, shown
from support.launch_jobs import tables
from support.run_folders import make_run

FIGURES: dict[str, object] = {
    "backend": "cuda",
    "ranks": 4,
    "memory_gib": 80.0,
    "bfloat16_tflops": 900.0,
    "float32_tflops": 60.0,
    "memory_gbps": 3000.0,
    "link_gbps": 400.0,
    "dollars_per_hour": 10.0,
}

Change = Callable[[bytes, random.Random], bytes]


class Target(NamedTuple):
    """A parser: ``make`` fills a folder, ``changes`` are the files to change in it, ``read`` reads.

    ``read`` raises LlamaxError for a mistake, and no other exception.
    """

    name: str
    make: Callable[[Path], object]
    changes: dict[str, Change]
    read: Callable[[Path], object]

    def change(self, folder: Path, chance: random.Random) -> str:
        """Change one file in a folder; its name."""
        pattern, change = chance.choice([*self.changes.items()])
        path = chance.choice([p for p in sorted(folder.glob(pattern)) if p.is_file()])
        path.write_bytes(change(path.read_bytes(), chance))
        return str(path.relative_to(folder))


# ---- what is written by hand: configurations, job files, machines


def _config(folder: Path) -> None:
    (folder / "run.toml").write_text(dump_config(load_config("demo")))


def _job(folder: Path) -> None:
    lines = []

    def write(table: dict[str, object], prefix: str) -> None:
        plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
        lines.extend([f"[{prefix}]"] if prefix else [])
        for key, value in plain.items():
            lines.append(f"{key} = {to_toml(tuple(value) if isinstance(value, list) else value)}")
        for key, value in table.items():
            if isinstance(value, dict):
                write(value, f"{prefix}.{key}" if prefix else key)

    fields = {"instruction": "question", "answer": "reply"}
    rows = {"template": "alpaca", "split": "train[:10%]", "limit": 5, "fields": fields}
    rows |= {"validation_files": ["v.jsonl"], "max_document": "2GB", "bos": False, "workers": 2}
    secrets = {"WANDB_API_KEY": "/root/key"}
    write(tables(secrets=secrets, prepare={**tables()["prepare"], **rows}), "")
    (folder / "job.toml").write_text("\n".join(lines) + "\n")


def _read_job(folder: Path) -> None:
    job = jobfile.load(folder / "job.toml")
    for launcher, phases in PHASES.items():
        for phase in phases:
            if problems(job, launcher, phase):
                continue
            shown(render(job, launcher, phase).replace("\t", ""))
            if phase == "cluster":
                for what in cluster.actions(launcher)[1:]:
                    action(job, launcher, phase, what)
            elif phase != "image":
                action(job, launcher, phase, "stop")


def _machine(folder: Path) -> None:
    table = '[mine]\nlike = "trn1.32xlarge"\nranks = 2\nalso = ["this"]\nlink_gbps = 1.5\n'
    (folder / "machine.toml").write_text(table + 'description = "a node"\nmemory_gib = 8\n')
    whole = "\n".join(f"{key} = {to_toml(value)}" for key, value in FIGURES.items())
    other = f'[other]\n{whole}\n[third]\nlike = "h100"\ndollars_per_hour = 2.5\n'
    (folder / "machines.toml").write_text(other)


def _read_machine(folder: Path) -> None:
    load_machine(str(folder / "machine.toml"))
    for name in ("other", "third"):
        load_machine(f"{folder}/machines.toml:{name}")


# ---- runs


def _run(folder: Path) -> None:
    run = make_run(folder / "run", done=12, ranks=4)
    counters = {"neuroncores_in_use": {"0": {"neuroncore_utilization": 2.9}}}
    report = {"neuron_runtime_data": [{"report": {"neuroncore_counters": counters}}]}
    (run / "neuron-monitor-host.json").write_text(json.dumps(report) + "\n")


def _read_run(folder: Path) -> None:
    run = read_run(folder / "run")
    for line in (*lines_of(run), *lines_of(run, 40, price=2.0)):
        shown(line)
    page([run])
    read_columns(folder / "run" / "metrics.jsonl", COLUMNS)


def _follow(folder: Path) -> None:
    """Read a log that grows, is cut, and is written anew between two looks."""
    path = folder / "run" / "metrics.jsonl"
    whole, log = path.read_bytes(), LiveLog(path)
    for size in (len(whole) // 3, len(whole) // 2, len(whole), len(whole) // 4, len(whole)):
        path.write_bytes(whole[:size])
        log.read()


def _beacons(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps({"node": "a", "time": 1.0}))


J, B, T = change_json, change_bytes, change_toml
IN = "in/**/*.*"
TARGETS = [
    Target("configurations", _config, {"run.toml": T}, lambda f: load_config(str(f / "run.toml"))),
    Target("job files", _job, {"job.toml": T}, _read_job),
    Target("machines", _machine, {"machine*.toml": T}, _read_machine),
    Target(
        "manifests",
        models.checkpoint,
        {"step-*/manifest.json": J, "step-*/index.bin": B, "step-*/config.toml": B},
        models.read_checkpoint,
    ),
    Target(
        "checkpoint files",
        models.checkpoint,
        {"step-*/*": B},
        lambda f: [read_manifest(s) for s in f.glob("step-*")],
    ),
    Target(
        "Hugging Face folders",
        models.hf,
        {"*.json": J, "*.safetensors": B},
        models.read_hf,
    ),
    Target(
        "checkpoints of stages",
        models.checkpoint_of_stages,
        {"step-*/manifest.json": models.change_state},
        models.read_checkpoint,
    ),
    Target("notes of ranks", models.note, {"*.json": J}, models.read_notes),
    Target("prompt records", models.prompt, {PROMPT_JSON: J}, models.read_prompt),
    Target(
        "weights in 4 bits",
        models.quantized,
        {"*.json": J, "model-00002*": B},
        models.read_hf,
    ),
    Target(
        "safetensors headers",
        models.hf,
        {"model-00001*": B},
        models.read_safetensors,
    ),
    Target(
        "adapters",
        models.adapter,
        {"*.json": J, "*.safetensors": B},
        models.read_adapter,
    ),
    Target(
        "adapters in shards",
        models.adapter_shards,
        {"adapter_default/**/*.json": J, "adapter_default/**/*.pt": B},
        models.read_adapter,
    ),
    Target("pickles", models.pickled, {"data.pkl": B}, models.read_pickle),
    *(
        Target(
            f"{kind} checkpoints",
            models.foreign_checkpoint(kind),
            {IN: B},
            models.read_foreign,
        )
        for kind in ("nxd", "nxd-xser", "optimum", "nemo", "nnm", "meta")
    ),
    *(
        Target(
            f"tokenizers {name}",
            data.tokenizer(name),
            {name: J if name.endswith("json") else B, "*_*.json": J},
            data.read_tokenizer(name),
        )
        for name in ("tokenizer.json", "tokenizer.model", "ranks.model")
    ),
    Target(
        "chat templates",
        data.template,
        {"chat.jinja": B, "tokenizer_config.json": J},
        data.read_template,
    ),
    Target(
        "datasets",
        data.datasets,
        {"*/dataset.json": J, "own/*.tokens": B, "indexed/*.idx": B, "indexed/*.bin": B},
        data.read_datasets,
    ),
    Target("rows", data.tables_of_rows, {"*.json*": J, "*.csv": B, "*.tsv": B}, data.read_tables),
    Target("Parquet", data.parquet, {"*.parquet": B}, data.read_tables),
    Target("Arrow", data.arrow, {"*.*": B}, data.read_tables),
    Target(
        "saved datasets",
        data.saved_dataset,
        {"**/*.json": J, "**/a.arrow": B},
        data.read_saved_dataset,
    ),
    Target("packed files", data.packed, {"*.*": B}, data.read_texts),
    Target("texts", data.texts, {"a.txt": B}, data.read_texts),
    Target(
        "runs",
        _run,
        {"run/heartbeats/*": J, "run/*.jsonl": J, "run/*.json": J, "run/config.toml": T},
        _read_run,
    ),
    Target("followed logs", _run, {"run/metrics.jsonl": J}, _follow),
    Target("prompts", data.prompts, {"a.txt": B, "rows.*": J}, data.read_prompt_files),
    Target("requests", requests, {"*.json": J}, answer),
    Target(
        "cards and lists of the Hub",
        shared.hub,
        {"README.md": B, "dataset.json": J, "datasets--*/llamax/*.json": J},
        shared.read_hub,
    ),
    Target(
        "shared compile caches",
        shared.compile_cache,
        {"place/**/*.json": J, "local/**/*.json": J, "place/**/*": B},
        shared.read_compile_cache,
    ),
    Target("states of runs", shared.state, {"state.json": J}, shared.read_state),
    Target("beacons", _beacons, {"a.json": J}, lambda f: list(_read_beacons(f, "b"))),
]
