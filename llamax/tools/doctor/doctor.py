"""All checks of a machine and of a job on it, in order.

::

    ok       torch        torch 2.9.0
    WARNING  ports        port 29500 lies in 1024-60999, which the kernel assigns to connections
             why          an outgoing connection may use it when the ranks rendezvous there
             fix          sudo sysctl -w net.ipv4.ip_local_reserved_ports=29500
    unknown  devices      no Neuron device here; the job needs 16 on each node
             see          run doctor on a node

Without a job only the machine is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from llamax.config.constants import RENDEZVOUS_PORT
from llamax.config.hardware import LOCAL, Machine
from llamax.config.neuron_sdk import installed_sdk
from llamax.config.rules.pipeline import chunk_layers
from llamax.config.schema import BackendName, Config
from llamax.launch.environment import sdk_notes
from llamax.launch.jobfile import JobFile
from llamax.parallel.rendezvous import NEURON_PORT
from llamax.runtime.units import show_bytes, show_time
from llamax.tools.audit import compile_cache
from llamax.tools.audit.compile_cache import FLAGS, Note
from llamax.tools.doctor import (
    Finding,
    Host,
    job_files,
    launchers,
    machine,
    run_inputs,
    sagemaker,
    storage,
    versions,
)
from llamax.tools.doctor.finding import passed
from llamax.tools.doctor.shared_cache import shared_cache
from llamax.tools.plan import Plan, nearest, plan_run
from llamax.tools.plan.report import RISKS
from llamax.training.compile_guard import all_programs
from llamax.training.resolve import ResolvedRun, resolve, visible_samples


def examine(
    host: Host, job: JobFile | None, wait_s: float, launcher: str = ""
) -> Iterator[Finding]:
    """The findings about a machine, and about a job on it; waits ``wait_s`` for the other nodes.

    ``launcher``: what will start the job; empty: not known, and SageMaker is not meant.
    """
    if job is not None and launcher == "sagemaker":
        yield from _on_sagemaker(host, job)
        return
    expected = job.machine if job else observed(host)
    yield from versions.check(host, job.config.run.backend if job else expected.backend)
    yield from job_files.environment(job) if job else ()
    neuron = expected.neuron and expected.devices
    ports = [job.port if job else RENDEZVOUS_PORT] + ([NEURON_PORT] if neuron else [])
    yield from machine.check(host, expected, ports)
    if job is None:
        return
    yield from launchers.check(job, launcher, host.environ)
    yield from _sdk(host, job)
    yield from job_files.secrets(job) if launcher != "k8s" else ()  # a Secret has them
    folder = Path(job.folder)
    yield from storage.check(host, folder, job.nodes, wait_s)
    run = _resolved(job, run_inputs.placed(folder, job.config).data.path)
    found = _plan(run, job)
    if found is not None:
        yield from _fits(found, job)
    yield from storage.disk(folder, run, found.time.step_s if found else None)
    on_node = job.local or machine.devices_here(host, expected) > 0
    yield from run_inputs.check(folder, job.config, on_node)
    world = job.nodes * job.ranks
    hashes = cache(partial(compile_cache.hashes, job.config, world, job.ranks, host.environ))
    note = Note(host.version("neuronx-cc"), host.environ.get(FLAGS, ""))
    if url := host.environ.get("NEURON_COMPILE_CACHE_URL"):
        yield from storage.cache(url, programs(job.config), hashes, note)
    if job.compile_cache and job.machine.neuron:
        yield from shared_cache(job.compile_cache, hashes, note)


def _on_sagemaker(host: Host, job: JobFile) -> Iterator[Finding]:
    """The findings about a job whose containers have nothing of this machine, but in local mode."""
    if job.sagemaker.local:
        yield from machine.check(host, job.machine, [job.port])
    yield from launchers.check(job, "sagemaker", host.environ)
    yield from _sdk(host, job)
    run = _resolved(job, job.sagemaker.data.removeprefix(sagemaker.LOCAL))
    found = _plan(run, job)
    if found is not None:
        yield from _fits(found, job)
    yield from sagemaker.disk(job, run)
    yield from sagemaker.inputs(job)


def _resolved(job: JobFile, data: str) -> ResolvedRun:
    """The run of a job on its ranks, with the samples of the dataset at ``data``, if it is here."""
    samples = visible_samples(job.config, data)
    return resolve(job.config, job.nodes * job.ranks, *samples, node_ranks=job.node_limit)


def _sdk(host: Host, job: JobFile) -> Iterator[Finding]:
    """The Neuron SDK of the job file, against the table and what is installed."""
    why = "the image and the variables of the job are those of its SDK"
    for note in sdk_notes(job):
        what, _, fix = note.rpartition("; ")
        yield Finding("warning", "job's SDK", what, why, fix)
    found = installed_sdk(host.version)
    if found is not None and job.machine.neuron and found.sdk != job.sdk.sdk:
        yield Finding(
            "warning",
            "job's SDK",
            f"Neuron SDK {found.sdk.name} is installed, but the job is for {job.sdk.sdk.name}",
            why,
            f'neuron_sdk = "{found.sdk.name}" in the job file, or install the other one',
        )


def observed(host: Host) -> Machine:
    """The machine as it presents itself, which is expected of it where there is no job."""
    backend: BackendName = "neuron" if host.neuron_devices else "cpu"
    if host.gpus or host.version("torch-xla") is not None:
        backend = "cuda" if host.gpus else "xla"
    devices = host.neuron_devices or host.gpus
    return replace(LOCAL, backend=backend, devices=devices, efa=host.efa_adapters)


def programs(config: Config) -> int:
    """The number of programs that a run compiles, as the audit and the compile guard count them."""
    counts = chunk_layers(config.parallel, config.model.num_hidden_layers)
    tied = config.model.tie_word_embeddings and config.finetune.method == "full"
    return all_programs(config.parallel.pipeline, counts, config.run.validates, tied)


def _plan(run: ResolvedRun, job: JobFile) -> Plan | None:
    """The plan of a job's run on an instance that the planner knows."""
    if job.machine is LOCAL:
        return None
    return plan_run(run, job.machine.with_ranks(job.ranks), job.nodes)


def _fits(planned: Plan, job: JobFile) -> Iterator[Finding]:
    memory, time = planned.memory, planned.time
    used = f"{show_bytes(memory.peak)} of {show_bytes(memory.available)} on each core"
    if memory.fits and planned.risks:
        yield Finding(
            "warning",
            "plan",
            f"{used}; a step takes about {show_time(time.step_s)}",
            "; ".join(RISKS[risk] for risk in planned.risks),
            "llamax plan --search lists layouts that are not",
        )
        return
    if memory.fits:
        yield passed("plan", f"{used}; a step takes about {show_time(time.step_s)}")
        return
    near = nearest(job.config, planned.machine, job.nodes)
    if near is None or not near.fits:
        fix = "no layout of the model fits on this instance; take one with more memory"
    else:
        changes = [each.removeprefix("--") for each in near.flags]
        named = [f"overrides {each}" if "." in each.partition("=")[0] else each for each in changes]
        fix = f"in the job file use {', '.join(named)}: the nearest layout that fits"
    yield Finding(
        "error",
        "plan",
        f"{used}, when {memory.moment}",
        "the run would end in its first step, after compilation",
        fix,
    )
