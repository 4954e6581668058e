"""How fast checkpoints are merged, split and loaded, and with how much memory.

    python benchmarks/checkpoints.py [--rounds 3] [--folder DIR] [--smallest]

A Llama of 0.8 G parameters in bfloat16 (1.6 GB), tensor 8, random weights.  Each contender does the
whole job in a fresh process with one torch thread; contenders take turns, times are medians,
memory is the growth of the resident peak.  "Everything" is what most converters do: read all
tensors, ``torch.cat`` or ``narrow`` them, ``save_file``.  Files are in the page cache.  llamax
checks what it reads from a checkpoint and hashes what it writes into one, and splitting waits until
the disk has it all; the others do neither, and "unverified" is the like-for-like.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llamax.checkpoint import Checkpoint, load_weights
from llamax.checkpoint.consolidate import consolidate
from llamax.checkpoint.hf_folder import HfFolder
from llamax.checkpoint.shard_hf import shard
from llamax.config.model import ModelConfig
from llamax.model.llama import Llama
from llamax.parallel.collectives import Solo
from llamax.parallel.sharding import cut, join

TENSOR, RANK = 8, 3
LARGE = ModelConfig(
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=15,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
)
SMALL = dataclasses.replace(
    LARGE, hidden_size=64, intermediate_size=128, num_hidden_layers=1, vocab_size=256
)


class Place(Solo):
    """A tensor axis seen from one rank, with nobody at its other end."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__("tp")
        self.size, self.rank = size, rank


def cuts(model: ModelConfig) -> dict[str, tuple[object, tuple[int, ...]]]:
    """How each Hub tensor is cut, and its whole shape."""
    llama = Llama(model, device="meta")
    parameters = llama.sharded_parameters()
    how = parameters.hub_cuts()
    return {name: (how[name], shape) for name, shape in parameters.hub_shapes().items()}


def build(folder: Path, model: ModelConfig) -> None:
    """A Hugging Face folder, our checkpoint of it, and plain per-rank files."""
    hub = folder / "hub"
    hub.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for name, (_, shape) in cuts(model).items()
    }
    save_file(tensors, hub / "model.safetensors", {"format": "pt"})
    (hub / "config.json").write_text(json.dumps(model.to_hub("bfloat16")))
    shard(hub, folder / "checkpoint", TENSOR)
    (folder / "plain").mkdir()
    for rank in range(TENSOR):
        mine = {n: cut(tensors[n], how, TENSOR, rank) for n, (how, _) in cuts(model).items()}
        save_file(mine, folder / "plain" / f"rank{rank}.safetensors")


def shape(folder: Path) -> ModelConfig:
    """The model of the folder that ``build`` has made."""
    return ModelConfig.from_hub(json.loads((folder / "hub" / "config.json").read_text()))


def merge_everything(folder: Path, out: Path) -> None:
    ranks = [load_file(folder / "plain" / f"rank{r}.safetensors") for r in range(TENSOR)]
    whole = {
        n: join([rank[n] for rank in ranks], how) for n, (how, _) in cuts(shape(folder)).items()
    }
    out.mkdir()
    save_file(whole, out / "model.safetensors", {"format": "pt"})


def merge_streamed(folder: Path, out: Path) -> None:
    consolidate(folder / "checkpoint", out)


def merge_unverified(folder: Path, out: Path) -> None:
    consolidate(folder / "checkpoint", out, verify=False)


def merge_by_two_processes(folder: Path, out: Path) -> None:
    consolidate(folder / "checkpoint", out, processes=2)


def save_by_transformers(folder: Path, out: Path) -> None:
    """The whole model in memory, as a trainer that ends in save_pretrained has it; then that."""
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(folder / "hub", dtype="auto").save_pretrained(out)


