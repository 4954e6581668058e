"""The shared storage: shared in fact, large and fast enough for the checkpoints, with its graphs.

A node that runs doctor leaves a beacon, a small file with its name and the time by its clock, and
looks for those of the others: who sees them all shares the folder with all.

Source: AWS Neuron, "Neuron persistent cache" (``neuronxcc-VERSION/MODULE_HASH/model.neff``).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from llamax.config.constants import DTYPE_BYTES, MASTER_BYTES, MOMENTS_BYTES
from llamax.config.schema import Config
from llamax.runtime.errors import BackendError
from llamax.runtime.units import show_bytes, show_time
from llamax.tools.audit import compile_cache
from llamax.tools.doctor.finding import Finding, Host, ok, unseen
from llamax.tools.plan.sizes import adapter_elements
from llamax.training.resolve import ResolvedRun

Hashes = Callable[[], Mapping[str, str]]
BEACONS = ".llamax-doctor"
FRESH_S = 600
SKEW_S = 5.0
PROBE_BYTES = 32 * 2**20
COMPILES = "each node would compile for 25 to 40 minutes a program while training waits"
PRECOMPILE = "llamax launch --phase precompile, before --phase train"
PRIVATE = ("ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs")


def check(host: Host, folder: Path, nodes: int, wait_s: float) -> Iterator[Finding]:
    """Whether ``folder`` can be written and is the same one on ``nodes`` machines."""
    if not folder.is_dir():
        yield unseen("storage", f"{folder} is not here", "run doctor where it is mounted")
        return
    if not os.access(folder, os.W_OK):
        yield Finding(
            "error",
            "storage",
            f"{folder} cannot be written",
            "checkpoints, logs and compiled programs go there",
            f"sudo chown $(id -u) {folder}",
        )
        return
    kind = file_system(host, folder)
    if nodes > 1 and kind in PRIVATE:
        yield Finding(
            "error",
            "storage",
            f"{folder} is on {kind}, which no other machine sees",
            f"{nodes} nodes read one dataset and write one checkpoint",
            "mount FSx for Lustre or EFS on all nodes, and name it in storage.mount",
        )
    else:
        yield ok("storage", f"{folder} is on {kind or 'a file system of unknown kind'}")
    yield from _beacons(folder, nodes, wait_s, socket.gethostname())


def file_system(host: Host, folder: Path) -> str:
    """The type of the file system that ``folder`` lies on, or nothing."""
    here, found = str(folder.resolve()), ("", "")
    for line in (host.read("proc/mounts") or "").splitlines():
        _, place, kind, *_ = line.split()
        inside = place == "/" or here == place or here.startswith(place + "/")
        found = max(found, (place, kind)) if inside else found
    return found[1]


def _beacons(folder: Path, nodes: int, wait_s: float, me: str) -> Iterator[Finding]:
    """Meet the other nodes in the folder; how far their clocks are from mine."""
    place = folder / BEACONS
    place.mkdir(exist_ok=True)
    limit = time.monotonic() + wait_s
    skew: dict[str, float] = {}
    while True:
        beacon = place / f".{me}"
        beacon.write_text(json.dumps({"node": me, "time": time.time()}))
        beacon.replace(place / f"{me}.json")
        for path in place.glob("*.json"):
            told = json.loads(path.read_text())
            if abs(away := told["time"] - time.time()) < FRESH_S and told["node"] != me:
                known = skew.get(told["node"], away)
                skew[told["node"]] = min(known, away, key=abs)
        if len(skew) >= nodes - 1 or time.monotonic() >= limit:
            break
        time.sleep(0.5)
    if len(skew) < nodes - 1:
        yield unseen(
            "shared",
            f"{1 + len(skew)} of {nodes} nodes were seen in {folder}",
            "run doctor --wait 60 on all nodes at once, as srun or mpirun would",
        )
    elif nodes > 1:
        yield ok("shared", f"all {nodes} nodes see {folder}")
    late = {node: away for node, away in skew.items() if abs(away) > SKEW_S}
    if late and wait_s:
        worst = max(late, key=lambda node: abs(late[node]))
        yield Finding(
            "warning",
            "clock skew",
            f"{worst}'s clock is {late[worst]:+.1f} s away from this one's",
            "logs of nodes cannot be laid side by side",
            f"ssh {worst} sudo systemctl restart chrony",
        )
    elif skew and wait_s:
        yield ok("clock skew", f"below {SKEW_S:.0f} s")


def size(config: Config) -> int:
    """Bytes of a checkpoint: of all that is trained the weight, its moments, and its master."""
    whole, width = config.model.num_parameters(), DTYPE_BYTES[config.run.dtype]
    apart = width < 4 or config.run.backend == "xla"  # else weights are their own masters
    trained = adapter_elements(config) if config.finetune.method != "full" else whole
    hub = whole * width if config.checkpoint.also_hf else 0
    return trained * (width + MOMENTS_BYTES + (MASTER_BYTES if apart else 0)) + hub


def at_once(run: ResolvedRun) -> int:
    """The most checkpoints that are there at one moment: when the last is just whole.

    Where the length of an epoch decides and the data set was not seen, the run counts as long.
    """
    saved = run.config.checkpoint
    if run.assumption:  # epochs, but not how many steps each has
        saves, unknown = [*range(1, run.epochs * saved.each_epoch), run.epochs], saved.every > 0
    else:
        ends = run.epoch_ends if saved.each_epoch else ()
        every = range(saved.every, run.steps, saved.every) if saved.every else ()
        saves, unknown = sorted({*every, *(ends or ()), run.steps}), ends is None
    newest = saved.keep + 1 if saved.keep else len(saves)
    older = saves[:-newest]
    best = saved.keep_best and bool(older or unknown)
    for_good = 0
    if saved.keep_every and not run.assumption:
        for_good = sum(step % saved.keep_every == 0 for step in older)
    return (newest if unknown else min(newest, len(saves))) + best + for_good


def disk(folder: Path, run: ResolvedRun, step_s: float | None) -> Iterator[Finding]:
    """Room for the checkpoints that the run keeps, and the rate at which it writes them."""
    one, kept, every = size(run.config), at_once(run), run.config.checkpoint.every
    if not folder.is_dir():
        yield unseen(
            "disk",
            f"{kept} checkpoints of {show_bytes(one)} will be there at once",
            f"run doctor where {folder} is",
        )
        return
    free = shutil.disk_usage(folder).free
    told = f"{kept} checkpoints of {show_bytes(one)} in {show_bytes(free)} of {folder}"
    if kept * one > free:
        yield Finding(
            "error",
            "disk",
            told,
            "a checkpoint that finds no room ends the run",
            "enlarge the file system, or lower checkpoint.keep",
        )
    else:
        yield ok("disk", told)
    if step_s is None or kept == 1 or not every:
        return
    rate, needed = _write_rate(folder), one / (every * step_s)
    told = f"{show_bytes(needed)}/s wanted on average, {show_bytes(rate)}/s written by one process"
    if needed > rate:
        yield Finding(
            "warning",
            "write rate",
            told,
            "training waits for the checkpoint before, once the next is due",
            f"raise checkpoint.every above {every}, or the file system's throughput",
        )
    else:
        yield ok("write rate", f"{told}; a checkpoint every {show_time(every * step_s)}")


def _write_rate(folder: Path) -> float:
    """Bytes/s that this process writes and flushes, on one file."""
    path, data = folder / f".llamax-probe-{os.getpid()}", os.urandom(2**20)
    start = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(PROBE_BYTES // len(data)):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    return PROBE_BYTES / (time.perf_counter() - start)


def cache(url: str, count: int, hashes: Hashes) -> Iterator[Finding]:
    """The compile cache: there, writable, and with the run's own programs.

    ``count`` is how many the run has; ``hashes``, asked only where the cache has notes of what was
    precompiled, makes theirs, or raises BackendError where that takes another machine.
    """
    if "://" in url:
        yield unseen("compile cache", f"{url} is not a folder", f"aws s3 ls --recursive {url}")
        return
    folder = Path(url)
    if not folder.is_dir():
        if folder.parent.is_dir():
            yield _compiles(f"{folder} is empty")
        else:
            yield unseen("compile cache", f"{folder} is not here", "run doctor where it is")
        return
    modules = list(folder.glob("*/MODULE_*"))
    done = [path for path in modules if (path / "model.neff").exists()]
    if not os.access(folder, os.W_OK):
        yield Finding(
            "error",
            "compile cache",
            f"{folder} cannot be written",
            "what is compiled would be lost",
            f"sudo chown -R $(id -u) {folder}",
        )
    elif len(done) < len(modules):
        failed = next(path for path in modules if path not in done)
        yield Finding(
            "warning",
            "compile cache",
            f"{len(modules) - len(done)} of {len(modules)} programs have no model.neff",
            "a failed compilation is remembered, and fails again at once",
            f"cat {failed}/*.log; then rm -r {failed} and precompile again",
        )
    elif len(done) < count:
        yield _compiles(f"{_programs(len(done))} in {folder}, where the run has {count}")
    else:
        yield from _own(folder, len(done), hashes)


def _own(folder: Path, done: int, hashes: Hashes) -> Iterator[Finding]:
    """Whether what was precompiled into the cache is what the run will compile."""
    told = f"{_programs(done)} in {folder}"
    if not compile_cache.has_notes(folder):
        yield unseen(
            "compile cache",
            f"{told}, without a note of which run they are",
            f"{PRECOMPILE}, leaves notes; what is there is not compiled again",
        )
        return
    try:
        found = hashes()
    except BackendError as error:
        yield unseen(
            "compile cache", f"{told}; {error}", "run doctor where torch-xla is, as on a node"
        )
        return
    if lacking := compile_cache.missing(folder, found):
        names = " and ".join(lacking)
        yield _compiles(f"{told}, but not the run's {names}: it has changed since precompile")
    else:
        yield ok("compile cache", f"{told}, among them the run's own {', '.join(found)}")


def _programs(count: int) -> str:
    return "1 compiled program" if count == 1 else f"{count or 'no'} compiled programs"


def _compiles(what: str) -> Finding:
    return Finding("warning", "compile cache", what, COMPILES, PRECOMPILE)
