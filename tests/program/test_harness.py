"""lm-evaluation-harness on a local task: the numbers of its own Hugging Face model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from support.instruction import llama2_tokenizer, write_rows
from support.models import DECIDED
from support.tokenizer_kinds import kinds, write_kind

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
fewshot_split: test
fewshot_config:
  sampler: first_n
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


KINDS = {
    "own_choice": ("multiple_choice", "answer", CHOICE),
    "own_until": ("generate_until", '"{{choices[answer]}}"', UNTIL),
    "own_prefix": ("generate_until", '"{{choices[answer]}}"', f'gen_prefix: "It is "\n{UNTIL}'),
    "own_rolling": ("loglikelihood_rolling", '"{{question}}"', PERPLEXITY),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tasks above over a small table."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    table = [
        {"question": f"What is {i}? " * (i + 1), "choices": ["one", "self.x", "a river"]}
        | {"answer": i % 3}
        for i in range(6)
    ]
    rows = write_rows(folder / "rows.jsonl", table)
    for name, (kind, target, more) in KINDS.items():
        text = TASK.format(name=name, rows=rows, kind=kind, target=target, more=more)
        if kind == "loglikelihood_rolling":
            before, _, after = text.partition("doc_to_text: ")
            text = f'{before}doc_to_text: ""\n{after.partition(chr(10))[2]}'
        (folder / f"{name}.yaml").write_text(text)
    return TaskManager(include_path=str(folder), include_defaults=False)


def tiny(folder: Path, kind: str, spare: int = 0) -> Path:
    """A folder with a model and a kind of tokenizer; ``spare``: ids that no token has."""
    engine = write_kind(kind, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    ids = {key: engine.token_to_id(config.get(key, "")) for key in ("bos_token", "eos_token")}
    fields = MODEL.to_hub("float32") | {f"{key}_id": number for key, number in ids.items()}
    fields |= {"vocab_size": max(engine.get_vocab().values()) + 1 + spare}
    fields |= {"tie_word_embeddings": bool(spare), "initializer_range": 0.3}
    transformers.set_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).save_pretrained(folder)
    return folder


def judge(folder: Path, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=1, **options)


def assert_same(one: Any, two: Any) -> None:
    """Texts are equal, numbers nearly."""
    if isinstance(two, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    elif isinstance(two, float):
        assert one == pytest.approx(two, rel=1e-4)
    else:
        assert one == two


@pytest.mark.parametrize("kind", [*kinds(), "exported"])
def test_every_request_is_answered_as_by_its_own_class(
    hub: Path, tmp_path: Path, kind: str
) -> None:
    from llamax.inference.lm_eval import Harness

    if kind != "exported":
        hub = tiny(tmp_path, kind, spare=13 if "first" in kind or "no BOS" in kind else 0)
    pairs = [("", "The Elbe"), ("The Elbe is", " a"), ("Name  ", "a river"), ("x " * 90, " one")]
    pairs += [("Größe\n", "水"), ("The<|im_end|>", " two"), ("a", " river"), ("a", " river one")]
    long = {"max_gen_toks": 30}
    prompts: list[tuple[str, dict[str, Any]]] = [
        ("The Elbe", {"until": ["e", "\n\n"], **long}),
        ("Name a", {"until": "<|im_end|>", **long}),
        ("x " * 90, {"until": [], "max_new_tokens": 12, "temperature": 0.0}),
        ("one", {"until": [" a", ". "], "do_sample": False, "temperature": 0.5, **long}),
    ]
    texts = [("a",), ("The river. " * 40,), ("import os\n" * 60,)]
    for options in ({}, {"add_bos_token": True}, {"add_bos_token": False}, {"prefix_token_id": 5}):
        ours, theirs = Harness(hub, 3, **options), judge(hub, **options)
        assert ours.prefix_token_id == theirs.prefix_token_id
        for name, requests in (
            ("loglikelihood", [] if "EOS added" in kind else pairs),
            ("loglikelihood_rolling", texts),
            ("generate_until", prompts),
        ):
            asks = [asked(*request) for request in requests]
            assert_same(getattr(ours, name)(asks), getattr(theirs, name)(asks))


@pytest.mark.parametrize("kind", ["bytes", "bytes, no system text", "metaspace, first"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_fewshot": 2},
        {"apply_chat_template": True, "system_instruction": "Be brief. "},
        {"apply_chat_template": True, "num_fewshot": 2, "fewshot_as_multiturn": True},
        {"apply_chat_template": True, "num_fewshot": 1, "fewshot_as_multiturn": False},
    ],
    ids=str,
)
def test_tasks_have_the_results_of_its_own_class(
    tasks: Any, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    from llamax.inference.lm_eval import Harness

    hub = tiny(tmp_path, kind)
    names = [name for name in KINDS if not options or name != "own_rolling"]
    one, two = (
        lm_eval.simple_evaluate(
            model=model, tasks=names, task_manager=tasks, bootstrap_iters=0, **options
        )
        for model in (Harness(hub, batch=5), judge(hub))
    )
    for name in names:
        for a, b in zip(one["samples"][name], two["samples"][name], strict=True):
            assert a["arguments"] == b["arguments"]
            assert_same(a["resps"], b["resps"])
        for key, value in two["results"][name].items():
            assert_same(one["results"][name][key], value)


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
    with pytest.raises(ConfigError, match="num_beams=4 is not supported"):
        together.generate_until([asked("def", {"num_beams": 4, "max_gen_toks": 9})])
    unchanged = {"num_beams": 1, "repetition_penalty": 1.0, "min_p": None, **short}
    assert together.generate_until([asked("def", unchanged)]) == answers[:1]
    warm = [asked("def", {"temperature": 1.0, "max_gen_toks": 9}) for _ in range(2)]
    assert len({*together.generate_until(warm), answers[0]}) == 3, "a temperature alone draws"
    assert together.loglikelihood_rolling([asked("")]) == pytest.approx([-7.0], abs=7.0)
