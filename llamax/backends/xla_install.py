"""Checks the installed torch-xla, sets the environment that it reads on import, and imports it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import MutableMapping
from pathlib import Path

import torch

from llamax.backends.base import TRAINING, Words
from llamax.parallel.rendezvous import Rendezvous, neuron_variables
from llamax.runtime.errors import BackendError
from llamax.runtime.versions import TORCH_XLA, XLA_REQUIREMENTS, installed

NEURON_DEVICE = Path("/dev/neuron0")
DEPRECATED = ("XLA_USE_BF16", "XLA_DOWNCAST_BF16")
# torch-neuronx sets 1, torch-xla itself 0.  With 1, split() into parts of several sizes along
# another dim than the first gives wrong elements: torch-xla issue 8640, open in 2.9.  Sources: AWS
# Neuron, "PyTorch NeuronX environment variables" and "Introducing PyTorch 2.9 support".
UNSOUND_VIEWS = "XLA_DISABLE_FUNCTIONALIZATION"


def check(torch_xla: str | None, torch_version: str, words: Words = TRAINING) -> None:
    """Raise BackendError unless the installed versions match each other and llamax."""
    remedy = f"install {' and '.join(XLA_REQUIREMENTS)}, or use {words.backend('cpu')}"
    chosen = words.backend("xla")
    if torch_xla is None:
        raise BackendError(f"{chosen} needs torch-xla, which is not installed; {remedy}")
    if not torch_xla.startswith(f"{TORCH_XLA}."):
        raise BackendError(
            f"{chosen} needs torch-xla {TORCH_XLA} but {torch_xla} is installed; {remedy}"
        )
    if not torch_version.startswith(f"{TORCH_XLA}."):
        raise BackendError(
            f"torch-xla {torch_xla} needs torch {TORCH_XLA} but {torch_version} is installed; "
            f"{remedy}"
        )


def configure(
    environ: MutableMapping[str, str],
    rendezvous: Rendezvous,
    stochastic_rounding: bool,
    words: Words = TRAINING,
) -> bool:
    """Set the variables that torch-xla reads on import, and import it.

    Returns whether the device is a NeuronCore.  Raises BackendError where it cannot be used.
    """
    check(installed("torch-xla"), torch.__version__, words)
    for name in DEPRECATED:
        if environ.get(name):
            raise BackendError(
                f"{name}={environ[name]} would turn float32 masters into bfloat16; unset it and "
                f"set {words.dtype}"
            )
    environ[UNSOUND_VIEWS] = "0"
    neuron = environ.setdefault("PJRT_DEVICE", _device()) == "NEURON"
    if neuron:
        environ["NEURON_RT_STOCHASTIC_ROUNDING_EN"] = str(int(stochastic_rounding))
        if rendezvous.world_size > 1:
            environ.update(neuron_variables(environ, rendezvous))
    packages = ("torch_neuronx", "torch_xla") if neuron else ("torch_xla",)  # in this order
    try:
        for package in packages:
            importlib.import_module(package)
    except (ImportError, OSError) as error:
        raise BackendError(
            f"{package} cannot be imported ({error}); reinstall it with {XLA_REQUIREMENTS[0]}"
        ) from error
    return neuron


def _device() -> str:
    if importlib.util.find_spec("libneuronxla") is not None:
        return "NEURON"
    if NEURON_DEVICE.exists():
        raise BackendError(
            f"{NEURON_DEVICE} is a Neuron device, but torch-neuronx, which it needs, is not "
            f"installed; install torch-neuronx {TORCH_XLA} from AWS Neuron, or set PJRT_DEVICE=CPU"
        )
    return "CPU"
