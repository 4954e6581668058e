"""Cost of tuning: ``steps`` beside a full step, ``memory`` of a quantised base by rank, and of
``loading`` a Hugging Face folder.

    python benchmarks/lora.py steps [--rounds 5] [--tokens 512] [--batch 4] [--smallest]
    torchrun --nproc-per-node 4 benchmarks/lora.py memory|loading [--smallest]

``steps`` times one training step of each method in turn, in one process of one thread, in CPU
seconds, and reports which share of a QLoRA step makes weights dense again.  ``memory`` loads a base
of 95 M weights and compares each rank's resident memory with the formula in ``llamax.model.qlora``.
``loading`` reads 158 M weights at tensor 4 (or as many ranks as there are) and compares the growth
of each rank's resident peak with its share and one tensor.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from llamax.backends import choose
from llamax.checkpoint.build_model import load_base
from llamax.checkpoint.hf_folder import open_source
from llamax.checkpoint.source import Source
from llamax.config.model import ModelConfig
from llamax.config.schema import FinetuneConfig, OptimConfig
from llamax.data.loader import Batch
from llamax.model.llama import Llama
from llamax.model.qlora import Nf4, expected, held, stores
from llamax.optim.zero import Zero
from llamax.parallel.collectives import Axes, Solo
from llamax.parallel.mesh import Mesh
from llamax.parallel.rendezvous import rendezvous
from llamax.parallel.sharding import Replica
from llamax.runtime.units import show_bytes
from llamax.training.step import TrainState

LARGE = ModelConfig(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=32000,
)
DEEP = dataclasses.replace(  # nearly all of it is quantised
    LARGE,
    hidden_size=1024,
    intermediate_size=2816,
    num_attention_heads=16,
    num_key_value_heads=8,
    vocab_size=512,
)
SMALL = dataclasses.replace(
    LARGE, hidden_size=128, intermediate_size=192, num_hidden_layers=1, vocab_size=512
)
METHODS = {
    "full": FinetuneConfig(),
    "lora": FinetuneConfig(method="lora", r=16),
    "lora, dropout 0.1": FinetuneConfig(method="lora", r=16, dropout=0.1),
    "qlora nf4": FinetuneConfig(method="qlora", r=16),
    "qlora nf4, single": FinetuneConfig(method="qlora", r=16, double_quant=False),
    "qlora int8": FinetuneConfig(method="qlora", r=16, quant="int8"),
}


def folder(path: Path, shape: ModelConfig) -> Source:
    """A base of random weights."""
    model = Llama(shape).init(0)
    tensors = {}
    for name, parameter in model.named_parameters():
        for part in model.sharded_parameters().parts(name):
            whole = isinstance(part.how, Replica)
            rows = parameter if whole else parameter.narrow(part.how.dim, part.start, part.length)
            tensors[part.name] = rows.detach().clone()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(shape.to_hub("float32")))
    return open_source(path)


def build(source: Source, finetune: FinetuneConfig, axes: Axes) -> Llama:
    """A model of one method, loaded."""
    device = "meta" if finetune.method == "qlora" else "cpu"
    model = Llama(ModelConfig.from_hub(source.model), axes.tp, device=device)
    load_base(model, source, finetune, torch.empty(0), axes.data)
    return model


def steps(shape: ModelConfig, rounds: int, tokens: int, rows: int) -> None:
    """Time every method's step in turn."""
    torch.set_num_threads(1)
    axes, dense = Axes.solo(), {"s": 0.0}
    plain = Nf4.weight

    def timed(store: Nf4) -> torch.Tensor:
        began = time.process_time()
        weight = plain(store)
        dense["s"] += time.process_time() - began
        return weight

    Nf4.weight = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as place:
        source = folder(Path(place), shape)
        teams = {}
        for name, finetune in METHODS.items():
            model = build(source, finetune, axes)
            optimizer = Zero(
                model.sharded_parameters(), OptimConfig(), axes, sequence_parallel=False
            )
            teams[name] = TrainState(
                model,
                optimizer,
                axes,
                step_tokens=rows * tokens,
                learning_rate=lambda step: 1e-4,
            )
    ids = torch.randint(shape.vocab_size, (rows, tokens))
    batch = Batch(ids, ids.roll(-1, 1), torch.arange(tokens).expand_as(ids), None)
    seconds: dict[str, list[float]] = {name: [] for name in teams}
    share: dict[str, list[float]] = {name: [] for name in teams}
    for number in range(1, rounds + 2):
        for name, state in teams.items():
            dense["s"], began = 0.0, time.process_time()
            state.step([batch], number)
            took = time.process_time() - began
            if number > 1:  # the first one warms up
                seconds[name].append(took)
                share[name].append(dense["s"] / took)
    print(f"{rows} x {tokens} tokens, one thread, CPU seconds of a step, median of {rounds}")
    print("| method | s | of a full step | dequantising |\n|---|---|---|---|")
    for name, took in seconds.items():
        ratio = median(a / b for a, b in zip(took, seconds["full"], strict=True))
        part = f"{median(share[name]):.1%}" if median(share[name]) else ""
        print(f"| {name} | {median(took):.2f} | {ratio:.2f} | {part} |")


