"""``llamax COMMAND ...``: import the program of the command and run it with the other arguments."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from llamax.runtime import signals
from llamax.runtime.errors import ConfigError, did_you_mean
from llamax.runtime.process import run_main, steady_heap
from llamax.runtime.versions import LLAMAX

COMMANDS = {
    "prepare": ("llamax.cli.prepare", "make a dataset of tokens from text or rows"),
    "train": ("llamax.cli.train", "train a model; torchrun starts one per rank"),
    "generate": ("llamax.cli.generate", "continue prompts with a trained model"),
    "serve": ("llamax.cli.serve", "answer requests over HTTP, as OpenAI's interface and TGI do"),
    "evaluate": (
        "llamax.cli.evaluate",
        "loss and perplexity of a model, or the scores of its answers",
    ),
    "shard": ("llamax.cli.shard", "cut a Hugging Face folder into a checkpoint"),
    "consolidate": ("llamax.cli.consolidate", "join a checkpoint to a Hugging Face folder"),
    "import": ("llamax.cli.import_", "convert a checkpoint of NxD, NeMo or Meta"),
    "export": ("llamax.cli.export", "write a model for Hugging Face, NxD or Meta"),
    "merge": ("llamax.cli.merge", "merge a base and its adapters to a Hugging Face folder"),
    "push": ("llamax.cli.push", "upload an exported model or adapters to the Hugging Face Hub"),
    "inspect": ("llamax.cli.inspect", "describe a checkpoint, model or dataset"),
    "watch": (
        "llamax.cli.watch",
        "show a run live: loss, speed, time left, ranks, devices",
    ),
    "report": (
        "llamax.cli.report",
        "write one page of HTML about one or several runs",
    ),
    "plan": ("llamax.cli.plan", "memory, time and cost of a run, by arithmetic"),
    "doctor": (
        "llamax.cli.doctor",
        "check a machine, and a job on it, before it is launched",
    ),
    "launch": ("llamax.cli.launch", "start a job on torchrun, mpirun, Slurm, k8s or SageMaker"),
    "cache": ("llamax.cli.cache", "share compiled programs through S3, the Hub or a folder"),
    "audit": ("llamax.cli.audit", "trace the programs that a Trainium cluster would compile"),
    "plot": ("llamax.cli.plot", "draw the loss curves of runs"),
    "demo": ("llamax.cli.demo", "from text to a trained model and its samples"),
    "finetune-demo": ("llamax.cli.finetune_demo", "tune the demo's model to answer questions"),
}


def usage() -> str:
    """The commands, one line each."""
    lines = [f"  {name:<13} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: llamax COMMAND ...",
            "",
            "Train Llama models, whole or sharded over ranks.",
            "",
            *lines,
            "",
            "llamax help COMMAND explains a command; llamax --version prints the version.",
        ]
    )


def dispatch(argv: Sequence[str]) -> int:
    """Run the command that ``argv`` names; ConfigError with the nearest name if unknown."""
    words = list(argv)
    if words[:1] == ["help"] and len(words) > 1:
        words = [words[1], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    name, *rest = words
    if name in ("-V", "--version"):
        print(f"llamax {LLAMAX}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"{name!r} is not a command{did_you_mean(name, COMMANDS)}")
    if name == "train":
        steady_heap()
        signals.install()  # before torch is imported: that takes seconds
    code: int = importlib.import_module(COMMANDS[name][0]).main(rest)
    return code


def main() -> int:
    """The console script."""
    return run_main(dispatch)


if __name__ == "__main__":
    sys.exit(main())
