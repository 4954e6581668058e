"""``llamax consolidate CHECKPOINT --out DIR``: a checkpoint becomes a Hugging Face folder.

Tensors stream from the ranks' files through one slab of 16 MiB into ``model.safetensors`` (or
numbered files and an index), so memory does not grow with the model.  The folder gets its name when
all is written and the hashes of all that was read, checked meanwhile, are those of the manifest.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from llamax import configfile
from llamax.checkpoint import hub, slabs
from llamax.checkpoint.container import Progress, building, silent, write, writing
from llamax.checkpoint.load import Checkpoint
from llamax.checkpoint.manifest import CONFIG, find
from llamax.config import Model
from llamax.data.export import export
from llamax.data.tokenizer import load_tokenizer
from llamax.errors import CheckpointError, ConfigError
from llamax.metrics import show_bytes, show_number, show_time

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class Planned(NamedTuple):
    """One tensor to write, and what it is made of."""

    name: str
    kind: str
    dtype: torch.dtype
    size_bytes: int


def consolidate(
    checkpoint: Path | str,
    out: Path | str,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: Path | str | None = None,
    verify: bool = True,
    progress: Progress = silent,
) -> Path:
    """Write a checkpoint (a step's folder, or a run's: its newest) as a Hugging Face folder.

    ``dtype`` defaults to that of the weights; float32 takes the masters where there are some.
    ``verify`` hashes what is read, beside the reading.
    Raises CheckpointError where the checkpoint is damaged, ``out`` is in use or the disk is full.
    """
    source = Checkpoint(find(Path(checkpoint)), verify=False)
    model = Model.from_hub(source.model)
    chosen = [plan(source, name, dtype) for name in source.names()]
    needed = {piece.path for one in chosen for piece in source.pieces(one.name, one.kind)}
    with building(Path(out)) as folder, ThreadPoolExecutor(max_workers=1) as pool:
        verified = pool.submit(source.check, sorted(needed) if verify else [])
        write_weights(source, chosen, folder, max_shard_bytes, progress)
        word = str(chosen[0].dtype).removeprefix("torch.")
        write_json(folder / hub.CONFIG, model.to_hub(word))
        special = {"bos_token_id": model.bos_token_id, "eos_token_id": model.eos_token_id}
        write_json(folder / hub.GENERATION, {k: v for k, v in special.items() if v is not None})
        write_tokenizer(source, model, None if tokenizer is None else Path(tokenizer), folder)
        verified.result()
    return Path(out)


def plan(source: Checkpoint, name: str, dtype: torch.dtype | None) -> Planned:
    """What to write for one tensor."""
    masters = dtype == torch.float32 and "master" in source.kinds(name)
    as_dtype = dtype or source.dtype(name)
    size_bytes = math.prod(source.shape(name)) * as_dtype.itemsize
    return Planned(name, "master" if masters else "weight", as_dtype, size_bytes)


def pack(chosen: Sequence[Planned], most_bytes: int) -> list[list[Planned]]:
    """The tensors of each file: in order, a new file where the next would pass ``most_bytes``."""
    files: list[list[Planned]] = [[]]
    size_bytes = 0
    for one in chosen:
        if files[-1] and size_bytes + one.size_bytes > most_bytes:
            files.append([])
            size_bytes = 0
        files[-1].append(one)
        size_bytes += one.size_bytes
    return files


def write_weights(
    source: Checkpoint, chosen: Sequence[Planned], folder: Path, most_bytes: int, progress: Progress
) -> None:
    """Write ``model.safetensors``, or numbered files and their index."""
    files, buffers = pack(chosen, most_bytes), slabs.new_buffers()
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, start=1):
        several = len(files) > 1
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if several else hub.SINGLE
        outgoing = [slabs.whole(source, t.name, t.kind, t.dtype, buffers) for t in tensors]
        write(folder / name, outgoing, careful=False, progress=progress)
        weight_map |= {tensor.name: name for tensor in tensors}
    if len(files) > 1:
        total = sum(tensor.size_bytes for tensor in chosen)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / hub.INDEX, index)


def write_tokenizer(source: Checkpoint, model: Model, given: Path | None, folder: Path) -> None:
    """Put the tokenizer beside the weights: the one given, or that of the dataset, if it is there.

    Raises CheckpointError where it is not the one the model was trained with.
    """
    path = given or dataset_of(source.folder)
    if path is None or not (given or path.is_dir()):
        return
    tokenizer, trained_with = load_tokenizer(path), source.state.get("tokenizer")
    if given is None and trained_with not in (None, tokenizer.fingerprint):
        raise CheckpointError(
            f"{path} holds another tokenizer (sha256 {tokenizer.fingerprint}) than the model was "
            f"trained with ({trained_with}); give that one with --tokenizer"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{path} has {tokenizer.vocab_size} tokens, the model's vocabulary is "
            f"{model.vocab_size}; give the model's tokenizer with --tokenizer"
        )
    if path.is_dir() and (path / "tokenizer_config.json").is_file():
        for name in hub.TOKENIZER_FILES:
            if (path / name).is_file():
                shutil.copyfile(path / name, folder / name)
        return
    export(tokenizer, folder, model.max_position_embeddings)


def dataset_of(checkpoint: Path) -> Path | None:
    """The dataset folder that a checkpoint's configuration names."""
    path = checkpoint / CONFIG
    if not path.is_file():
        return None
    try:
        return Path(configfile.load(str(path)).data.path)
    except ConfigError:
        return None


def write_json(path: Path, value: dict[str, object]) -> None:
    """A JSON file as people like to read it."""
    text = json.dumps(value, indent=2) + "\n"
    with writing(path, len(text)):
        path.write_text(text, encoding="utf-8")


def size(text: str) -> int:
    """Bytes of ``5GB``, ``500MB`` or a plain number; ConfigError otherwise."""
    number, unit = text.strip().upper(), 1
    for suffix, factor in UNITS.items():
        if number.endswith(suffix):
            number, unit = number.removesuffix(suffix), factor
    number = number.strip()
    if not number.isdigit() or int(number) < 1:
        raise ConfigError(f"--max-shard-size={text} is no size; write 5GB, 500MB or bytes")
    return int(number) * unit


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser("llamax consolidate", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest)")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="default: that of the weights")
    parser.add_argument("--max-shard-size", default="5GB", help="bytes per file (default 5GB)")
    parser.add_argument("--tokenizer", help="tokenizer file or folder; default: the dataset's")
    parser.add_argument("--no-verify", action="store_true", help="do not hash what is read")
    args = parser.parse_args(argv)
    source = Checkpoint(find(Path(args.checkpoint)), verify=False)
    dtype = DTYPES[args.dtype] if args.dtype else None
    total = sum(plan(source, name, dtype).size_bytes for name in source.names())
    began = time.perf_counter()
    with tqdm(total=total, unit="B", unit_scale=True, desc="consolidate", leave=False) as bar:
        out = consolidate(
            source.folder,
            args.out,
            dtype,
            size(args.max_shard_size),
            args.tokenizer,
            not args.no_verify,
            bar.update,
        )
    parameters = sum(math.prod(source.shape(name)) for name in source.names())
    print(
        f"{out}: {show_number(parameters)} parameters of step {source.step}, {show_bytes(total)}, "
        f"in {show_time(time.perf_counter() - began)}"
    )
    if not (out / "tokenizer.json").is_file():
        print("no tokenizer was found for it; --tokenizer adds one")
    return 0
