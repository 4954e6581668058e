"""The phase serve: an exported folder behind an HTTP server, in the containers of known engines.

::

    [serve] model, engine, instance ──> Server: image, words, environment ──> docker, Kubernetes

The folder is always mounted at ``/model`` and the server listens on ``serve.port``.  vLLM runs on
GPUs and Trainium, Text Generation Inference (TGI) on GPUs, ``llamax serve`` anywhere.

Sources: AWS Deep Learning Containers, "vLLM Inference" (image, options, health); Text Generation
Inference 3.3, "Quick Tour" and "text-generation-launcher arguments"; AWS Neuron, "Quickstart:
Configure and deploy a vLLM server using Neuron Deep Learning Container" and the list of images in
aws-neuron/deep-learning-containers.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from llamax.config.hardware import Machine
from llamax.config.neuron_sdk import vllm_image
from llamax.launch.jobfile import JobFile
from llamax.runtime.json_reader import JsonError, read_object

MODEL = "/model"  # the exported folder, in the container
ARTIFACTS = "/tmp/neuron-artifacts"  # programs of one container; its model folder is read-only
PROMPT = "The capital of France is"

VLLM_NEURON = "public.ecr.aws/neuron/pytorch-inference-vllm-neuronx"
# Images by engine and run.backend, with the version of the engine in them.
IMAGES = {
    # aws/deep-learning-containers, docs/src/data/vllm-server, 2026-08: vLLM 0.27.0
    ("vllm", "cuda"): "public.ecr.aws/deep-learning-containers/vllm:server-cuda-v2.3",
    ("vllm", "xla"): f"{VLLM_NEURON}:{vllm_image(trn1=True)}",
    ("vllm", "neuron"): f"{VLLM_NEURON}:{vllm_image(trn1=False)}",
    # Text Generation Inference, "Quick Tour": 3.3.5
    ("tgi", "cuda"): "ghcr.io/huggingface/text-generation-inference:3.3.5",
}
# What a server writes when it answers requests.
READY = {"vllm": "Application startup complete", "tgi": "Connected", "llamax": " on http://"}
# The variable with the key that clients must send; it is taken from the table secrets.
API_KEY = {"vllm": "VLLM_API_KEY", "tgi": "API_KEY"}


@dataclass(frozen=True)
class Server:
    """How the container of a job's server is started."""

    image: str
    command: tuple[str, ...]
    """Words that replace the entry point of the image; empty: it is kept."""
    arguments: tuple[str, ...]
    """Words after the command or the entry point."""
    environment: dict[str, str]
    ready: str
    """Part of the line that the server writes when it answers requests."""
    secrets: tuple[tuple[str, str], ...]
    """Variables of the table secrets that the server reads, with their files."""

    @property
    def words(self) -> tuple[str, ...]:
        """The command and its arguments."""
        return (*self.command, *self.arguments)


def server(job: JobFile) -> Server:
    """The server of a job without problems."""
    settings, machine, ranks = job.serve, job.server_machine, devices(job)
    engine, backend = settings.engine, machine.backend
    command: tuple[str, ...] = ()
    environment = {}
    if engine == "tgi":
        words = ["--model-id", MODEL, "--num-shard", str(ranks), "--port", str(settings.port)]
        words += ["--usage-stats", "off"]
        words += ["--max-total-tokens", str(settings.length)] if settings.length else []
    elif engine == "vllm":
        # the image for GPUs adds `vllm serve`, those for Neuron run the words that they get
        command = ("vllm", "serve") if machine.neuron else ()
        words = ["--model", MODEL, "--served-model-name", job.name]
        words += ["--tensor-parallel-size", str(ranks)]
        words += ["--host", "0.0.0.0", "--port", str(settings.port)]
        words += ["--max-model-len", str(settings.length)] if settings.length else []
        words += ["--max-num-seqs", str(settings.slots)] if settings.slots else []
        environment = {"VLLM_NO_USAGE_STATS": "1"}
        if backend == "xla":
            words += ["--no-enable-prefix-caching"]
            environment["NEURON_COMPILED_ARTIFACTS"] = ARTIFACTS
    else:
        command = ("python3", "-m", "llamax", "serve")
        words = [MODEL, "--name", job.name, "--host", "0.0.0.0", "--port", str(settings.port)]
        words += ["--backend", backend]
        words += ["--length", str(settings.length)] if settings.length else []
        words += ["--slots", str(settings.slots)] if settings.slots else []
    return Server(
        image=settings.image or IMAGES.get((engine, backend), job.image),
        command=command,
        arguments=tuple(words),
        environment=environment | dict(job.environment),
        ready=READY[engine],
        secrets=tuple(pair for pair in job.secrets if pair[0] == API_KEY.get(engine)),
    )


