"""The example notebooks: made of their scripts, and executed cell by cell at a tiny size."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.corpora import python_sources
from support.instruction import llama2_tokenizer, write_rows

FOLDER = Path(__file__).resolve().parents[2] / "examples/notebooks"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.stem != "convert")
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY: dict[str, Any] = {
    "parallel.tensor": 1,
    "optim.lr": 1e-2,
    "optim.warmup_ratio": 0,
    "data.sequence_length": 128,
    "data.global_batch": 4,
    "data.micro_batch": 2,
    "run.epochs": 0,
    "run.steps": 6,
    "run.backend": "cpu",
    "run.dtype": "float32",
    "run.threads": 1,
    "run.tensorboard": False,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer in a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("base")
    llama2_tokenizer(folder)
    transformers.set_seed(0)
    shape = transformers.LlamaConfig(**SHAPE, vocab_size=600)
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def rows(folder: Path) -> dict[str, str]:
    """What the notebooks read, in the shape of the real rows."""
    dolly = [
        {"instruction": f"What follows {i % 9}?", "context": "", "response": f"{i % 9 + 1}."}
        for i in range(40)
    ]
    news = [
        {"title": f"{i}", "document": f"Price {i % 7} rose. " * 3, "summary": f"Price {i % 7}."}
        for i in range(40)
    ]
    chat = [{"text": f"<usr> {i % 9} 다음은?\n<bot> {i % 9 + 1}입니다"} for i in range(300)]
    (folder / "text").mkdir()
    for number, text in enumerate(python_sources(3)):
        (folder / "text" / f"{number}.txt").write_text(text[:4000])
    return {
        "dolly": str(write_rows(folder / "dolly.jsonl", dolly)),
        "news": str(write_rows(folder / "news.jsonl", news)),
        "korean_chat": str(write_rows(folder / "chat.jsonl", chat)),
        "pretrain": str(folder / "text"),
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_runs(
    script: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found = rows(tmp_path)[script.stem]
    names: dict[str, Any] = {}
    cells = json.loads(script.with_suffix(".ipynb").read_text())["cells"]
    first, *others = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    exec("".join(first), names)
    changes = {**TINY}
    if script.stem == "pretrain":
        changes |= {f"model.{name}": value for name, value in SHAPE.items()}
        changes |= {"model.vocab_size": 600, "optim.warmup_steps": 0}
        del changes["optim.warmup_ratio"]
    replaced: dict[str, Any] = {
        "BASE": str(base),
        "TOKENIZER": str(base),
        "ROWS": found,
        "TEXT": found,
        "TEST": found,
        "CHANGES": changes,
        "RANKS": 0,
        "TOKENS": 3,
    }
    names |= {name: value for name, value in replaced.items() if name in names}
    for source in others:
        exec("".join(source), names)
    assert names["run"].step == 6
    assert capsys.readouterr().out


def test_notebooks_are_those_of_their_scripts() -> None:
    spec = importlib.util.spec_from_file_location("convert", FOLDER / "convert.py")
    assert spec is not None
    assert spec.loader is not None
    convert = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(convert)
    readme = (FOLDER / "README.md").read_text()
    for script in SCRIPTS:
        written = script.with_suffix(".ipynb").read_text()
        assert written == convert.notebook(script.read_text()), "run convert.py"
        assert f"[{script.stem}]({script.stem}.ipynb)" in readme
        ids = [cell["id"] for cell in json.loads(written)["cells"]]
        assert len({*ids}) == len(ids)
