"""Tokenizers, templates, datasets and tables to change, and what reads them."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from llamax.data.chat.jinja_sandbox import Program
from llamax.data.chat.template_source import source_of
from llamax.data.chat.templates import BUILT_IN, Template, make_sample
from llamax.data.dataset import open_dataset
from llamax.data.prepare import text_files
from llamax.data.prepare.instruction_rows import InstructSettings, RowChunk, training_texts
from llamax.data.prepare.saved_dataset import held_out
from llamax.data.prepare.tables import plan_tables
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.inference.prompts import read_prompts
from llamax.runtime.text import printable
from llamax.tools.inspect.description import describe, table
from support import megatron, tiny_run
from support.corpora import python_sources, train_unlike_llama
from support.fuzzing import shown
from support.packed import PACK

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


@lru_cache(maxsize=1)
def tokenizers() -> dict[str, bytes]:
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


def tokenizer(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(tokenizers()[name])
        decoder = {"0": {"content": "<s>", "special": True, "lstrip": False}}
        config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
        config |= {"chat_template": TEMPLATE, "extra_special_tokens": ["<s>"]}
        if name == "tokenizer.json":
            config["added_tokens_decoder"] = decoder
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
        (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 600}))

    return make


def read_tokenizer(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        tokenizer = load_tokenizer(folder / name)
        ids = tokenizer.encode("A text, 안녕\n")
        tokenizer.decode(ids)
        tokenizer.encode_documents(["one", "<s>two</s>"])
        tokenizer.encode_after(["three"])
        tokenizer.speed_up()
        tokenizer.encode_documents(["one", "<s>two</s> 안녕"])

    return read


def template(folder: Path) -> None:
    (folder / "chat.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def read_template(folder: Path) -> None:
    for path in (folder / "chat.jinja", folder / "tokenizer_config.json"):
        source = source_of(str(path))
        template = Template(str(path), source)
        template.spans(make_sample("What?", "", "That."))
        template.prompt(make_sample("What?"))
        Program(source, str(path)).render({"messages": CHATS[0]["messages"], "x": [1]})


# ---- data


def datasets(folder: Path) -> None:
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


def read_datasets(folder: Path) -> None:
    for path in (folder / "own", folder / "indexed"):
        dataset = open_dataset(path)
        dataset.verify()
        dataset.check_vocabulary(61)
        shown(table([*describe(path, True)]))


def tables_of_rows(folder: Path) -> None:
    texts = "".join(f"{json.dumps(row)}\n" for row in ROWS)
    (folder / "rows.jsonl").write_text(texts)
    (folder / "rows.json").write_text(json.dumps({"data": ROWS}))
    (folder / "chats.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in CHATS))
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        with open(folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, [*ROWS[0]], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)


def parquet(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")


def arrow(folder: Path) -> None:
    """Arrow as a stream, as a file and as Feather."""
    pyarrow = pytest.importorskip("pyarrow")
    feather = pytest.importorskip("pyarrow.feather")
    rows = pyarrow.Table.from_pylist(ROWS)
    for name, open_writer in (("a", pyarrow.ipc.new_stream), ("b", pyarrow.ipc.new_file)):
        with open_writer(str(folder / f"{name}.arrow"), rows.schema) as writer:
            writer.write_table(rows)
    for compression in ("lz4", "uncompressed"):
        feather.write_feather(rows, str(folder / f"{compression}.feather"), compression)


def saved_dataset(folder: Path) -> None:
    """A DatasetDict as ``datasets`` saves it."""
    saved = folder / "saved"
    for split in ("train", "validation"):
        (saved / split).mkdir(parents=True)
        arrow(saved / split)
        state = {"_data_files": [{"filename": "a.arrow"}], "_split": split, "_format_type": None}
        (saved / split / "state.json").write_text(json.dumps(state))
        (saved / split / "dataset_info.json").write_text("{}")
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))


def read_saved_dataset(folder: Path) -> None:
    held_out([folder / "saved"], "validation")
    for rows in plan_tables([str(folder / "saved")]):
        settings = InstructSettings("", "name", BUILT_IN["dolly"])
        list(training_texts(RowChunk(rows, "train"), settings))
    for chunk in text_files.plan([folder / "saved"]):
        list(text_files.documents(chunk, "text"))


def packed(folder: Path) -> None:
    texts = "".join(f"{json.dumps(row)}\n" for row in ROWS)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(texts.encode()))
    for name, pack in PACK.items():
        (folder / f"a.txt{name}").write_bytes(pack(b"A text of some words.\n" * 50))


def texts(folder: Path) -> None:
    (folder / "a.txt").write_text("A text, 안녕\n\nof some words.\r\n" * 50)


def read_texts(folder: Path) -> None:
    for chunk in text_files.plan([*sorted(folder.iterdir())]):
        list(text_files.documents(chunk, "text"))


def read_tables(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        source = BUILT_IN["llama2-chat" if path.stem == "chats" else "dolly"]
        for rows in plan_tables([str(path)]):
            list(training_texts(RowChunk(rows, "train"), InstructSettings("", "name", source)))
        if path.stem != "chats":
            for chunk in text_files.plan([path]):
                list(text_files.documents(chunk, "text"))
        read_prompts([], path)


def prompts(folder: Path) -> None:
    (folder / "a.txt").write_text("one\n\ntwo 안녕\n")
    (folder / "rows.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    (folder / "rows.json").write_text('[{"prompt": "one"}, {"prompt": "two"}]')


def read_prompt_files(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        for place, row in read_prompts((), path):
            printable(f"{place} {row}")
