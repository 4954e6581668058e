"""Every parser of files: a folder of sound files, which of them is changed, and what reads them."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import pickle
import random
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import support.checkpoints as worlds
from llamax.checkpoint import Checkpoint, hf_folder
from llamax.checkpoint.formats import convert, torch_pickle
from llamax.checkpoint.manifest import read_manifest
from llamax.checkpoint.peft import PeftFolder
from llamax.checkpoint.safetensors_io import read_header, read_metadata
from llamax.config.hardware import load_machine
from llamax.config.load import dump_config, load_config
from llamax.config.model import ModelConfig
from llamax.config.toml import to_toml
from llamax.data.chat.jinja_sandbox import Program
from llamax.data.chat.templates import BUILT_IN, Template, make_sample, source_of
from llamax.data.dataset import open_dataset
from llamax.data.prepare import text_files
from llamax.data.prepare.instruction_rows import InstructSettings, RowChunk, training_texts
from llamax.data.prepare.tables import plan_tables
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.inference.prompts import read_prompts
from llamax.inference.sampling import sampling_of
from llamax.launch import jobfile
from llamax.launch.checks import problems
from llamax.launch.render import PHASES, action, render
from llamax.runtime.text import UNSAFE
from llamax.tools.doctor.storage import _read_beacons
from llamax.tools.inspect import describe, table
from llamax.tools.monitor.html_report import page
from llamax.tools.monitor.run_folder import read_run
from llamax.tools.monitor.watch import render as lines_of
from support import foreign, foreign_megatron, foreign_nnm, megatron, tiny_run
from support.corpora import python_sources, train_unlike_llama
from support.fuzzing import change_bytes, change_json, change_toml
from support.launch_jobs import tables
from support.run_folders import make_run

MODEL = worlds.llama(kv=2, vocabulary=40)
ROWS = [
    {"instruction": f"Question {n}?", "context": "", "response": f"Answer {n}.", "text": "Text"}
    for n in range(4)
]
CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
]
TEMPLATE = """{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}
{{ raise_exception('role ' ~ m.role) }}{% endif %}<|{{ m['role'] }}|>{{ m.content | trim }}
{% endfor %}
{% set all = messages | tojson %}
{% if add_generation_prompt and all %}<|assistant|>{% endif %}"""

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


def shown(text: str) -> None:
    """Assert that a text for a terminal has no character that a terminal obeys."""
    assert not UNSAFE.search(text.replace("\n", "")), f"{text!r:.300}"


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

    write(tables(), "")
    (folder / "job.toml").write_text("\n".join(lines) + "\n")


def _read_job(folder: Path) -> None:
    job = jobfile.load(folder / "job.toml")
    for launcher, phases in PHASES.items():
        for phase in phases:
            if problems(job, launcher, phase):
                continue
            shown(render(job, launcher, phase).replace("\t", ""))
            if phase != "image":
                action(job, launcher, phase, "stop")


def _machine(folder: Path) -> None:
    table = '[mine]\nlike = "trn1.32xlarge"\nranks = 2\nalso = ["this"]\nlink_gbps = 1.5\n'
    (folder / "machine.toml").write_text(table + 'description = "a node"\nmemory_gib = 8\n')


# ---- checkpoints


def _checkpoint(folder: Path) -> None:
    worlds.save(folder, MODEL, worlds.world(MODEL, 2, 1, True, worlds.wholes(MODEL)))


def _read_manifest(folder: Path) -> None:
    (step,) = folder.glob("step-*")
    path = step / "manifest.json"
    with suppress(ValueError, RecursionError):  # a changed index counts as the one that was saved
        manifest = json.loads(path.read_bytes())
        if isinstance(manifest, dict) and "index_sha256" in manifest:
            index = hashlib.sha256((step / "index.bin").read_bytes()).hexdigest()
            path.write_text(json.dumps(manifest | {"index_sha256": index}))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (step / "done").write_text(digest + "\n")
    Checkpoint(step, verify=False)
    shown(table([*describe(step)]))


def _hf(folder: Path) -> None:
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


def _read_hf(folder: Path) -> None:
    source = hf_folder.HfFolder(folder)
    ModelConfig.from_hub(source.model)
    for name in source.names():
        source.read(name)
    shown(table([*describe(folder)]))
    sampling_of(hf_folder.read_json(folder / "generation_config.json"))


def _adapter(folder: Path) -> None:
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


def _read_adapter(folder: Path) -> None:
    PeftFolder(folder)
    shown(table([*describe(folder)]))


def _read_safetensors(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    read_header(path)
    read_metadata(path)


def _pickle(folder: Path) -> None:
    state = {"step": 1, "names": ["a", ("b", 2)], "nested": {"x": [None, True, 1.5, b"c"]}}
    (folder / "data.pkl").write_bytes(pickle.dumps(state, 2))


def _read_pickle(folder: Path) -> None:
    torch_pickle.read_pickle((folder / "data.pkl").read_bytes(), "data.pkl")


def _foreign(kind: str) -> Callable[[Path], None]:
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


def _read_foreign(folder: Path) -> None:
    source = convert.open_folder(folder / "in", "auto", str(folder / "given.json"))
    for name in [*source.shapes][:4]:
        source.read(name)


# ---- tokenizers and templates


@lru_cache(maxsize=1)
def _tokenizers() -> dict[str, bytes]:
    """Small tokenizers of the three kinds, by file name."""
    import tokenizers

    model = train_unlike_llama(Path(mkdtemp())).read_bytes()
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(python_sources(3), trainer)
    lines = [base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)]
    return {
        "tokenizer.model": model,
        "tokenizer.json": engine.to_str().encode(),
        "ranks.model": b"".join(lines),
    }


def _tokenizer(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(_tokenizers()[name])
        decoder = {"0": {"content": "<s>", "special": True, "lstrip": False}}
        config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
        config |= {"chat_template": TEMPLATE, "extra_special_tokens": ["<s>"]}
        if name == "tokenizer.json":
            config["added_tokens_decoder"] = decoder
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
        (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 600}))

    return make


def _read_tokenizer(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        tokenizer = load_tokenizer(folder / name)
        ids = tokenizer.encode("A text, 안녕\n")
        tokenizer.decode(ids)
        tokenizer.encode_documents(["one", "<s>two</s>"])
        tokenizer.encode_after(["three"])

    return read


def _template(folder: Path) -> None:
    (folder / "chat.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def _read_template(folder: Path) -> None:
    for path in (folder / "chat.jinja", folder / "tokenizer_config.json"):
        source = source_of(str(path))
        template = Template(str(path), source)
        template.spans(make_sample("What?", "", "That."))
        template.prompt(make_sample("What?"))
        Program(source, str(path)).render({"messages": CHATS[0]["messages"], "x": [1]})


# ---- data


def _datasets(folder: Path) -> None:
    (folder / "own").mkdir()
    tiny_run.make_dataset(folder / "own")
    indexed = folder / "indexed"
    indexed.mkdir()
    (indexed / "tokenizer.model").write_bytes(b"a tokenizer")
    digest = hashlib.sha256(b"a tokenizer").hexdigest()
    index = {"tokenizer_file": "tokenizer.model", "tokenizer": digest, "key": "text"}
    index |= {"indexed": {"vocab_size": 61, "bos_id": 1, "eos_id": None}, "unread": {"a": 1}}
    (indexed / "dataset.json").write_text(json.dumps(index))
    megatron.write_dataset(indexed / "train_text_document", [[1, 2, 3], [4], [5, 6]])


def _read_datasets(folder: Path) -> None:
    for path in (folder / "own", folder / "indexed"):
        dataset = open_dataset(path)
        dataset.verify()
        dataset.check_vocabulary(61)
        shown(table([*describe(path, True)]))


def _tables(folder: Path) -> None:
    texts = "".join(f"{json.dumps(row)}\n" for row in ROWS)
    (folder / "rows.jsonl").write_text(texts)
    (folder / "rows.json").write_text(json.dumps({"data": ROWS}))
    (folder / "chats.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in CHATS))
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        with open(folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, [*ROWS[0]], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)


def _parquet(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")


def _read_tables(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        source = BUILT_IN["llama2-chat" if path.stem == "chats" else "dolly"]
        for rows in plan_tables([str(path)]):
            list(training_texts(RowChunk(rows, "train"), InstructSettings("", "name", source)))
        if path.stem != "chats":
            for chunk in text_files.plan([path]):
                list(text_files.documents(chunk, "text"))
        read_prompts([], path)


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


def _beacons(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps({"node": "a", "time": 1.0}))


J, B, T = change_json, change_bytes, change_toml
IN = "in/**/*.*"
TARGETS = [
    Target("configurations", _config, {"run.toml": T}, lambda f: load_config(str(f / "run.toml"))),
    Target("job files", _job, {"job.toml": T}, _read_job),
    Target(
        "machines", _machine, {"machine.toml": T}, lambda f: load_machine(str(f / "machine.toml"))
    ),
    Target(
        "manifests",
        _checkpoint,
        {"step-*/manifest.json": J, "step-*/index.bin": B, "step-*/config.toml": B},
        _read_manifest,
    ),
    Target(
        "checkpoint files",
        _checkpoint,
        {"step-*/*": B},
        lambda f: [read_manifest(s) for s in f.glob("step-*")],
    ),
    Target("Hugging Face folders", _hf, {"*.json": J, "*.safetensors": B}, _read_hf),
    Target("safetensors headers", _hf, {"model-00001*": B}, _read_safetensors),
    Target("adapters", _adapter, {"*.json": J, "*.safetensors": B}, _read_adapter),
    Target("pickles", _pickle, {"data.pkl": B}, _read_pickle),
    *(
        Target(f"{kind} checkpoints", _foreign(kind), {IN: B}, _read_foreign)
        for kind in ("nxd", "nxd-xser", "optimum", "nemo", "nnm", "meta")
    ),
    *(
        Target(
            f"tokenizers {name}",
            _tokenizer(name),
            {name: J if name.endswith("json") else B, "*_*.json": J},
            _read_tokenizer(name),
        )
        for name in ("tokenizer.json", "tokenizer.model", "ranks.model")
    ),
    Target(
        "chat templates", _template, {"chat.jinja": B, "tokenizer_config.json": J}, _read_template
    ),
    Target(
        "datasets",
        _datasets,
        {"*/dataset.json": J, "own/*.tokens": B, "indexed/*.idx": B, "indexed/*.bin": B},
        _read_datasets,
    ),
    Target("rows", _tables, {"*.json*": J, "*.csv": B, "*.tsv": B}, _read_tables),
    Target("Parquet", _parquet, {"*.parquet": B}, _read_tables),
    Target(
        "runs",
        _run,
        {"run/heartbeats/*": J, "run/*.jsonl": J, "run/*.json": J, "run/config.toml": T},
        _read_run,
    ),
    Target("beacons", _beacons, {"a.json": J}, lambda f: list(_read_beacons(f, "b"))),
]
