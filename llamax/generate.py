"""The generating program: ``llamax generate MODEL --prompt "def "``.

::

    prompts ──encode──> ids ──sampling.generate──> a token per prompt and step ──Detokenizer──> text

Under torchrun the ranks are one tensor-parallel axis: each computes the same logits and draws the
same tokens, and rank 0 speaks.

A prompt starts with a BOS token where the model's configuration names one, as Llama's do and as
``llamax prepare`` packs documents; ``--no-bos`` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO

import torch

from llamax import log, program
from llamax.backends import NAMES, choose
from llamax.checkpoint.consolidate import dataset_of
from llamax.checkpoint.hub import open_source
from llamax.checkpoint.load import Checkpoint, Source, load_weights
from llamax.collectives import Axis
from llamax.config import Config, Data, Model, Parallel
from llamax.data.detokenizer import Detokenizer
from llamax.data.tokenizer import Tokenizer, load_tokenizer
from llamax.errors import ConfigError, DataError
from llamax.launch.env import rendezvous
from llamax.mesh import Mesh
from llamax.model import DTYPES, Llama
from llamax.sampling import Sampling, check_prompts, generate

TIMEOUT_S = 600.0

Show = Callable[[str], None]


# --- what is given -------------------------------------------------------------------------------


def tokenizer_of(source: Source, vocab_size: int, given: str = "") -> Tokenizer:
    """The tokenizer given, else that of the model's folder or of the dataset it was trained on.

    Raises DataError where there is none, where it is not the one the model was trained with, and
    where it has more ids than the model.
    """
    place: Path | None = Path(given or source.folder)
    if isinstance(source, Checkpoint) and not given:
        place = dataset_of(source.folder)
    if place is None or not (given or place.is_dir()):
        raise DataError(
            f"{source.folder} was trained on the dataset {place}, which is not here to lend its "
            "tokenizer; use --tokenizer PATH"
        )
    tokenizer = load_tokenizer(place)
    expected = source.state.get("tokenizer") if isinstance(source, Checkpoint) else None
    if expected and not given and expected != tokenizer.fingerprint:
        raise DataError(
            f"{tokenizer.path} is not the tokenizer that {source.folder} was trained with: its "
            f"sha256 is {tokenizer.fingerprint[:12]}, not {expected[:12]}; use --tokenizer PATH"
        )
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{tokenizer.path} has {tokenizer.vocab_size} ids but the model {vocab_size}; "
            "use --tokenizer with the model's own"
        )
    return tokenizer


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; in a .jsonl file each line's key ``prompt``.  Blank lines are skipped.

    Raises DataError where the file cannot be read, is not UTF-8, or holds no prompts.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 at byte {error.start}; convert it") from None
    if not lines:
        raise DataError(f"{path}: holds no prompts; write one per line")
    return [_prompt(line, path) for line in lines] if path.suffix == ".jsonl" else lines


def _prompt(line: str, path: Path) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError):
        prompt = None
    if not isinstance(prompt, str):
        raise DataError(f'{path}: {line[:60]!r} is not {{"prompt": "text"}}; mend that line')
    return prompt


def encode(tokenizer: Tokenizer, prompt: str, bos_id: int | None) -> list[int]:
    """Ids of a prompt, BOS first if there is one; DataError where it is no valid Unicode."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise DataError(f"prompt {ascii(prompt)[:60]} is not UTF-8; retype it") from None
    return [*([] if bos_id is None else [bos_id]), *tokenizer.encode(prompt)]


def build(source: Source, config: Model, tp: Axis, device: torch.device, dtype: str) -> Llama:
    """The model on this tensor-parallel rank; ``dtype`` is that of its files where empty."""
    narrow = source.dtype("model.embed_tokens.weight") == torch.bfloat16
    kind = DTYPES[dtype] if dtype else torch.bfloat16 if narrow else torch.float32
    model = Llama(config, tp, dtype=kind, device=device)
    parameters = dict(model.named_parameters())
    load_weights(source, parameters, model.shards, tp.size, tp.rank, convert=True)
    return model


# --- what is made --------------------------------------------------------------------------------


@dataclass
class Completion:
    """What became of a prompt: a line of ``--out``; ``ended`` by "stop" or by "length"."""

    prompt: str
    prompt_tokens: int
    new_tokens: int = 0
    text: str = ""
    ended: str = "length"


@dataclass
class Speed:
    """Tokens and seconds, of prefill (up to the first new token) and of decoding after it."""

    prompt_tokens: int = 0
    prefill_s: float = 0.0
    new_tokens: int = 0
    decode_s: float = 0.0

    def __str__(self) -> str:
        text = f"{self.prompt_tokens} prompt tokens in {self.prefill_s:.2f} s"
        if not self.new_tokens:
            return text
        rate = self.new_tokens / max(self.decode_s, 1e-9)
        return f"{text}, {self.new_tokens} more in {self.decode_s:.2f} s: {rate:.1f} tokens/s"


