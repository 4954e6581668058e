"""Checks of the shared storage: seen by all nodes, large and fast enough, with compiled programs.

Each node that runs doctor writes a beacon, a small file with its name and the time of its clock,
and reads the others: a node that sees all beacons shares the folder with all nodes.

Source: AWS Neuron, "Neuron persistent cache" (``neuronxcc-VERSION/MODULE_HASH/model.neff``).
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from llamax.config.constants import DTYPE_BYTES, MASTER_BYTES, MOMENTS_BYTES
from llamax.config.schema import CheckpointConfig, Config
from llamax.runtime.errors import BackendError, LinkError
from llamax.runtime.files import free_bytes, make_folder, new_file, read_file, sync_handle
from llamax.runtime.json_reader import parse_object
from llamax.runtime.text import in_shell
from llamax.runtime.units import count, show_bytes, show_time
from llamax.tools.audit import compile_cache
from llamax.tools.audit.compile_cache import Note
from llamax.tools.doctor.file_operations import check_operations
from llamax.tools.doctor.finding import Finding, Host, passed, unknown
from llamax.tools.plan.sizes import adapter_elements
from llamax.training.resolve import ResolvedRun

Hashes = Callable[[], Mapping[str, str]]
BEACONS = ".llamax-doctor"
FRESH_S = 600  # age of a beacon that counts
SKEW_S = 5.0  # difference between clocks that is a warning
PROBE_BYTES = 32 * 2**20
COMPILES = (
    "each node would compile each program while training waits; published runs of models of 7B and "
    "8B took 25 to 40 minutes"
)
PRECOMPILE = "llamax launch --phase precompile, before --phase train"
LOCAL_KINDS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs")


def check(host: Host, folder: Path, nodes: int, wait_s: float) -> Iterator[Finding]:
    """Whether ``folder`` can be written and is the same one on ``nodes`` machines."""
    try:
        is_here = folder.is_dir()
    except OSError as error:  # a mount that is gone, a stale handle
        yield Finding(
            "error",
            "storage",
            f"{folder} cannot be read: {error.strerror}",
            "checkpoints, logs and compiled programs go there",
            f"mount it again: sudo umount -l {(word := in_shell(folder))}, then sudo mount {word}",
        )
        return
    if not is_here:
        yield unknown("storage", f"{folder} is not here", "run doctor where it is mounted")
        return
    if not os.access(folder, os.W_OK):
        yield Finding(
            "error",
            "storage",
            f"{folder} cannot be written",
            "checkpoints, logs and compiled programs go there",
            f"sudo chown $(id -u) {in_shell(folder)}",
        )
        return
    kind = file_system(host, folder)
    if nodes > 1 and kind in LOCAL_KINDS:
        yield Finding(
            "error",
            "storage",
            f"{folder} is on {kind}, which other machines do not see",
            f"{nodes} nodes read one dataset and write one checkpoint",
            "mount FSx for Lustre or EFS on all nodes and set storage.mount to it",
        )
    else:
        yield passed("storage", f"{folder} is on {kind or 'a file system of unknown kind'}")
    yield from check_operations(folder)
    yield from _beacons(folder, nodes, wait_s, socket.gethostname())


def file_system(host: Host, folder: Path) -> str:
    """The type of the file system of ``folder``; empty where it is not known."""
    path, found = str(folder.resolve()), ("", "")
    for line in (host.read("proc/mounts") or "").splitlines():
        _, place, kind, *_ = line.split()
        inside = place == "/" or path == place or path.startswith(place + "/")
        found = max(found, (place, kind)) if inside else found
    return found[1]


def _beacons(folder: Path, nodes: int, wait_s: float, me: str) -> Iterator[Finding]:
    """Wait for the beacons of the other nodes; compare their clocks with this one."""
    place = folder / BEACONS
    beacon = place / f".{me}"
    limit = time.monotonic() + wait_s
    skew: dict[str, float] = {}
    while True:
        try:
            make_folder(place)
            with open(beacon, "w", opener=new_file) as file:
                file.write(json.dumps({"node": me, "time": time.time()}))
            beacon.replace(place / f"{me}.json")
        except OSError as error:
            with suppress(OSError):
                beacon.unlink()
            yield unknown(
                "shared",
                f"{place} cannot be written: {error.strerror}",
                "run doctor again when the file system allows it",
            )
            return
        for node, away in _read_beacons(place, me):
            skew[node] = min(skew.get(node, away), away, key=abs)
        if len(skew) >= nodes - 1 or time.monotonic() >= limit:
            break
        time.sleep(0.5)
    if len(skew) < nodes - 1:
        yield unknown(
            "shared",
            f"{1 + len(skew)} of {nodes} nodes were seen in {folder}",
            "run doctor --wait 60 on all nodes at the same time, with srun or mpirun",
        )
    elif nodes > 1:
        yield passed("shared", f"all {nodes} nodes see {folder}")
    late = {node: away for node, away in skew.items() if abs(away) > SKEW_S}
    if late and wait_s:
        worst = max(late, key=lambda node: abs(late[node]))
        yield Finding(
            "warning",
            "clock skew",
            f"the clock of {worst} differs from this one by {late[worst]:+.1f} s",
            "the times in the logs of nodes cannot be compared",
            f"ssh {worst} sudo systemctl restart chrony",
        )
    elif skew and wait_s:
        yield passed("clock skew", f"below {SKEW_S:.0f} s")


def _read_beacons(place: Path, me: str) -> Iterator[tuple[str, float]]:
    """The fresh beacons of other nodes: the name of the node, and its clock minus this one in s.

    A beacon that is empty, half written or not readable is skipped; its node writes it again.
    """
    for path in place.glob("*.json"):
        try:
            beacon = parse_object(read_file(path))
            node, away = beacon["node"], float(beacon["time"]) - time.time()
        except (OSError, LinkError, ValueError, TypeError, KeyError):
            continue
        if isinstance(node, str) and node != me and abs(away) < FRESH_S:
            yield node, away


def checkpoint_bytes(config: Config) -> int:
    """Bytes of one checkpoint: trained weights, their moments and masters; a Hugging Face copy."""
    whole, width = config.model.num_parameters(), DTYPE_BYTES[config.run.dtype]
    has_masters = width < 4 or config.run.backend == "xla"
    trained = adapter_elements(config) if config.finetune.method != "full" else whole
    hugging_face = whole * width if config.checkpoint.also_hf else 0
    element = width + MOMENTS_BYTES + (MASTER_BYTES if has_masters else 0)
    return trained * element + hugging_face


def disk(folder: Path, run: ResolvedRun, step_s: float | None) -> Iterator[Finding]:
    """Free space for the checkpoints that the run keeps, and the rate of writing them."""
    size, kept = checkpoint_bytes(run.config), run.most_checkpoints
    need = f"{count(kept, 'checkpoint')} of {show_bytes(size)}"
    if not folder.is_dir():
        yield unknown(
            "disk",
            f"up to {need} at the same time",
            f"run doctor where {folder} is mounted",
        )
        return
    free = free_bytes(folder)
    if free is None:
        yield Finding(
            "warning",
            "disk",
            f"{need}; {folder} does not report its free space",
            "a checkpoint that cannot be written ends the run",
            "look up the quota of the storage, or lower checkpoint.keep",
        )
    elif kept * size > free:
        yield Finding(
            "error",
            "disk",
            f"{need}, {show_bytes(free)} free in {folder}",
            "a checkpoint that cannot be written ends the run",
            "enlarge the file system, or lower checkpoint.keep",
        )
    else:
        yield passed("disk", f"{need}, {show_bytes(free)} free in {folder}")
    setting, interval_s = save_interval(run.config.checkpoint, step_s)
    if kept == 1 or not interval_s:
        return
    try:
        rate, needed = _write_rate(folder), size / interval_s
    except OSError as error:
        yield unknown(
            "write rate",
            f"{folder} cannot be written: {error.strerror}",
            "run doctor again when the file system allows it",
        )
        return
    rates = f"{show_bytes(needed)}/s needed on average, one process writes {show_bytes(rate)}/s"
    if needed > rate:
        yield Finding(
            "warning",
            "write rate",
            rates,
            "training waits until the previous checkpoint is written",
            f"raise {setting}, or the file system's throughput",
        )
    else:
        yield passed("write rate", f"{rates}; a checkpoint every {show_time(interval_s)}")


def save_interval(checkpoint: CheckpointConfig, step_s: float | None) -> tuple[str, float]:
    """The setting that saves most often, with its value, and its interval in seconds; 0: none."""
    every, minutes = checkpoint.every, checkpoint.every_minutes
    intervals = {
        f"checkpoint.every above {every}": every * (step_s or 0.0),
        f"checkpoint.every_minutes above {minutes:g}": 60.0 * minutes,
    }
    known = {setting: interval_s for setting, interval_s in intervals.items() if interval_s}
    return min(known.items(), key=lambda item: item[1], default=("", 0.0))


def _write_rate(folder: Path) -> float:
    """Bytes/s that this process writes to one file and flushes."""
    path, data = folder / f".llamax-probe-{os.getpid()}", os.urandom(2**20)
    start = time.perf_counter()
    try:
        with open(path, "wb", opener=new_file) as file:
            for _ in range(PROBE_BYTES // len(data)):
                file.write(data)
            file.flush()
            sync_handle(file.fileno(), path)
    finally:
        path.unlink(missing_ok=True)
    return PROBE_BYTES / (time.perf_counter() - start)


def cache(url: str, count: int, hashes: Hashes, note: Note) -> Iterator[Finding]:
    """The compile cache: present, writable, and with the programs of the run.

    ``count``: the number of programs of the run.  ``hashes`` returns their hashes, or raises
    BackendError where they cannot be traced; it is called only if the cache has notes.  ``note``:
    the compiler and the flags of this machine.
    """
    if "://" in url:
        yield unknown("compile cache", f"{url} is not a folder", f"aws s3 ls --recursive {url}")
        return
    folder = Path(url)
    if not folder.is_dir():
        if folder.parent.is_dir():
            yield _compiles(f"{folder} is empty")
        else:
            yield unknown(
                "compile cache", f"{folder} is not here", "run doctor where it is mounted"
            )
        return
    modules = list(folder.glob("*/MODULE_*"))
    done = [path for path in modules if (path / "model.neff").exists()]
    if not os.access(folder, os.W_OK):
        yield Finding(
            "error",
            "compile cache",
            f"{folder} cannot be written",
            "compiled programs would be lost",
            f"sudo chown -R $(id -u) {in_shell(folder)}",
        )
    elif len(done) < len(modules):
        failed = next(path for path in modules if path not in done)
        yield Finding(
            "warning",
            "compile cache",
            f"{len(modules) - len(done)} of {len(modules)} programs have no model.neff",
            "a failed compilation is cached and fails again immediately",
            f"cat {in_shell(failed)}/*.log; then rm -r {in_shell(failed)} and precompile again",
        )
    elif len(done) < count:
        yield _compiles(f"{_programs(len(done))} in {folder}; the run has {count}")
    else:
        yield from _precompiled(folder, len(done), hashes, note)


def _precompiled(folder: Path, done: int, hashes: Hashes, note: Note) -> Iterator[Finding]:
    """Whether the programs in the cache are those of the run."""
    compiled = f"{_programs(done)} in {folder}"
    if not compile_cache.has_notes(folder):
        yield unknown(
            "compile cache",
            f"{compiled}, without notes about their run",
            f"{PRECOMPILE}, writes notes; programs in the cache are not compiled again",
        )
        return
    try:
        found = hashes()
    except BackendError as error:
        yield unknown(
            "compile cache", f"{compiled}; {error}", "run doctor where torch-xla is installed"
        )
        return
    if missing := compile_cache.missing(folder, found, note):
        names = " and ".join(missing)
        yield _compiles(f"{compiled}, without {names} of this run: it changed since precompile")
    else:
        yield passed("compile cache", f"{compiled}, with {', '.join(found)} of this run")


def _programs(count: int) -> str:
    return "1 compiled program" if count == 1 else f"{count or 'no'} compiled programs"


def _compiles(what: str) -> Finding:
    return Finding("warning", "compile cache", what, COMPILES, PRECOMPILE)