def resident() -> int:
    """Resident bytes of this process, the allocator's free ones given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(shape: ModelConfig) -> None:
    """What loading a base adds to each rank, beside the formula."""
    where = rendezvous(os.environ)
    mesh = Mesh(dp=where.world_size)
    place = Path(tempfile.gettempdir()) / f"llamax-base-{where.port}"
    with choose("cpu", where, 1).joined(mesh, 600.0) as axes:
        if where.rank == 0:
            place.mkdir()
            folder(place, shape)
        axes.world.all_reduce(torch.zeros(1))
        source = open_source(place)
        build(source, METHODS["qlora nf4"], Axes.solo())  # what a first call allocates for good
        if where.rank == 0:
            print(
                "| method | base | quantised | as it is | counted less formula | resident | of it |"
            )
            print("|---|---|---|---|---|---|---|")
        for name in list(METHODS)[3:]:
            for spread in (True, False):
                finetune = METHODS[name]
                data = axes.data if spread else Solo("data")
                before = resident()
                model = Llama(shape, device="meta")
                load_base(model, source, finetune, torch.empty(0), data)
                grown = resident() - before
                adapters = sum(
                    p.nbytes for p in model.sharded_parameters().trained().tensors.values()
                )
                formula = expected(shape, finetune, 1, data.size, 4)
                bytes_ = torch.tensor([float(grown - adapters)])
                most = float(axes.world.all_reduce(bytes_, "max"))
                total = formula.quantised + formula.plain
                counted = sum(held(model))
                if where.rank == 0:
                    print(
                        f"| {name} | {'spread' if spread else 'whole'} | "
                        f"{show_bytes(formula.quantised)} | {show_bytes(formula.plain)} | "
                        f"{counted - total} | {show_bytes(round(most))} | {most / total:.3f} |",
                        flush=True,
                    )
                del model
        if where.rank == 0:
            for path in place.iterdir():
                path.unlink()
            place.rmdir()


def status_bytes(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024


def loading(shape: ModelConfig) -> None:
    """How far the resident peak of a rank grows while it loads its share of a folder."""
    where = rendezvous(os.environ)
    mesh = Mesh(tp=where.world_size)
    place = Path(tempfile.gettempdir()) / f"llamax-base-{where.port}"
    with choose("cpu", where, 1).joined(mesh, 600.0) as axes:
        if where.rank == 0:
            place.mkdir()
            folder(place, shape)
        axes.world.all_reduce(torch.zeros(1))
        source = open_source(place)
        largest = 4 * shape.vocab_size * shape.hidden_size
        rows = []
        for name in ("full", "full", "lora", "qlora nf4", "qlora int8"):  # the first one warms up
            before = resident()
            Path("/proc/self/clear_refs").write_text("5")
            model = build(source, METHODS[name], axes)
            grown = status_bytes("VmHWM") - before
            share = sum(p.nbytes for p in model.parameters())
            share += sum(t.nbytes for each in stores(model) for t in each.tensors())
            found = torch.tensor([float(grown), grown / (share + largest)])
            most, ratio = axes.world.all_reduce(found, "max").tolist()
            rows.append(
                f"| {name} | {show_bytes(share)} | {show_bytes(largest)} | "
                f"{show_bytes(round(most))} | {ratio:.2f} |"
            )
            del model
        if where.rank == 0:
            print("| method | share of rank 0 | largest tensor | most growth of a peak | of both |")
            print("\n".join(["|---|---|---|---|---|", *rows[1:]]), flush=True)
            for path in place.iterdir():
                path.unlink()
            place.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("steps", "memory", "loading"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--smallest", action="store_true", help="smallest size, only to try it")
    options = parser.parse_args()
    small = SMALL if options.smallest else None
    if options.what == "steps":
        steps(small or LARGE, options.rounds, options.tokens, options.batch)
    elif options.what == "memory":
        memory(small or DEEP)
    else:
        loading(small or dataclasses.replace(DEEP, vocab_size=32000))


if __name__ == "__main__":
    main()
