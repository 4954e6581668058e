"""The generating program: ``llamax generate MODEL --prompt "def "``.

::

    prompts ──Wording──> ids ──sampling.generate──> a token per prompt and step ──> text

Under torchrun the ranks are one tensor-parallel axis: each computes the same logits and draws the
same tokens, and rank 0 speaks.

A prompt starts with a BOS token where the model's configuration names one, as Llama's do and as
``llamax prepare`` packs documents; ``--no-bos`` leaves it out.  ``--template`` wraps questions as
training did; ``--compare`` asks two models and puts their answers side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import unicodedata
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO

from llamax.backends import choose
from llamax.backends.base import EAGER
from llamax.checkpoint.peft import is_adapter
from llamax.cli.options import column
from llamax.config.schema import Config, DataConfig, ParallelConfig
from llamax.config.validate import check
from llamax.data.chat.templates import BUILT_IN
from llamax.data.prepare.instruction_rows import FIELDS
from llamax.data.prepare.tables import Row
from llamax.inference.engine import Completion, Engine, LoadedModel, Show, open_model
from llamax.inference.prompts import Prompt, PromptFormat, read_file
from llamax.inference.sampling import Sampling, check_prompts
from llamax.model.llama import DTYPES
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import rendezvous
from llamax.runtime.errors import ConfigError, DataError
from llamax.runtime.logging import logger, setup_logging
from llamax.runtime.process import run_main

TIMEOUT_S = 600.0
COLUMN = 48  # characters of an answer beside another


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(
        prog="llamax generate",
        description="Continue prompts with a trained Llama. Alone it runs on one rank; under "
        "torchrun all ranks share the model (tensor parallelism).",
        allow_abbrev=False,
    )
    p.add_argument(
        "model",
        type=Path,
        nargs="?",
        help="Hugging Face folder, run folder, checkpoint step, or a folder of adapters",
    )
    p.add_argument(
        "--compare", metavar="BASE,TUNED", help="two models in place of one, side by side"
    )
    p.add_argument(
        "--base", default="", metavar="PATH", help="of adapters, if not where they say it is"
    )
    p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    p.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="one prompt per line, or a table (.jsonl, .json, .csv, .tsv, .parquet) with a field "
        '"prompt"; with --template rows of questions',
    )
    p.add_argument(
        "--template",
        default="",
        metavar="NAME|FILE",
        help=f"wrap prompts as in training: {', '.join(BUILT_IN)}, a file or a folder with one",
    )
    p.add_argument("--context", default="", metavar="TEXT", help="what questions are about")
    p.add_argument("--system", default="", metavar="TEXT", help="what every prompt begins with")
    p.add_argument(
        "--field",
        action="append",
        type=column,
        default=[],
        metavar="FIELD=COLUMN",
        help=f"rows: which column is the {', '.join(FIELDS)}",
    )
    p.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="default 100")
    p.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="default 0.8; 0 is greedy"
    )
    p.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw among the K most likely; 0: all"
    )
    p.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw among the fewest that hold P of the probability",
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="default 0; prompt i adds i")
    p.add_argument("--greedy", action="store_true", help="always the most likely token")
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated"
    )
    p.add_argument(
        "--stop-id",
        action="append",
        type=int,
        default=[],
        metavar="ID",
        help="end at this token, besides the model's EOS; may be repeated",
    )
    p.add_argument("--no-bos", action="store_true", help="start prompts without the BOS token")
    p.add_argument(
        "--tokenizer", default="", metavar="PATH", help="default: the model's or its dataset's"
    )
    p.add_argument("--dtype", choices=DTYPES, default="", help="default: that of the files")
    p.add_argument("--backend", choices=EAGER, default="cpu", help="default cpu")
    p.add_argument(
        "--threads", type=int, default=0, metavar="N", help="per rank; 0: a share of the cores"
    )
    p.add_argument(
        "--batch", type=int, default=8, metavar="N", help="prompts computed at once (default 8)"
    )
    p.add_argument("--out", type=Path, metavar="FILE.jsonl", help="new file, a line per prompt")
    return p


def new_file(path: Path) -> IO[str]:
    """A file to write that does not exist yet; DataError where it does or cannot be made."""
    try:
        return path.open("x", encoding="utf-8", errors="backslashreplace")
    except FileExistsError:
        raise DataError(f"{path} exists already; remove it or choose another --out") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); check --out") from None


def say(text: str) -> None:
    """Print at once what there is of a line."""
    print(text, end="", flush=True)


def columns(left: str, right: str, width: int = COLUMN) -> str:
    """Two texts side by side, each wrapped at ``width`` columns of a terminal."""
    sides = [list(_wrapped(text, width)) for text in (left, right)]
    rows = max(map(len, sides))
    first, second = ([*side, *[""] * (rows - len(side))] for side in sides)
    lines = zip(first, second, strict=True)
    return "\n".join(f"{a}{' ' * (width - _wide(a))} | {b}".rstrip() for a, b in lines)


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for character in text.expandtabs(4):
        if character == "\n":
            lines.append("")
            continue
        if _wide(lines[-1] + character) > width:
            lines.append("")
        lines[-1] += character
    return lines


def _wide(text: str) -> int:
    """Columns that a terminal gives a text: Hangul, Kana and Han take two."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def main(argv: Sequence[str]) -> int:
    """Run the program; see ``parser``."""
    options = parser().parse_args(argv)
    where = rendezvous(os.environ)
    setup_logging(f"rank {where.rank}", main=where.rank == 0)
    for name, least in (("batch", 1), ("threads", 0)):
        if (value := getattr(options, name)) < least:
            raise ConfigError(f"--{name}={value} is out of range; use {least} or more")
    if "" in options.stop:
        raise ConfigError("--stop is empty; give the text to stop at")
    temperature = 0.0 if options.greedy else options.temperature
    sampling = Sampling(temperature, options.top_k, options.top_p, options.seed)
    paths = _paths(options)
    models = [
        open_model(path, options.tokenizer, base)
        for path, base in zip(paths, _bases(paths, options.base), strict=True)
    ]
    rows: list[tuple[str, Row]] = [
        (f"prompt {ascii(text)[:40]}", {"prompt": text, "instruction": text})
        for text in options.prompt
    ]
    if options.prompts_file:
        rows += read_file(options.prompts_file)
    if not rows and options.template:
        raise ConfigError("--template has nothing to wrap; give --prompt or --prompts-file")
    rows = rows or [("prompt", {"prompt": ""})]
    tp = where.world_size
    asked: list[list[Prompt]] = []
    ends: list[set[int]] = []
    for each in models:
        check(
            Config(each.model, ParallelConfig(tensor=tp), data=DataConfig(sequence_length=tp)), tp
        )
        wording = PromptFormat(
            each.tokenizer,
            None if options.no_bos else each.model.bos_token_id,
            options.template,
            dict(options.field),
            options.context,
            options.system,
        )
        asked.append([wording.ask(row, place) for place, row in rows])
        ends.append({*each.model.eos_token_ids, *wording.ends, *options.stop_id})
        check_prompts(each.model, [one.ids for one in asked[-1]], options.max_new_tokens)

    kv = max(1, tp // min(each.model.num_key_value_heads for each in models))
    backend = choose(options.backend, where, options.threads)
    with ExitStack() as stack:
        speaks = where.rank == 0
        out = stack.enter_context(new_file(options.out)) if options.out and speaks else None
        axes = stack.enter_context(backend.joined(Mesh(tp=tp, kv=kv), TIMEOUT_S))

        def speaker(number: int) -> Engine:
            given: LoadedModel = models[number]
            return Engine(
                given.build(axes.tp, backend.device, options.dtype),
                given.tokenizer,
                sampling,
                options.max_new_tokens,
                options.stop,
                ends[number],
            )

        if options.compare is None:
            _answer(speaker(0), asked[0], options.batch, speaks, out)
        else:
            made = [_complete(speaker(i), asked[i], options.batch) for i in range(2)]
            if speaks:
                _side_by_side(paths, asked[0], made, out)
    return 0


def _paths(options: argparse.Namespace) -> list[Path]:
    """The models that the command line names; ConfigError where it names none or too many."""
    if (options.model is None) == (options.compare is None):
        raise ConfigError("give one model's folder, or --compare BASE,TUNED")
    if options.compare is None:
        return [options.model]
    paths = [Path(part) for part in options.compare.split(",")]
    if len(paths) != 2:
        raise ConfigError(f"--compare={options.compare} names {len(paths)} models; use BASE,TUNED")
    return paths


def _bases(paths: Sequence[Path], base: str) -> list[str]:
    """``--base`` for each model: of two that are compared, adapters alone need it."""
    adapted = [is_adapter(path) for path in paths]
    return [base if each or not any(adapted) else "" for each in adapted]


def _answer(
    speaker: Engine, asked: Sequence[Prompt], batch: int, speaks: bool, out: IO[str] | None
) -> None:
    """Answer all prompts, each batch as it is done; a single prompt token by token."""
    alone = len(asked) == 1
    show: Show = say if speaks and alone else lambda text: None
    for start in range(0, len(asked), batch):
        some = asked[start : start + batch]
        show(some[0].text)
        done = speaker.speak([one.text for one in some], [one.ids for one in some], start, show)
        for number, (one, completion) in enumerate(zip(some, done, strict=True), start + 1):
            if speaks and not alone:
                say(f"=== {number} of {len(asked)} ===\n{completion.prompt}{completion.text}\n")
            if out:
                write_line(out, {**one.row, **asdict(completion)})
        show("\n")
    logger.info("%s", speaker.speed)


def _complete(speaker: Engine, asked: Sequence[Prompt], batch: int) -> list[Completion]:
    """The answers to all prompts."""
    done: list[Completion] = []
    for start in range(0, len(asked), batch):
        some = asked[start : start + batch]
        texts, ids = [one.text for one in some], [one.ids for one in some]
        done += speaker.speak(texts, ids, start, lambda text: None)
    logger.info("%s", speaker.speed)
    return done


def _side_by_side(
    names: Sequence[Path],
    asked: Sequence[Prompt],
    made: Sequence[Sequence[Completion]],
    out: IO[str] | None,
) -> None:
    for number, (one, base, tuned) in enumerate(zip(asked, *made, strict=True), 1):
        say(f"=== {number} of {len(asked)} ===\n{one.text}\n")
        say(columns(f"[{names[0]}]\n{base.text}", f"[{names[1]}]\n{tuned.text}") + "\n")
        if out:
            write_line(out, {**one.row, "base": asdict(base), "tuned": asdict(tuned)})


def write_line(out: IO[str], value: dict[str, object]) -> None:
    """One line of JSON; what rows hold beside it, as dates, becomes text."""
    out.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")


if __name__ == "__main__":
    sys.exit(run_main(main))