@dataclass
class Speaker:
    """Continues prompts with one model; ``speed`` adds up over all of them."""

    model: Llama
    tokenizer: Tokenizer
    sampling: Sampling
    max_new_tokens: int = 100
    stops: Sequence[str] = ()
    stop_ids: Collection[int] = ()
    speed: Speed = field(default_factory=Speed)

    def speak(
        self, prompts: Sequence[str], ids: Sequence[Sequence[int]], number: int, show: Show
    ) -> list[Completion]:
        """The completions of a batch whose first prompt is the ``number``-th, counted from 0.

        ``show`` gets the text of that one as it is made, in whole characters.
        """
        done = [Completion(*each) for each in zip(prompts, map(len, ids), strict=True)]
        writers = [Detokenizer(self.tokenizer.decode, prompt, self.stops) for prompt in ids]
        steps = generate(
            self.model,
            ids,
            max_new_tokens=self.max_new_tokens,
            sampling=replace(self.sampling, seed=self.sampling.seed + number),
            stop_ids=self.stop_ids,
            vocab_size=self.tokenizer.vocab_size,
        )
        began = first = time.perf_counter()
        for step, tokens in enumerate(steps):
            first = first if step else time.perf_counter()
            for completion, writer, token in zip(done, writers, tokens, strict=True):
                if token is None or completion.ended == "stop":
                    continue
                stop = token in self.stop_ids
                text = writer.finish() if stop else writer.feed(token)
                completion.new_tokens += 1
                completion.ended = "stop" if stop or writer.stopped else "length"
                completion.text += text
                if completion is done[0]:
                    show(text)
            if all(completion.ended == "stop" for completion in done):
                break
        for completion, writer in zip(done, writers, strict=True):
            text = writer.finish()
            completion.text += text
            if completion is done[0]:
                show(text)
        self.speed.prompt_tokens += sum(map(len, ids))
        self.speed.prefill_s += first - began
        self.speed.new_tokens += sum(completion.new_tokens - 1 for completion in done)
        self.speed.decode_s += time.perf_counter() - first
        return done


# --- the program ---------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(
        prog="llamax generate",
        description="Continue prompts with a trained Llama. Alone it runs on one rank; under "
        "torchrun all ranks share the model (tensor parallelism).",
        allow_abbrev=False,
    )
    p.add_argument("model", type=Path, help="Hugging Face folder, run folder or checkpoint step")
    p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    p.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help='one prompt per line, or .jsonl with {"prompt": "text"}',
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
    p.add_argument("--backend", choices=NAMES, default="cpu", help="default cpu")
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
        return path.open("x", encoding="utf-8")
    except FileExistsError:
        raise DataError(f"{path} exists already; remove it or choose another --out") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); check --out") from None


def say(text: str) -> None:
    """Print at once what there is of a line."""
    print(text, end="", flush=True)


def main(argv: Sequence[str]) -> int:
    """Run the program; see ``parser``."""
    options = parser().parse_args(argv)
    where = rendezvous(os.environ)
    log.setup(f"rank {where.rank}", main=where.rank == 0)
    if options.batch < 1:
        raise ConfigError(f"--batch={options.batch} is out of range; use 1 or more")
    if "" in options.stop:
        raise ConfigError("--stop is empty; give the text to stop at")
    temperature = 0.0 if options.greedy else options.temperature
    sampling = Sampling(temperature, options.top_k, options.top_p, options.seed)

    source = open_source(options.model)
    config, tp = Model.from_hub(source.model), where.world_size
    Config(config, Parallel(tensor=tp), data=Data(sequence_length=tp)).check(tp)
    tokenizer = tokenizer_of(source, config.vocab_size, options.tokenizer)
    prompts = options.prompt + (read_prompts(options.prompts_file) if options.prompts_file else [])
    prompts = prompts or [""]
    bos_id = None if options.no_bos else config.bos_token_id
    ids = [encode(tokenizer, prompt, bos_id) for prompt in prompts]
    check_prompts(config, ids, options.max_new_tokens)

    speaks, alone = where.rank == 0, len(prompts) == 1
    show: Show = say if speaks and alone else lambda text: None
    kv = max(1, tp // config.num_key_value_heads)
    backend = choose(options.backend, where, options.threads)
    with ExitStack() as stack:
        out = stack.enter_context(new_file(options.out)) if options.out and speaks else None
        axes = stack.enter_context(backend.joined(Mesh(tp=tp), TIMEOUT_S, kv))
        speaker = Speaker(
            build(source, config, axes.tp, backend.device, options.dtype),
            tokenizer,
            sampling,
            options.max_new_tokens,
            options.stop,
            {*config.eos_token_ids, *options.stop_id},
        )
        for start in range(0, len(prompts), options.batch):
            batch = slice(start, start + options.batch)
            show(prompts[start])
            for done in speaker.speak(prompts[batch], ids[batch], start, show):
                start += 1
                if speaks and not alone:
                    say(f"=== {start} of {len(prompts)} ===\n{done.prompt}{done.text}\n")
                if out:
                    out.write(json.dumps(asdict(done), ensure_ascii=False) + "\n")
            show("\n")
    log.logger.info("%s", speaker.speed)
    return 0


if __name__ == "__main__":
    sys.exit(program.run(main))
