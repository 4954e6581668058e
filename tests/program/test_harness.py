"""lm-evaluation-harness on a local task: the numbers of its own Hugging Face model."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from instruction import llama2_tokenizer, write_rows

from llamax.config import Model
from llamax.data.export import export
from llamax.data.tokenizer import load_tokenizer

lm_eval = pytest.importorskip("lm_eval")

MODEL = Model(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=600,
    max_position_embeddings=64,
    initializer_range=0.5,
    bos_token_id=1,
    eos_token_id=2,
)
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


def test_the_harness_finds_what_it_finds_with_transformers(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from llamax.harness import Harness

    hub = tmp_path / "hub"
    transformers.set_seed(0)
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL.to_hub("float32")))
    reference.save_pretrained(hub)
    export(load_tokenizer(llama2_tokenizer(tmp_path)), hub, 64)
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
    rolling = tasks / "own_rolling.yaml"
    rolling.write_text(
        TASK.format(name="own_rolling", rows=rows, kind="loglikelihood_rolling",
                    target='"{{question}}"', more=PERPLEXITY).replace(
            'doc_to_text: "Question: {{question}}\\nAnswer:"', 'doc_to_text: ""')
    )  # fmt: skip
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = HFLM(pretrained=reference, tokenizer=transformers.AutoTokenizer.from_pretrained(hub),
                  batch_size=1, max_length=64, add_bos_token=True)  # fmt: skip
    found = []
    for model in (Harness(hub, batch=5), theirs):
        said = lm_eval.simple_evaluate(
            model=model, tasks=[*kinds, "own_rolling"], task_manager=manager, bootstrap_iters=0,
            log_samples=True,
        )  # fmt: skip
        samples = said["samples"]
        found.append(
            {
                "acc": said["results"]["own_choice"]["acc,none"],
                "bits": said["results"]["own_rolling"]["bits_per_byte,none"],
                "likely": [one["resps"] for one in samples["own_choice"]],
                "texts": [one["resps"] for one in samples["own_until"]],
            }
        )
    mine, other = found
    assert mine["acc"] == other["acc"]
    assert mine["bits"] == pytest.approx(other["bits"], rel=1e-4)
    assert mine["texts"] == other["texts"]
    for one, two in zip(mine["likely"], other["likely"], strict=True):
        for ((a, b),), ((c, d),) in zip(one, two, strict=True):
            assert float(a) == pytest.approx(float(c), rel=1e-4)
            assert bool(b) == bool(d)
