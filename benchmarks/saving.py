"""Cost of checkpoints: the stall of training, the disk's time, hashes, and the manifest of 70B.

    python benchmarks/saving.py [--rounds 3] [--folder DIR] [--smallest]
    python benchmarks/saving.py --plan [--folder DIR] [--smallest]

Saving is compared with a durable copy of the same files, with ``async_save`` of torch's distributed
checkpoints and with safetensors' ``save_file``, loading with reading the files; all take turns.
Each deletes what it wrote in its turn before, which is not timed: so each gets memory for the page
cache that was in use until then.
``--plan`` builds the manifest and the (sparse) files of Llama-2-70B saved by tensor 32 x data 32
ranks with ZeRO-1, plans from them, and runs ``llamax inspect`` on them.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import async_save

from llamax.checkpoint import Checkpoint, Saver, hf_writer, load_owned
from llamax.checkpoint import manifest as files
from llamax.checkpoint.checksums import BLOCK_BYTES, CHECKSUM_BYTES
from llamax.checkpoint.owned_runs import is_writer, slices
from llamax.checkpoint.runs import Run, whole_run
from llamax.checkpoint.safetensors_io import TAGS, build_header
from llamax.config.load import load_config
from llamax.config.model import ModelConfig
from llamax.config.schema import CheckpointConfig
from llamax.config.step_folders import MANIFEST, step_name
from llamax.model.llama import Llama
from llamax.parallel.collectives import Axes
from llamax.parallel.sharding import ShardedParameter, ShardedParameters, local_shape, whole_shape

LARGE = ModelConfig(
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=6,
    num_attention_heads=16,
    num_key_value_heads=8,
    vocab_size=16000,
)
SMALL = replace(LARGE, hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=256)
PLANS = {"70B": ("llama2-70b", 32, 32), "smallest": ("demo", 2, 2)}  # recipe, tensor, data


class Run1(NamedTuple):
    """All of a parameter, owned by the one rank there is."""

    name: str
    kind: str
    start: int
    tensor: Tensor


Took = tuple[float, float]


def now() -> Took:
    """The clock, and this process' CPU seconds (which say more on a busy machine)."""
    return time.perf_counter(), time.process_time()


def since(began: Took) -> Took:
    clock, cpu = now()
    return clock - began[0], cpu - began[1]


def timed(act: Callable[..., object], *args: object) -> Took:
    began = now()
    act(*args)
    return since(began)


def read(folder: Path) -> None:
    buffer = bytearray(1 << 20)
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that reading them is reading the disk."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def copy(folder: Path, out: Path) -> None:
    """Copy a checkpoint as plainly as is durable: every file and the folder are synced."""
    out.mkdir()
    for path in folder.iterdir():
        shutil.copyfile(path, out / path.name)
        sync(out / path.name)
    sync(out)


def by_safetensors(tensors: dict[str, Tensor], out: Path) -> None:
    """What a trainer without a saver of its own does; made durable as ours is."""
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    sync(out / "model.safetensors")
    sync(out)


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def rounds(count: int, folder: Path, shape: ModelConfig) -> None:
    model = Llama(shape).init(0)
    parameters = dict(model.named_parameters())
    owned = [
        Run1(name, kind, 0, p.detach().view(-1) if kind == "weight" else torch.rand(p.numel()))
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for name, p in parameters.items()
    ]
    tensors = {f"{one.name}:{one.kind}": one.tensor for one in owned}
    saver = Saver(folder, Axes.solo("cpu"), model.sharded_parameters(), CheckpointConfig(keep=0))
    began = now()
    saver.prepare(owned)
    saver.wait()
    found: dict[str, list[Took]] = {"memory for the first save, in the background": [since(began)]}

    def note(what: str, took: Took) -> None:
        found.setdefault(what, []).append(took)

    def emptied(name: str) -> Path:
        shutil.rmtree(folder / name, ignore_errors=True)
        return folder / name

    for step in range(1, count + 1):
        emptied(step_name(step - 1))
        began = now()
        saver.save(step, owned, {}, shape.to_hub("float32"), "")
        note(f"save: training waits{', the first time' * (step == 1)}", since(began))
        saver.wait()
        note("save: until committed", since(began))
        checkpoint = folder / step_name(step)
        size_bytes = sum(path.stat().st_size for path in checkpoint.iterdir())
        note("plain copy, durable", timed(copy, checkpoint, emptied("copy")))
        out = emptied("safetensors")
        note("safetensors' save_file, durable: training waits", timed(by_safetensors, tensors, out))
        out, began = emptied("dcp"), now()
        future = async_save(tensors, checkpoint_id=out, no_dist=True)
        note("torch's DCP async_save: training waits", since(began))
        assert isinstance(future, Future)
        future.result()
        note("torch's DCP async_save: until committed", since(began))
        for state in ("cached", "from disk"):
            cold = state == "from disk"
            if cold:
                forget(checkpoint)
            note(f"plain read, {state}", timed(read, checkpoint))
            for anew, verify in product((True, False), (False, True)):
                if cold:
                    forget(checkpoint)
                into = "new memory" if anew else "memory in use"
                word = "checked" if verify else "not checked"
                took = timed(load, checkpoint, owned, model, verify, anew)
                note(f"load, {state}, into {into}, {word}", took)
        note("all files verified", timed(Checkpoint(checkpoint).verify))
    print(f"{size_bytes / 1e6:.0f} MB, medians of {count} rounds\n")
    print("| what | s | CPU s | MB a CPU s |\n|---|---|---|---|")
    for what, turns in found.items():
        clock, cpu = (statistics.median(one[i] for one in turns) for i in (0, 1))
        rate = size_bytes / 1e6 / cpu
        print(f"| {what} | {clock:.2f} | {cpu:.2f} | {rate:.0f} |")
    saves, copies = found["save: until committed"], found["plain copy, durable"]
    for i, unit in enumerate(("s", "CPU s")):
        ratio = statistics.median(a[i] / b[i] for a, b in zip(saves, copies, strict=True))
        print(f"committed save / plain copy, median of the rounds, {unit}: {ratio:.2f}")