def split_everything(folder: Path, out: Path) -> None:
    whole = load_file(folder / "hub" / "model.safetensors")
    out.mkdir()
    for rank in range(TENSOR):
        mine = {n: cut(whole[n], how, TENSOR, rank) for n, (how, _) in cuts(shape(folder)).items()}
        save_file(mine, out / f"rank{rank}.safetensors")


def split_streamed(folder: Path, out: Path) -> None:
    shard(folder / "hub", out, TENSOR)


def load_whole(folder: Path, out: Path) -> None:
    """Every tensor in memory, then this rank's share of each."""
    whole = {n: t.clone() for n, t in load_file(folder / "hub" / "model.safetensors").items()}
    for name, (how, _) in cuts(shape(folder)).items():
        cut(whole[name], how, TENSOR, RANK)


def one_rank(folder: Path) -> Llama:
    return Llama(shape(folder), Place(TENSOR, RANK), dtype=torch.bfloat16)


def load_hub(folder: Path, out: Path) -> None:
    model = one_rank(folder)
    source = HfFolder(folder / "hub")
    load_weights(source, model.sharded_parameters())


def load_checkpoint(folder: Path, out: Path, verify: bool = True) -> None:
    model = one_rank(folder)
    source = Checkpoint(folder / "checkpoint", verify)
    load_weights(source, model.sharded_parameters())


def load_unverified(folder: Path, out: Path) -> None:
    load_checkpoint(folder, out, verify=False)


QUESTIONS: dict[str, list[Callable[[Path, Path], None]]] = {
    "merge tensor 8 into one file": [
        merge_everything,
        merge_streamed,
        merge_unverified,
        merge_by_two_processes,
        save_by_transformers,
    ],
    "split one file into tensor 8": [split_everything, split_streamed],
    "load one rank of 8": [
        load_whole,
        load_hub,
        load_checkpoint,
        load_unverified,
    ],
}
JOBS = {job.__name__: job for jobs in QUESTIONS.values() for job in jobs}


def status_bytes(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024


def measure(name: str, folder: Path) -> tuple[float, float, int]:
    """Do one job in this process: seconds, CPU seconds, growth of the resident peak."""
    torch.set_num_threads(1)
    out = folder / "out"
    Path("/proc/self/clear_refs").write_text("5")
    before, start, cpu = status_bytes("VmRSS"), time.perf_counter(), time.process_time()
    JOBS[name](folder, out)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    growth = status_bytes("VmHWM") - before
    shutil.rmtree(out, ignore_errors=True)
    return seconds, cpu, growth


def alone(name: str, folder: Path) -> tuple[float, float, int]:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--alone", name, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, cpu, growth = json.loads(done.stdout)
    return seconds, cpu, growth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--alone", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--smallest", action="store_true", help="smallest size, in one process, only to try it"
    )
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args.alone, args.folder)))
        return
    run = measure if args.smallest else alone
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="checkpoints-") as temporary:
        folder = Path(temporary)
        build(folder, SMALL if args.smallest else LARGE)
        size_bytes = (folder / "hub" / "model.safetensors").stat().st_size
        print(f"{size_bytes / 1e9:.2f} GB, medians of {args.rounds} rounds\n")
        print("| question | way | s | times faster | CPU s | memory growth, MB |")
        print("|---|---|---|---|---|---|")
        for question, jobs in QUESTIONS.items():
            found: dict[str, list[tuple[float, float, int]]] = {job.__name__: [] for job in jobs}
            for _ in range(args.rounds):
                for job in jobs:
                    found[job.__name__].append(run(job.__name__, folder))
            base = statistics.median(run[0] for run in found[jobs[0].__name__])
            for name, runs in found.items():
                seconds, cpu = (statistics.median(run[i] for run in runs) for i in (0, 1))
                growth = max(run[2] for run in runs)
                print(
                    f"| {question} | {name.replace('_', ' ')} | {seconds:.2f} "
                    f"| {base / seconds:.1f} | {cpu:.2f} | {growth / 1e6:.0f} |"
                )


if __name__ == "__main__":
    main()
