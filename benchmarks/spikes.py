"""Do skipped outliers save a run?  Spikes are put into the data, and the run is compared.

    python benchmarks/spikes.py [--steps 400] [--spikes 20] [--ranks 1] [--backend cpu]
        [--parallel tensor=2 zero=3 ...]

A small Llama learns a noisy counting language.  The samples of ``--spikes`` steps, drawn by a seed,
are replaced by random tokens.  On clean data and on these a run is trained with and without
``optim.skip_spikes=both``; the last one once more, from its middle.  Printed are the steps that
were skipped, the validation losses at the end, and whether the resumed run equals the unbroken one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

import llamax
from llamax.config.load import parse_config
from llamax.config.schema import Config
from llamax.data.header import Header
from llamax.data.samples import Samples
from llamax.data.token_file import TokenFile, TokenWriter
from llamax.parallel.mesh import ALONE
from llamax.runtime.files import sha256

VOCABULARY = 128


def settings(folder: Path, steps: int) -> dict[str, Any]:
    """The configuration of a run, as tables."""
    return {
        "model": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
        },
        "optim": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 20},
        "data": {
            "path": str(folder / "data"),
            "sequence_length": 64,
            "global_batch": 8,
            "micro_batch": 2,
        },
        "checkpoint": {"every": steps // 2, "keep": 0},
        "run": {
            "steps": steps,
            "validate_every": steps,
            "log_every": steps,
            "progress": "off",
            "threads": 1,
        },
    }


def counting(length: int, seed: int) -> npt.NDArray[np.uint16]:
    """Tokens that count up by 1, 2 or 3 [length]."""
    steps = np.random.default_rng(seed).integers(1, 4, length)
    return (np.cumsum(steps) % VOCABULARY).astype(np.uint16)


def write_split(folder: Path, name: str, tokens: npt.NDArray[np.uint16]) -> Path:
    """Write the tokens of one long document; the path of the file."""
    path = folder / f"{name}.tokens"
    path.unlink(missing_ok=True)
    with TokenWriter(path, Header(sha256(folder / "tokenizer.model"), VOCABULARY)) as writer:
        writer.add(tokens, np.array([len(tokens)]), len(tokens))
    return path


def write_data(config: Config, spikes: Sequence[int]) -> None:
    """Write the data set of ``config``; the samples of the steps ``spikes`` are random tokens."""
    folder, length = Path(config.data.path), config.data.sequence_length
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(b"none")
    (folder / "dataset.json").write_text(json.dumps({"tokenizer_file": "tokenizer.model"}))
    tokens = counting(config.run.steps * config.data.global_batch * length + 1, 1)
    write_split(folder, "validation", counting(32 * length + 1, 2))
    file = TokenFile(write_split(folder, "train", tokens), "off")
    loader = Samples(file, config.data, config.run.seed).loader(ALONE, 0, shuffle=True)
    random = np.random.default_rng(3)
    for step in spikes:
        for sample in loader.sample_ids((step - 1) * config.data.global_batch):
            place = slice(sample * length, (sample + 1) * length)
            tokens[place] = random.integers(0, VOCABULARY, length)
    write_split(folder, "train", tokens)


@dataclass(frozen=True)
class Result:
    """A run's skipped steps, its validation loss, and the hashes of its last checkpoint's files."""

    skipped: list[int]
    validation_loss: float
    hashes: list[str]


def train(tables: dict[str, Any], folder: Path, ranks: int, **optim: Any) -> Result:
    """Train, or resume, in ``folder``."""
    tables = {
        **tables,
        "optim": tables["optim"] | optim,
        "run": tables["run"] | {"folder": str(folder)},
    }
    run = llamax.train(tables, ranks=ranks if ranks > 1 else 0)
    assert run.validation_loss is not None
    assert run.checkpoint is not None
    files = sorted(run.checkpoint.glob("*.safetensors"))
    skipped = [record["step"] for record in run.metrics if "skipped_samples" in record]
    return Result(skipped, run.validation_loss, [sha256(file) for file in files])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--spikes", type=int, default=20)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--parallel", nargs="*", default=[], metavar="DEGREE=N")
    options = parser.parse_args(argv)
    judged = options.window // 2 + 1
    chosen = np.random.default_rng(4).permutation(np.arange(judged + 1, options.steps))
    spikes = sorted(chosen[: options.spikes].tolist())
    with TemporaryDirectory() as name:
        place = Path(name)
        tables = settings(place, options.steps)
        tables["parallel"] = {k: int(v) for k, v in (item.split("=") for item in options.parallel)}
        tables["run"]["backend"] = options.backend
        config = parse_config(tables, (), None, "benchmark")
        skipping = {"skip_spikes": "both", "spike_window": options.window}
        write_data(config, ())
        clean = train(tables, place / "clean", options.ranks)
        false = train(tables, place / "careful", options.ranks, **skipping)
        write_data(config, spikes)
        taken = train(tables, place / "taken", options.ranks)
        whole = train(tables, place / "whole", options.ranks, **skipping)
        shutil.rmtree(place / "whole" / "checkpoints" / f"step-{options.steps:08d}")
        resumed = train(tables, place / "whole", options.ranks, **skipping)
    missed = sorted({*spikes} - {*whole.skipped})
    others = sorted({*whole.skipped} - {*spikes})
    print("| data | skip_spikes | steps skipped | validation loss | to clean |")
    print("|---|---|---|---|---|")
    for data, way, result in (
        ("clean", "off", clean),
        ("clean", "both", false),
        (f"{len(spikes)} spikes", "off", taken),
        (f"{len(spikes)} spikes", "both", whole),
    ):
        loss, skipped = result.validation_loss, len(result.skipped)
        change = loss / clean.validation_loss - 1
        print(f"| {data} | {way} | {skipped} | {loss:.4f} | {change:+.2%} |")
    print(f"spikes not skipped: {missed or 'none'}; other steps skipped: {others or 'none'}")
    print(f"resumed in between: {'equal to the bit' if resumed == whole else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
