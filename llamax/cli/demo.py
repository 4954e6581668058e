"""``llamax demo``: from Python's own sources to a trained Llama that writes something like Python.

Every step is a command that a user could type, shown before it runs:

    prepare -> train -> consolidate -> generate -> plot
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from llamax.cli.options import Parser
from llamax.config.constants import METRICS_FILE
from llamax.config.load import load_config
from llamax.runtime.errors import BackendError
from llamax.runtime.process import run_main
from llamax.runtime.text import in_shell, print_text
from llamax.runtime.units import perplexity, show_number, show_time

RECIPE = "demo"
RANKS = 4
PROMPTS = ("def __init__(self", "import os", "class Error(Exception")
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__")


def shell(command: Sequence[str]) -> None:
    """Show a command, then run it; BackendError where it fails."""
    text = shlex.join(command).replace(f"{shlex.quote(sys.executable)} -m llamax ", "llamax ")
    print_text(f"\n$ {text}")
    if subprocess.run(command, check=False).returncode:
        raise BackendError(f"the demo stopped at: {text}; its own message stands above")


def outcome(loss: float | None, entropy: float) -> str:
    """What a run has learnt, by its last validation loss and the unigram entropy of that text.

    Both are in nats a token; a loss of None: nothing was validated.
    """
    known = f"a unigram entropy of {entropy:.3f} (perplexity {perplexity(entropy):.0f})"
    if loss is None:
        return f"Nothing was validated; the validation text has\n{known}."
    more = "has learnt more" if loss < entropy else "has not learnt more yet"
    return (
        f"Validation loss {loss:.3f} nats a token (perplexity {perplexity(loss):.1f}),\n"
        f"against {known}: the model {more} than which words are frequent."
    )


def main(argv: Sequence[str]) -> int:
    """Run the demo."""
    parser = Parser(
        prog="llamax demo",
        usage="%(prog)s [--folder FOLDER] [-- --section.key=value ...]",
        description="Train a small Llama on Python's own sources, on 4 ranks of this machine, and "
        "print its samples. Every command is shown before it runs.",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("demo"), help="folder for all files (%(default)s)"
    )
    parser.add_argument("overrides", nargs="*", help="settings of the training, after --")
    options = parser.parse_args(argv)

    from llamax.data.prepare.summary import unigram_entropy
    from llamax.data.token_file import TokenFile
    from llamax.tools.monitor.plot import check_matplotlib
    from llamax.training.metrics import check_installed, read_jsonl

    began, folder = time.perf_counter(), options.folder
    data, run, hub = folder / "data", folder / "run", folder / "hub"
    config = load_config(RECIPE, options.overrides)
    check_installed(config.run)
    check_matplotlib()  # which the last command needs, after minutes
    llamax = [sys.executable, "-m", "llamax"]

    stdlib = sysconfig.get_paths()["stdlib"]
    left_out = [word for name in LEFT_OUT for word in ("--exclude", name)]
    shell(
        [*llamax, "prepare", stdlib, "--glob", "*.py", *left_out, "--out", str(data)]
        + ["--train-tokenizer", str(config.model.vocab_size), "--validation", "0.05", "--bos"]
    )
    train = [*llamax, "train", "--ranks", str(RANKS), "--config"]
    shell([*train, RECIPE, f"--data.path={data}", f"--run.folder={run}", *options.overrides])
    shell([*llamax, "consolidate", str(run), "--out", str(hub)])
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    shell(
        [*llamax, "generate", str(hub), *prompts, "--max-new-tokens", "80", "--temperature", "0.6"]
    )

    entropy, _ = unigram_entropy(TokenFile(data / "validation.tokens", "off"))
    picture = folder / "loss.png"
    shell(
        [*llamax, "plot", str(run), "--out", str(picture)]
        + ["--reference", f"{entropy:.4f}", "--reference-name", "unigram entropy"]
    )
    losses = [r.validation_loss for r in read_jsonl(run / METRICS_FILE)]
    validated = [loss for loss in losses if loss is not None]
    last = validated[-1] if validated else None
    print_text(
        f"""
Done in {show_time(time.perf_counter() - began)}. {outcome(last, entropy)}

  {data}        the packed tokens, and the tokenizer trained on them
  {run}         the run: config.toml, metrics.jsonl, tensorboard/, checkpoints/
  {hub}         {show_number(config.model.num_parameters())} parameters as a Hugging Face folder
  {picture}    the loss curve

Next:
# more samples
  llamax generate {in_shell(hub)} --prompt "for i in"
# what the checkpoint holds
  llamax inspect {in_shell(run)}
# the curves, live
  tensorboard --logdir {in_shell(run / "tensorboard")}
# a longer run
  llamax train --ranks 4 --config demo --run.steps=2000 \\
    --data.path={in_shell(data)} --run.folder={in_shell(folder / "long")}
(the commands are in {Path(sys.executable).parent})"""
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
