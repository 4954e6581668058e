"""The commands as functions of ``import llamax``: the same bytes, and errors in one line."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import save_file
from support.instruction import ROWS, llama2_tokenizer, write_rows

import llamax
from llamax.__main__ import dispatch
from llamax.checkpoint.merge import merge
from llamax.config.model import ModelConfig
from llamax.inference.generate import GenerationSettings
from llamax.runtime.errors import ConfigError, DataError, LlamaxError

MODEL = ModelConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=600,
    max_position_embeddings=128,
    initializer_range=0.5,
    bos_token_id=1,
    eos_token_id=2,
)


def test_names_are_imported_at_their_first_use() -> None:
    code = """
import sys
import llamax
heavy = [name for name in ("torch", "numpy", "pydantic", "argparse") if name in sys.modules]
assert not heavy, heavy
assert set(llamax.__all__) <= set(dir(llamax))
plan = llamax.plan
assert "torch" not in sys.modules
for name in llamax.__all__:
    if name != "audit":  # needs torch-xla
        assert getattr(llamax, name) is not None
try:
    llamax.nothing
except AttributeError as error:
    assert "no attribute 'nothing'" in str(error)
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checkers_see_what_is_imported() -> None:
    tree = ast.parse(Path(llamax.__file__).read_text())
    typed = {
        alias.asname or alias.name: (node.module or "").removeprefix("llamax.")
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("llamax.")
        for alias in node.names
    }
    assert typed == llamax._MODULES
    assert sorted(llamax.__all__) == sorted([*typed, "__version__"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hub, a random model; tokenizer.model; adapter, of hub; rows.jsonl; text, two files."""
    folder = tmp_path_factory.mktemp("library")
    tokenizer = llama2_tokenizer(folder)
    transformers.set_seed(0)
    config = transformers.LlamaConfig(**MODEL.to_hub("float32"))
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "hub")
    (folder / "hub" / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    (folder / "adapter").mkdir()
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    about["base_model_name_or_path"] = str(folder / "hub")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(about))
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    factors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{factor}.weight": part.clone()
        for layer in range(2)
        for factor, part in (("A", weight[:2]), ("B", weight[:, :2]))
    }
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    write_rows(folder / "rows.jsonl", ROWS)
    (folder / "text").mkdir()
    for number in range(2):
        (folder / "text" / f"{number}.txt").write_text(f"import os\nprint({number})\n" * 40)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


PROGRAM = """
import sys
from pathlib import Path
import llamax

if __name__ == "__main__":
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    tokenizer = folder / "tokenizer.model"
    llamax.prepare(folder / "text", out / "text", tokenizer=tokenizer, validation=0.4, workers=2)
    llamax.prepare(
        [folder / "rows.jsonl"], out / "rows", tokenizer=str(tokenizer), template="dolly",
        validation=0.0, limit=3, fields={"answer": "response"},
    )
    made = llamax.prepare(
        folder / "text", out / "megatron", tokenizer=tokenizer, format="megatron", glob=["1*"]
    )
    assert (made.folder, made.documents, made.unit) == (out / "megatron", 1, "B"), made
    llamax.shard(folder / "hub", out / "cut", tensor=2)
    llamax.consolidate(out / "cut", out / "joined", dtype="bfloat16", max_shard_size="50KB")
    llamax.merge(folder / "adapter", out / "merged")
    llamax.export(folder / "hub", out / "nxd", to="nxd", tensor=2)
    config = folder / "hub" / "config.json"
    made = llamax.import_checkpoint(out / "nxd", out / "back", to="llamax", config=str(config))
    assert (made.kinds, made.step) == (("weight",), 0), made
    assert "ArgumentParser" not in vars(sys.modules["__main__"])
"""

COMMANDS = """
prepare {folder}/text --out {out}/text --tokenizer {folder}/tokenizer.model --validation 0.4
prepare {folder}/rows.jsonl --out {out}/rows --tokenizer {folder}/tokenizer.model --template dolly \
 --validation 0 --limit 3 --field answer=response
prepare {folder}/text --out {out}/megatron --tokenizer {folder}/tokenizer.model --format megatron \\
 --glob 1*
shard {folder}/hub --out {out}/cut --tensor 2
consolidate {out}/cut --out {out}/joined --dtype bfloat16 --max-shard-size 50KB
merge {folder}/adapter --out {out}/merged
export {folder}/hub --out {out}/nxd --to nxd --tensor 2
import {out}/nxd --out {out}/back --to llamax --config {folder}/hub/config.json
"""


def test_a_plain_program_writes_what_the_commands_write(folder: Path, tmp_path: Path) -> None:
    called, typed = tmp_path / "called", tmp_path / "typed"
    called.mkdir()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    subprocess.run([sys.executable, program, folder, called], check=True)
    for line in COMMANDS.replace("\\\n", "").strip().splitlines():
        assert dispatch(line.format(folder=folder, out=typed).split()) == 0
    made = contents(called)
    assert len({name.partition("/")[0] for name in made}) == 8
    assert made == contents(typed)


def test_a_model_answers_as_by_the_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = GenerationSettings(max_new_tokens=6, temperature=0.0, template="dolly")
    prompts = ["Who?", {"instruction": "What?", "context": "A cat."}]
    answers = llamax.generate(folder / "hub", prompts, settings, out=tmp_path / "said.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [answer.text for answer in answers] == [line["text"] for line in lines]
    assert answers[1].prompt == "### Instruction\nWhat?\n\n### Context\nA cat.\n\n### Answer\n"
    argv = ["generate", str(folder / "hub"), "--prompt", "Who?", "--template", "dolly"]
    assert dispatch([*argv, "--greedy", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == answers[0].prompt + answers[0].text + "\n"
    pair = (folder / "hub", folder / "adapter")
    (found, _) = llamax.compare(pair, prompts, settings)
    assert found.base == answers[0]
    assert found.tuned.prompt == answers[0].prompt

    options: dict[str, Any] = {"test_file": folder / "rows.jsonl", "template": "dolly", "limit": 2}
    scores = llamax.evaluate(folder / "hub", **options, max_new_tokens=4)
    argv = ["evaluate", str(folder / "hub"), "--test-file", str(folder / "rows.jsonl")]
    more = ["--template", "dolly", "--limit", "2", "--max-new-tokens", "4", "--json"]
    assert dispatch([*argv, *more]) == 0
    assert json.loads(capsys.readouterr().out) == scores


def test_a_loaded_adapter_answers_as_by_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llamax.load(folder / "adapter")
    answer = model.generate("Who?", max_new_tokens=6, temperature=0, template="dolly")
    argv = ["generate", str(folder / "adapter"), "--prompt", "Who?", "--template", "dolly"]
    assert dispatch([*argv, "--greedy", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out.endswith(f"### Answer\n{answer}\n")
    plain = llamax.load(folder / "hub").generate("Who?", max_new_tokens=6, temperature=0)
    assert answer != plain


def test_a_plan_by_name_is_that_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    plan = llamax.plan("llama3.2-1b", nodes=2, overrides=["--data.global_batch=512"])
    argv = ["plan", "--config", "llama3.2-1b", "--nodes", "2", "--data.global_batch=512", "--json"]
    dispatch(argv)
    from llamax.tools.plan.report import as_json

    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(as_json(plan)))
    config = llamax.load_config("llama3.2-1b", ["--data.global_batch=512"])
    assert as_json(llamax.plan(config, "trn1.32xlarge", 2)) == as_json(plan)


def test_a_description_has_labels_and_values(folder: Path) -> None:
    rows = dict(llamax.describe(folder / "hub"))
    assert rows["tokenizer"] == "tokenizer.model"


# ---- mistakes: one line that names parameters in the library and options in commands


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda f: llamax.prepare("x", "", tokenizer="t"), "`out` is empty; give a path"),
        (lambda f: llamax.prepare("x", f, tokenizer=""), "`tokenizer` is empty"),
        (lambda f: llamax.prepare("x", f), "give either `tokenizer`, a path, or `train_tokenizer`"),
        (lambda f: llamax.prepare("x", f, tokenizer="t", validation=1), "`validation=1` is not"),
        (lambda f: llamax.prepare("x", f, tokenizer="t", workers=0), "`workers=0` is below 1"),
        (lambda f: llamax.prepare("x", f, train_tokenizer=-3), "`train_tokenizer=-3` is below 0"),
        (lambda f: llamax.prepare("x", f, tokenizer="t", limit=3), "`limit` is for rows, which"),
        (
            lambda f: llamax.prepare("x", f, tokenizer="t", template="dolly", exclude=["a"]),
            "`exclude` is for text; leave it out",
        ),
        (
            lambda f: llamax.prepare("x", f, tokenizer="t", template="dolly", fields={"x": "y"}),
            "`fields`: x=y is not FIELD=COLUMN with a field of instruction",
        ),
        (lambda f: merge(f / "adapter", f / "o", dtype="int8"), "`dtype=int8` is not known; use"),
        (
            lambda f: llamax.consolidate(f / "hub", f / "o", max_shard_size="5TB"),
            "`max_shard_size=5TB` is not a size; write 5GB, 500MB or bytes",
        ),
        (lambda f: llamax.consolidate(f / "hub", f / "o", processes=0), "`processes=0` is below 1"),
        (lambda f: llamax.shard(f / "hub", f / "o", 0), "`tensor=0` is below 1"),
        (lambda f: llamax.export(f / "hub", f / "o", to="x"), "`to=x` is not known; use hf, nxd"),
        (
            lambda f: llamax.export(f / "hub", f / "o", to="nxd", qkv="x"),
            "`qkv=x` is not known; use stacked, gqa",
        ),
        (
            lambda f: llamax.export(f / "hub", f / "o", to="nxd", optimizer="x"),
            "`optimizer=x` is not known; use auto, none",
        ),
        (lambda f: llamax.import_checkpoint(f, f / "o", to="x"), "`to=x` is not known; use hub or"),
        (
            lambda f: llamax.import_checkpoint(f, f / "o", format="x"),
            "format=x is not known; use a",
        ),
        (lambda f: llamax.evaluate(f / "hub"), "give `data` DATASET for the loss"),
        (
            lambda f: llamax.evaluate(f / "hub", data="d", extract="("),
            r"`extract`: '\(' is not a regular expression",
        ),
        (lambda f: llamax.evaluate(f / "hub", data="d", dtype="x"), "`dtype=x` is not known; use"),
        (lambda f: GenerationSettings(backend="tpu"), "`backend=tpu` is not known; use cpu, cuda"),
        (lambda f: GenerationSettings(top_p=2.0), "`top_p=2.0` is out of range"),
        (lambda f: GenerationSettings(stop=[""]), "`stop` is empty"),
        (lambda f: llamax.audit("demo", nodes=0), "`nodes=0` is out of range; use 1 or more"),
        (lambda f: llamax.audit("demo", ranks="x"), "`ranks=x` is not known; use all, corners"),
        (lambda f: llamax.plan("demo", nodes=0), "`nodes=0` is out of range; use 1 or more"),
        (lambda f: llamax.plan("demo", nodes="16"), "`nodes='16'` is not a whole number; use 1"),
        (lambda f: llamax.plan("demo", ranks=4.0), "`ranks=4.0` is not a whole number; use 1"),
        (lambda f: llamax.audit("demo", nodes=True), "`nodes=True` is not a whole number; use 1"),
        (lambda f: llamax.plan("demo", "trn3"), "`instance` trn3 is neither a TOML file nor"),
    ],
)
def test_mistakes_name_parameters(folder: Path, call: Any, words: str) -> None:
    with pytest.raises(LlamaxError, match=f"^(?:.*: )?{words}") as caught:
        call(folder)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigError | DataError)


def test_a_length_to_pack_at_is_checked(folder: Path) -> None:
    from llamax.data.prepare.summary import describe

    with pytest.raises(DataError, match="`length=-1` is below 0"):
        describe(folder, -1)


def test_commands_name_options(folder: Path) -> None:
    from llamax.cli.options import command, with_options

    message = "use `max_new_tokens=8`, `drop_empty=True` or `verify=False`; not `fields` `A b`"
    named = "use --max-new-tokens=8, --drop-empty or --no-verify; not --field `A b`"
    assert with_options(message) == named

    def fails(argv: Any) -> int:
        raise ConfigError("`dtype=x` is not known")

    with pytest.raises(ConfigError, match=r"^--dtype=x is not known"):
        command(fails)([])
