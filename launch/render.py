"""Renders a phase of a job for a launcher: a script, a manifest, a Dockerfile or a Python file.

::

    job.toml ──> checks ──> render(job, launcher, phase) ──> text ──> starter: the command to run it

The phases of a project in order: cluster, image, shell, prepare, precompile, train, tensorboard,
serve.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from llamax.launch import (
    cluster,
    docker,
    image,
    kubernetes,
    kubernetes_serve,
    mpirun,
    sagemaker,
    sagemaker_serve,
    script,
    slurm,
    torchrun,
)
from llamax.launch.jobfile import JobFile

PHASES = {
    "torchrun": ("cluster", "prepare", "precompile", "train", "tensorboard"),
    "mpirun": ("prepare", "precompile", "train", "tensorboard"),
    "slurm": ("cluster", "prepare", "precompile", "train", "tensorboard"),
    "docker": ("image", "serve"),
    "k8s": ("cluster", "image", "shell", "prepare", "precompile", "train", "tensorboard", "serve"),
    "sagemaker": ("cluster", "image", "prepare", "train", "serve"),
}
SERVERS = {
    "docker": docker.render,
    "k8s": kubernetes_serve.render,
    "sagemaker": sagemaker_serve.render,
}
REPOSITORY = Path(__file__).resolve().parents[1]
ACTIONS = ("start", "status", "logs", "utilization", "stop", "clean")


def render(job: JobFile, launcher: str, phase: str) -> str:
    """The text that starts a phase."""
    if phase == "image":
        return image.dockerfile(job)
    if phase == "cluster":
        return cluster.render(job, launcher)
    if phase == "serve":
        return SERVERS[launcher](job)
    if phase == "tensorboard" and launcher != "k8s":
        return script.tensorboard(job)
    if launcher == "torchrun":
        return torchrun.render(job, phase)
    if launcher == "mpirun":
        return mpirun.render(job, phase)
    if launcher == "slurm":
        return slurm.render(job, phase)
    return kubernetes.render(job, phase) if launcher == "k8s" else sagemaker.render(job, phase)


def action(job: JobFile, launcher: str, phase: str, what: str) -> str:
    """The script of an action on a phase: status, logs, utilization, stop or clean."""
    if phase == "cluster":
        return cluster.action(job, launcher, what)
    if launcher == "docker":
        return docker.action(job, what)
    if launcher == "slurm":
        return slurm.action(job, phase, what)
    if launcher == "k8s":
        return kubernetes.action(job, phase, what)
    if launcher == "sagemaker" and phase == "serve":
        return sagemaker_serve.action(job, what)
    if launcher == "sagemaker":
        return sagemaker.action(job, phase, what)
    has_torchrun = launcher == "torchrun" or mpirun.slots(job, phase) == 1
    return script.action(job, phase, what, has_torchrun)


def needed(launcher: str, phase: str, what: str) -> str:
    """The program that an action calls, or nothing."""
    if phase == "cluster":
        return cluster.TOOLS[launcher]
    if launcher == "sagemaker":
        return "" if what == "clean" and phase != "serve" else "aws"
    if launcher == "slurm":
        return "" if what == "logs" else "squeue"
    return {"k8s": "kubectl", "docker": "docker"}.get(launcher, "")


def starter(job: JobFile, launcher: str, phase: str, file: str) -> list[str]:
    """The command that runs a rendered text in ``file``."""
    if phase == "image":
        return ["docker", "build", "--tag", job.image, "--file", file, str(REPOSITORY)]
    if phase == "cluster":
        return ["bash", file]
    if launcher == "slurm" and phase != "tensorboard":
        return ["sbatch", file]
    if launcher == "k8s":
        return ["kubectl", "apply", "--filename", file]
    return [sys.executable if launcher == "sagemaker" else "bash", file]


def environment(job: JobFile, launcher: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the command, with this Python's programs first, such as torchrun."""
    path = {"PATH": f"{Path(sys.executable).parent}:{environ.get('PATH', os.defpath)}"}
    found = slurm.outside(environ, job) if launcher == "slurm" else dict(environ)
    return found | path