def load(checkpoint: Path, owned: list[Run1], model: Llama, verify: bool, anew: bool) -> None:
    """Fill what a run owns, as training does: it is there already, or made ``anew``."""
    if anew:
        owned = [one._replace(tensor=torch.empty_like(one.tensor)) for one in owned]
    load_owned(Checkpoint(checkpoint, verify), owned, model.sharded_parameters())


def blank_sums(header: bytes, sizes_bytes: list[int]) -> bytes:
    """As many checksums as a file has blocks: the header's and each tensor's."""
    blocks = sum(-(-size // BLOCK_BYTES) for size in (len(header), *sizes_bytes))
    return bytes(blocks * CHECKSUM_BYTES)


def share_of(llama: Llama, degree: int, rank: int) -> ShardedParameters:
    """What a tensor rank would hold of a whole model."""
    found = {
        name: ShardedParameter(torch.empty(local_shape(p.shape, how, degree), device="meta"), how)
        for name, (p, how) in llama.sharded_parameters().items()
    }
    return ShardedParameters(found, degree, rank)


def build(folder: Path, recipe: str, tensor: int, data: int, bucket: int = 1 << 22) -> int:
    """A checkpoint of a recipe whose files hold headers and holes; how many runs it has."""
    model = load_config(recipe).model
    llama = Llama(model, device="meta")
    manifest = files.Manifest(
        format=files.FORMAT_VERSION,
        step=1,
        llamax="",
        torch=torch.__version__,
        mesh={"tensor": tensor, "data": data, "zero": 1},
        model=model.to_hub("bfloat16"),
        state={},
    )
    kinds = {"weight": torch.bfloat16, **dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), None)}
    count, piece = 0, bucket // data
    shapes: dict[str, tuple[int, ...]] = {}
    for tp in range(tensor):
        inside: dict[int, list[tuple[str, Run]]] = {rank: [] for rank in range(data)}
        at = 0
        share = share_of(llama, tensor, tp)
        for name, (local, _) in share.items():
            how_of = {part.name: part.how for part in share.parts(name)}
            start, size = 0, local.numel()
            while start < size:
                rank = (at + start) // piece % data
                length = min(size - start, piece - (at + start) % piece)
                for one in slices(share, name, start, length):
                    if is_writer(how_of[one.name], tensor, tp):
                        inside[rank].append((one.name, one.run))
                        shapes[one.name] = whole_shape(how_of[one.name], local.shape)
                start += length
            at += size
        for rank, runs in inside.items():
            for role in ("weights", "optimizer"):
                entries = []
                for kind, dtype in kinds.items():
                    if (kind == "weight") == (role == "weights"):
                        stored = dtype or torch.float32
                        for name, run in runs:
                            entries.append((files.run_key(name, kind, run), stored, (run.length,)))
                            kept = manifest.kind(name, kind, shapes[name], TAGS[stored])
                            kept.add(len(manifest.files), run)
                            count += 1
                start_bytes, _, size_bytes = build_header(entries)
                path = folder / files.file_name(role, tp, rank)
                path.write_bytes(start_bytes)
                os.truncate(path, size_bytes)
                sizes = [shape[0] * dtype.itemsize for _, dtype, shape in entries]
                sums = blank_sums(start_bytes, sizes)
                manifest.files.append(
                    files.FileRecord(path.name, size_bytes, len(start_bytes), sums)
                )
    cpu = time.process_time()
    files.write_manifest(folder, manifest, "")
    print(f"checked and written in {time.process_time() - cpu:.1f} CPU s")
    files.write_done(folder)
    return count


def planning(folder: Path, recipe: str, tensor: int, data: int) -> None:
    folder = folder / step_name(1)
    folder.mkdir()
    count = build(folder, recipe, tensor, data)
    text = sum((folder / name).stat().st_size for name in (MANIFEST, files.INDEX))
    apparent = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"{count:,} runs in {len([*folder.iterdir()])} files of {apparent / 1e12:.2f} TB (sparse)"
    )
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"planning ended with status {status}")
        inspecting(folder)
        return
    cpu, began = time.process_time(), time.perf_counter()
    source = Checkpoint(folder, verify=False)
    opened = time.process_time() - cpu
    planned = hf_writer.plan_files(source)
    pieces = {
        piece.path
        for one in planned
        for piece in source.pieces(one.name, one.kind, whole_run(one.shape))
    }
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - began
    names = {one.file for one in planned}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"manifest of {text / 1e6:.0f} MB opened in {opened:.1f} CPU s; {len(planned)} tensors "
        f"from {len(pieces)} files planned into {len(names)} after {cpu:.1f} CPU s "
        f"({seconds:.1f} s), peak {peak:.2f} GB"
    )
    os._exit(0)


def inspecting(folder: Path) -> None:
    """``llamax inspect`` as a process of its own."""
    words = [sys.executable, "-m", "llamax", "inspect", str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"llamax inspect ended with status {status}")
    cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3
    print(f"llamax inspect: {cpu:.2f} CPU s of a whole process, peak {peak:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plan", action="store_true", help="plan from a 70B manifest instead")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--smallest", action="store_true", help="smallest size, only to try it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="saving-") as temporary:
        if args.plan:
            planning(Path(temporary), *PLANS["smallest" if args.smallest else "70B"])
        else:
            rounds(args.rounds, Path(temporary), SMALL if args.smallest else LARGE)


if __name__ == "__main__":
    main()