def devices(job: JobFile) -> int:
    """The GPUs or NeuronCores that share the model."""
    if job.serve.engine == "llamax":
        return min(1, job.server_machine.ranks)
    return job.serve.devices or job.server_machine.ranks


def chips(job: JobFile) -> int:
    """The GPUs or Trainium chips of the server, as Kubernetes counts them."""
    machine = job.server_machine
    return -(-devices(job) * machine.devices // machine.ranks) if machine.ranks else 0


def folder(job: JobFile) -> str:
    """The exported folder, outside the container."""
    return os.path.normpath(os.path.join(job.folder, job.serve.model))


def body(job: JobFile) -> dict[str, Any]:
    """A request that shows whether a server answers."""
    return {"model": job.name, "prompt": PROMPT, "max_tokens": 20}


def request(job: JobFile, url: str) -> str:
    """The command that sends a request to a server at ``url``."""
    key = API_KEY.get(job.serve.engine)
    header = ""
    if key in dict(job.secrets):
        path = quote(dict(job.secrets)[key or ""])
        header = f' --header "Authorization: Bearer $(<{path})"'
    return (
        f"curl {url}/v1/completions{header} "
        f"--header 'Content-Type: application/json' --data {quote(json.dumps(body(job)))}"
    )


def title(job: JobFile, launcher: str) -> str:
    """One line that describes a script or a manifest."""
    return f"serve with {job.serve.engine} on {job.server_machine.name}, {launcher}"


def problems(job: JobFile) -> Iterator[str]:
    """What the engine would refuse, one line each."""
    settings, machine = job.serve, job.server_machine
    yield from _engine(job, machine)
    if settings.devices > machine.ranks and machine.ranks:
        yield (
            f"serve.devices={settings.devices} but {machine.name} has {machine.ranks} "
            f"{machine.unit}; use {machine.ranks} or less"
        )
    elif heads := _heads(job):
        shared = devices(job)
        if shared and heads % shared:
            fitting = max(number for number in range(1, shared + 1) if heads % number == 0)
            yield (
                f"{shared} {machine.unit} cannot share the {heads} attention heads of "
                f"{folder(job)} equally; use serve.devices={fitting}"
            )
    if settings.engine == "llamax" and settings.devices > 1:
        yield f"serve.devices={settings.devices} but llamax serves on one device; remove it"
    if settings.engine == "tgi" and settings.slots:
        yield (
            f"serve.slots={settings.slots} has no equal in tgi, which fills its memory; remove it"
        )


def _heads(job: JobFile) -> int:
    """The attention heads of the exported folder; 0 if it is not on this machine."""
    try:
        heads = read_object(Path(folder(job), "config.json")).get("num_attention_heads")
    except (OSError, JsonError):
        return 0
    return heads if isinstance(heads, int) else 0


def _engine(job: JobFile, machine: Machine) -> Iterator[str]:
    settings, engine = job.serve, job.serve.engine
    if engine == "llamax":
        if machine.neuron:
            yield (
                f"serve.engine=llamax does not serve on {machine.name}; use serve.engine=vllm, or "
                "serve.instance=local for a CPU"
            )
        elif not (settings.image or job.image):
            yield "image is empty; set it to the image that --phase image builds"
    elif not settings.image and (engine, machine.backend) not in IMAGES:
        fitting = [name for name, backend in IMAGES if backend == machine.backend]
        yield (
            f"serve.engine={engine} has no image for {machine.name}; use serve.engine="
            f"{(fitting or ['llamax'])[0]}"
        )
    elif machine.neuron and not (settings.length and settings.slots):
        yield (
            "serve.length and serve.slots are needed on Trainium, where programs are compiled for "
            "them; set both, such as 2048 and 4"
        )
