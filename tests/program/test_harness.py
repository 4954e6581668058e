"""lm-evaluation-harness on a local task: the numbers of its own Hugging Face model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from support.instruction import llama2_tokenizer, write_rows
from support.models import DECIDED

from llamax.data.tokenizer.hf_export import export_tokenizer
from llamax.data.tokenizer.tokenizer import load_tokenizer
from llamax.runtime.errors import ConfigError

lm_eval = pytest.importorskip("lm_eval")

MODEL = replace(DECIDED, max_position_embeddings=64)  # shorter than some of the questions
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: {kind}
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: {target}
{more}
"""
CHOICE = """doc_to_choice: choices
metric_list:
  - metric: acc"""
PERPLEXITY = """metric_list:
  - metric: bits_per_byte"""
UNTIL = """generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL.to_hub("float32")))
    model.save_pretrained(folder / "hub")
    export_tokenizer(load_tokenizer(llama2_tokenizer(folder)), folder / "hub", 64)
    return folder / "hub"


def test_the_harness_finds_what_it_finds_with_transformers(hub: Path, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from llamax.inference.lm_eval import Harness

    reference = transformers.LlamaForCausalLM.from_pretrained(hub)
    table = [
        {"question": f"What is {i}?", "choices": ["one", "self.x", "def"], "answer": i % 3}
        for i in range(12)
    ]
    rows = write_rows(tmp_path / "rows.jsonl", table)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    kinds = {
        "own_choice": ("multiple_choice", "answer", CHOICE),
        "own_until": ("generate_until", '"{{choices[answer]}}"', UNTIL),
    }
    for name, (kind, target, more) in kinds.items():
        text = TASK.format(name=name, rows=rows, kind=kind, target=target, more=more)
        (tasks / f"{name}.yaml").write_text(text)
    (tasks / "own_rolling.yaml").write_text(
        TASK.format(name="own_rolling", rows=rows, kind="loglikelihood_rolling",
                    target='"{{question}}"', more=PERPLEXITY).replace(
            'doc_to_text: "Question: {{question}}\\nAnswer:"', 'doc_to_text: ""')
    )  # fmt: skip
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub)

    def theirs(bos: bool) -> Any:
        return HFLM(reference, tokenizer=tokenizer, batch_size=1, max_length=64, add_bos_token=bos)

    def said(model: Any, *names: str) -> Any:
        return lm_eval.simple_evaluate(
            model=model, tasks=list(names), task_manager=manager, bootstrap_iters=0
        )

    ours = said(Harness(hub, batch=5), *kinds, "own_rolling")
    other = said(theirs(True), *kinds)
    results = ours["results"]
    assert results["own_choice"]["acc,none"] == other["results"]["own_choice"]["acc,none"]
    for name in kinds:
        for one, two in zip(ours["samples"][name], other["samples"][name], strict=True):
            if name == "own_until":
                # Theirs loses a space before an answer; runs of stray bytes are told differently.
                mine, its = (each["resps"][0][0].strip().split("��")[0] for each in (one, two))
                assert mine == its
                continue
            for ((a, b),), ((c, d),) in zip(one["resps"], two["resps"], strict=True):
                assert float(a) == pytest.approx(float(c), rel=1e-4)
                assert bool(b) == bool(d)
    rolling = said(theirs(True), "own_rolling")["results"]["own_rolling"]
    assert results["own_rolling"]["bits_per_byte,none"] == pytest.approx(
        rolling["bits_per_byte,none"], rel=1e-4
    )
    text = "import os\n" * 60  # longer than the context
    ((one,), (two,)) = (
        model.loglikelihood_rolling([asked(text)]) for model in (Harness(hub), theirs(True))
    )
    assert one == pytest.approx(two, rel=1e-4)


def asked(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_batches_options_and_edges_of_requests(hub: Path) -> None:
    from llamax.inference.lm_eval import Harness

    alone, together = Harness(hub, batch=1), Harness(hub, batch=4)
    short, drawn = {"until": "e", "max_gen_toks": 9}, {"do_sample": True, "max_gen_toks": 9}
    texts = ["def", "import os", "x" * 300, "", "self.", "class A:"]
    said = [asked(text, short) for text in texts] + [asked("def", drawn), asked("def", drawn)]
    answers = together.generate_until(said)
    assert answers == alone.generate_until(said)
    assert not any("e" in answer for answer in answers[:6])
    assert len({answers[0], *answers[6:]}) == 3, "two draws and a greedy answer"
    pairs = [asked("", "def"), asked("import", ""), asked("x" * 300, "y" * 300)]
    scores, singly = together.loglikelihood(pairs), alone.loglikelihood(pairs)
    for mine, other in zip(scores, singly, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    assert scores[1] == (0.0, True), "nothing is certain"
    for most in (0, 64):
        with pytest.raises(ConfigError, match=f"max_gen_toks={most} leaves no room"):
            together.generate_until([asked("def", {"max_gen_toks": most})])
