"""``llamax doctor [--job job.toml]``: is this machine ready, and does the plan fit it?

::

    ok       torch        torch 2.9.0
    WARNING  ports        port 29500 lies in 1024-60999, which the kernel hands out
             why          any outgoing connection may hold it when ranks want to meet there
             mend         sudo sysctl -w net.ipv4.ip_local_reserved_ports=29500
    unseen   devices      no Neuron device here, where the job asks for 16 a node
             see          run doctor on a node

Without a job it looks at the machine alone.  The exit code is 8 if there is an error, else 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from llamax.config.hardware import LOCAL, BackendName, Machine
from llamax.config.schema import Config
from llamax.data.dataset import blend_words, open_dataset
from llamax.launch.jobfile import JobFile
from llamax.parallel.rendezvous import NEURON_PORT, PORT
from llamax.runtime.errors import DataError
from llamax.runtime.units import show_bytes, show_time
from llamax.tools.audit import compile_cache
from llamax.tools.doctor import Finding, Host, machine, storage, versions
from llamax.tools.doctor.finding import ok, unseen
from llamax.tools.plan import Plan, plan_run
from llamax.training.compile_guard import PROGRAMS
from llamax.training.resolve import ResolvedRun, resolve, visible_samples


def examine(host: Host, job: JobFile | None, wait_s: float) -> Iterator[Finding]:
    """All findings about a machine, and about a job on it."""
    wanted = job.machine if job else here(host)
    yield from versions.check(host, job.config.run.backend if job else wanted.backend)
    neuron = wanted.neuron and wanted.devices
    ports = [job.port if job else PORT] + ([NEURON_PORT] if neuron else [])
    yield from machine.check(host, wanted, ports)
    if job is None:
        return
    folder = Path(job.folder)
    yield from storage.check(host, folder, job.nodes, wait_s)
    path = _seen_from(folder, job.config.data.path)
    run = resolve(job.config, job.nodes * job.ranks, *visible_samples(job.config, path))
    found = _plan(run, job)
    if found is not None:
        yield from _fits(found)
    yield from storage.disk(folder, run, found.time.step_s if found else None)
    yield from _dataset(path, folder.is_dir())
    if cache := host.environ.get("NEURON_COMPILE_CACHE_URL"):
        world = job.nodes * job.ranks
        hashes = partial(compile_cache.hashes, job.config, world, job.ranks, host.environ)
        yield from storage.cache(cache, count(job.config), hashes)


def here(host: Host) -> Machine:
    """What a machine shows of itself: without a job there is nothing else to hold it against."""
    backend: BackendName = "neuron" if host.neuron_devices else "cpu"
    if host.gpus or host.version("torch-xla") is not None:
        backend = "cuda" if host.gpus else "xla"
    devices = host.neuron_devices or host.gpus
    return replace(LOCAL, backend=backend, devices=devices, efa=host.efa_adapters)


def count(config: Config) -> int:
    """How many programs a run compiles, as the audit counts and the guard allows."""
    return PROGRAMS["training"] + (PROGRAMS["validation"] if config.run.validates else 0)


def _plan(run: ResolvedRun, job: JobFile) -> Plan | None:
    """The plan of a job's run on an instance that the planner knows."""
    if job.machine is LOCAL:
        return None
    return plan_run(run, job.machine.with_ranks(job.ranks), job.nodes)


def _fits(found: Plan) -> Iterator[Finding]:
    memory, time = found.memory, found.time
    told = f"{show_bytes(memory.peak)} of {show_bytes(memory.available)} on a core"
    if memory.fits:
        yield ok("plan", f"{told}; a step takes about {show_time(time.step_s)}")
    else:
        yield Finding(
            "error",
            "plan",
            f"{told}, when {memory.moment}",
            "the run would end at its first step, after it was compiled",
            "llamax plan --search with the same configuration lists what fits",
        )


def _seen_from(folder: Path, path: str) -> str:
    """``data.path``, or every dataset of a blend, seen from a folder."""
    words = enumerate(blend_words(path))
    return " ".join(str(folder / word) if i % 2 else word for i, word in words) or str(
        folder / path
    )


def _dataset(path: str, storage_there: bool) -> Iterator[Finding]:
    if not storage_there:
        yield unseen("dataset", f"{path} is not here", "run doctor where it is")
        return
    try:
        dataset = open_dataset(path, "off")
    except DataError as error:
        yield Finding(
            "error",
            "dataset",
            str(error),
            "training reads it before anything else",
            "llamax launch --phase prepare",
        )
    else:
        yield ok("dataset", f"{len(dataset.train):,} tokens in {path}")
