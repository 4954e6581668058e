"""``llamax finetune-demo``: a small Llama learns to answer questions, with and without context.

Every step is a command that a user could type, shown before it runs:

    rows -> prepare --template dolly -> train -> consolidate
         -> evaluate -> generate with and without context, before and after

The rows are generated.  The base model is that of ``llamax demo`` if demo/hub exists, else one of
the same shape with random weights and a tokenizer trained on the rows.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llamax.cli.demo import RANKS, shell
from llamax.cli.options import Parser
from llamax.config.constants import METRICS_FILE
from llamax.config.load import RECIPES, load_config
from llamax.runtime.files import replace_output
from llamax.runtime.process import run_main
from llamax.runtime.text import in_shell, print_text
from llamax.runtime.units import show_number, show_time

RECIPE, TEMPLATE, PIECES = "finetune-demo", "dolly", 512
ROWS = 1600
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
THINGS = ("cat", "dog", "cup", "hat", "car", "box")
COLOURS = ("red", "blue", "green", "black", "white", "brown")
QUESTIONS = [
    {"instruction": "Which day comes after Tuesday?"},
    {"instruction": "What colour is the cat?", "context": "The cat is blue."},
    {"instruction": "What colour is the hat?", "context": "The hat is brown."},
]


def rows(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Questions and answers: half of them about general knowledge, half about a context."""
    chosen = random.Random(seed)
    for number in range(count):
        if number % 2:
            day = chosen.randrange(7)
            step, word = chosen.choice(((1, "after"), (-1, "before")))
            yield {
                "instruction": f"Which day comes {word} {DAYS[day]}?",
                "context": "",
                "response": f"{DAYS[(day + step) % 7]}.",
            }
        else:
            thing, colour = chosen.choice(THINGS), chosen.choice(COLOURS)
            yield {
                "instruction": f"What colour is the {thing}?",
                "context": f"The {thing} is {colour}.",
                "response": f"The {thing} is {colour}.",
            }


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """Write a JSONL file of ``count`` rows; DataError if a file of other rows has its name."""
    write_table(path, rows(count, seed))


def write_table(path: Path, table: Iterable[dict[str, str]]) -> None:
    """Write a JSONL file; DataError if another file has its name."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table).encode()
    replace_output(path, data, lambda before: before == data)


def outcome(losses: Sequence[tuple[int, float]]) -> str:
    """The first and the last validation loss of a run; ``losses``: each with its step."""
    if not losses:
        return "Nothing was validated."
    (first, before), (last, after) = losses[0], losses[-1]
    said = f"Validation loss of the answers: {before:.3f} nats a token at step {first}"
    return f"{said},\n{after:.3f} at step {last}." if last > first else f"{said}."


def main(argv: Sequence[str]) -> int:
    """Run the demo."""
    parser = Parser(
        prog="llamax finetune-demo",
        usage="%(prog)s [--folder FOLDER] [--base FOLDER] [-- --section.key=value ...]",
        description="Tune a small Llama to answer questions, on 4 ranks of this machine, and show "
        "its answers. Every command is shown before it runs.",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(RECIPE), help="folder for all files (%(default)s)"
    )
    parser.add_argument(
        "--base",
        type=Path,
        default=Path("demo/hub"),
        help="model to tune (%(default)s, of llamax demo; without it one with random weights)",
    )
    parser.add_argument("overrides", nargs="*", help="settings of the training, after --")
    options = parser.parse_args(argv)

    from llamax.training.metrics import read_jsonl

    began, folder, base = time.perf_counter(), options.folder, options.base
    data, run, hub = folder / "data", folder / "run", folder / "hub"
    folder.mkdir(parents=True, exist_ok=True)
    table, test = folder / "rows.jsonl", folder / "test.jsonl"
    write_rows(table, ROWS)
    write_rows(test, 40, seed=1)
    llamax = [sys.executable, "-m", "llamax"]
    overrides = [f"--data.path={data}", f"--run.folder={run}"]
    if (base / "config.json").is_file():
        tokenizer = ["--tokenizer", str(base)]
        overrides.append(f"--checkpoint.init_from={base}")
    else:
        tokenizer = ["--train-tokenizer", str(PIECES)]
        overrides.append(f"--model.vocab_size={PIECES}")
    overrides += options.overrides
    config = load_config(RECIPE, overrides)

    shell(
        [*llamax, "prepare", str(table), "--template", TEMPLATE, *tokenizer, "--out", str(data)]
        + ["--validation", "0.05", "--length", str(config.data.sequence_length)]
    )
    shell([*llamax, "train", "--ranks", str(RANKS), "--config", RECIPE, *overrides])
    shell([*llamax, "consolidate", str(run), "--out", str(hub)])
    shell([*llamax, "evaluate", str(hub), "--data", str(data), "--sequence-length", "256"])
    template_options = ["--template", TEMPLATE, "--max-new-tokens", "24"]
    shell([*llamax, "evaluate", str(hub), "--test-file", str(test), *template_options])
    questions = folder / "questions.jsonl"
    write_table(questions, QUESTIONS)
    prompt_options = ["--prompts-file", str(questions), *template_options, "--greedy"]
    shell(
        [*llamax, "generate", "--compare", f"{base},{hub}", *prompt_options]
        if (base / "config.json").is_file()
        else [*llamax, "generate", str(hub), *prompt_options]
    )
    records = read_jsonl(run / METRICS_FILE)
    losses = [(r.step, r.validation_loss) for r in records if r.validation_loss is not None]
    print_text(
        f"""
Done in {show_time(time.perf_counter() - began)}. {outcome(losses)}

  {table}     {ROWS} questions and answers, half of them with a context
  {data}           the packed samples, which tokens of them are answers, and the tokenizer
  {run}            the run: config.toml, metrics.jsonl, checkpoints/
  {hub}            {show_number(config.model.num_parameters())} tuned parameters as a Hugging Face \
folder

Next:
  llamax generate {in_shell(hub)} --template {TEMPLATE} --greedy \\
    --prompt "What colour is the dog?" --context "The dog is green."
  llamax inspect {in_shell(data)} --verify
  llamax evaluate {in_shell(hub)} --template {TEMPLATE} \\
    --test-file {in_shell(test)}
(the commands are in {Path(sys.executable).parent};
larger recipes: {RECIPES})"""
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
