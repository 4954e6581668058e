"""Checks of versions that must match: torch, torch-xla, torch-neuronx, compiler, NxD, drivers.

The versions themselves are in ``llamax.runtime.versions``.  Source: AWS Neuron documentation,
"Release content" of Neuron 2.28.0 and 2.29.0, the last ones that train with torch-xla on trn1;
GitHub advisory GHSA-63cw-57p8-fm3p of PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from llamax.config.constants import NKI_OF_TRN1
from llamax.runtime.versions import (
    IMAGE_SDK,
    NEURON_SDKS,
    OLDEST_TORCH,
    TORCH_XLA,
    WEIGHTS_ONLY,
    XLA_REQUIREMENTS,
)
from llamax.tools.doctor.finding import Finding, Host, passed, unknown

# Packages that read checkpoints with torch.load.
LOADERS = ("neuronx-distributed", "optimum-neuron", "transformers", "accelerate", "lightning")
INSTALL = "from the package index of AWS Neuron: python3 -m pip install"


def check(host: Host, backend: str) -> Iterator[Finding]:
    """The findings about the packages and drivers that ``run.backend`` needs."""
    torch = host.version("torch")
    if torch is None:
        yield Finding(
            "error",
            "torch",
            "torch is not installed",
            "training needs it",
            "python3 -m pip install torch",
        )
        return
    if _numbers(torch) < _numbers(OLDEST_TORCH):
        yield Finding(
            "error",
            "torch",
            f"torch {torch} is older than {OLDEST_TORCH}",
            f"llamax is tested with {OLDEST_TORCH} and later",
            "python3 -m pip install --upgrade torch",
        )
    else:
        yield passed("torch", f"torch {torch}")
    yield from _advisory(host, torch)
    if backend == "xla":
        yield from _xla(host, torch)
        yield from _neuron(host, torch)
    if backend == "cuda":
        yield from _cuda(host, torch)


def _advisory(host: Host, torch: str) -> Iterator[Finding]:
    """A known fault in torch.load, which other programs of this environment may call."""
    others = [name for name in LOADERS if host.version(name) is not None]
    if _numbers(torch) < _numbers(WEIGHTS_ONLY.version) and others:
        yield Finding(
            "warning",
            "torch.load",
            f"torch {torch} has {WEIGHTS_ONLY.advisory}; {', '.join(others)} may call torch.load",
            "a hostile file corrupts memory there and may run code, even with weights_only=True; "
            "llamax never calls torch.load",
            f"torch {WEIGHTS_ONLY.version} or later; with torch-xla, which needs {TORCH_XLA}, load "
            "only files that you trust",
        )


def _cuda(host: Host, torch: str) -> Iterator[Finding]:
    if torch.endswith("+cpu") and host.gpus:
        yield Finding(
            "error",
            "torch",
            f"torch {torch} is built without CUDA",
            "run.backend=cuda would find no GPU",
            "python3 -m pip install --force-reinstall torch, from an index with CUDA builds",
        )
    driver = re.search(
        r"Module(?: for \S+)?\s+(\d[\d.]+)", host.read("proc/driver/nvidia/version") or ""
    )
    if driver is None:
        yield unknown("driver", "the NVIDIA driver is not loaded here", "run doctor on a node")
    else:
        yield passed("driver", f"NVIDIA driver {driver[1]}")


def _xla(host: Host, torch: str) -> Iterator[Finding]:
    found = host.version("torch-xla")
    if found is None and not host.neuron_devices:
        yield unknown("torch-xla", "torch-xla is not installed here", "run doctor on a node")
        return
    pair = " ".join(XLA_REQUIREMENTS)
    if found is None:
        yield Finding(
            "error",
            "torch-xla",
            "torch-xla is not installed",
            "run.backend=xla records operations with it",
            f"python3 -m pip install {pair}",
        )
    elif _numbers(found)[:2] != _numbers(TORCH_XLA) or _numbers(torch)[:2] != _numbers(TORCH_XLA):
        yield Finding(
            "error",
            "torch-xla",
            f"torch {torch} with torch-xla {found}",
            f"torch-xla fits one release of torch, and the last for trn1 is {TORCH_XLA}",
            f"python3 -m pip install {pair}",
        )
    else:
        yield passed("torch-xla", f"torch-xla {found}")


def _neuron(host: Host, torch: str) -> Iterator[Finding]:
    neuronx, compiler = host.version("torch-neuronx"), host.version("neuronx-cc")
    if neuronx is None or compiler is None:
        absent = "torch-neuronx" if neuronx is None else "neuronx-cc"
        yield unknown("neuron", f"{absent} is not installed here", "run doctor on a node")
        return
    if _numbers(neuronx)[:2] != _numbers(torch)[:2]:
        yield Finding(
            "error",
            "torch-neuronx",
            f"torch-neuronx {neuronx} with torch {torch}",
            "its first two numbers are those of the torch that it is built for",
            f"{INSTALL} 'torch-neuronx=={'.'.join(map(str, _numbers(torch)[:2]))}.*'",
        )
    else:
        yield passed("torch-neuronx", f"torch-neuronx {neuronx}")
    sdk = next(
        (name for name, each in NEURON_SDKS.items() if _begins(compiler, each.compiler)), None
    )
    if sdk is None:
        known = " or ".join(f"{each.compiler} (SDK {name})" for name, each in NEURON_SDKS.items())
        yield Finding(
            "warning",
            "neuronx-cc",
            f"neuronx-cc {compiler} belongs to no SDK that is known to train on trn1",
            f"trn1 trains with torch-xla up to SDK {max(NEURON_SDKS)}; known are {known}",
            f"{INSTALL} 'neuronx-cc=={NEURON_SDKS[IMAGE_SDK].compiler}.*'",
        )
        return
    yield passed("neuronx-cc", f"neuronx-cc {compiler} (SDK {sdk})")
    release, nxd = NEURON_SDKS[sdk], host.version("neuronx-distributed")
    if nxd is None:
        yield passed("nxd", "neuronx-distributed is not installed; llamax does not need it")
    elif not _begins(nxd, release.nxd):
        yield Finding(
            "error",
            "nxd",
            f"neuronx-distributed {nxd} with SDK {sdk}",
            f"its kernels are compiled by neuronx-cc; SDK {sdk} contains {release.nxd}",
            f"{INSTALL} 'neuronx-distributed=={release.nxd}.*'",
        )
    else:
        yield passed("nxd", f"neuronx-distributed {nxd}")
    yield _nki(host)
    driver = host.read("sys/module/neuron/version")
    if driver is None:
        yield unknown("driver", "the Neuron driver is not loaded here", "run doctor on a node")
    elif _numbers(driver) < _numbers(release.driver):
        yield Finding(
            "error",
            "driver",
            f"Neuron driver {driver} with SDK {sdk}",
            f"the runtime needs driver {release.driver} or later",
            "sudo apt-get install --yes aws-neuronx-dkms && sudo modprobe --remove neuron "
            "&& sudo modprobe neuron",
        )
    else:
        yield passed("driver", f"Neuron driver {driver}")


def _nki(host: Host) -> Finding:
    """The package that compiles llamax's attention kernels."""
    nki = host.version("nki")
    if nki is not None and _begins(nki, NKI_OF_TRN1):
        return passed("nki", f"nki {nki} compiles llamax's attention kernels for trn1")
    what = "nki is not installed" if nki is None else f"nki {nki} does not compile for trn1"
    return Finding(
        "warning",
        "nki",
        what,
        "llamax's attention kernels cannot run: documents kept apart, or sequences that are no "
        "multiple of 2048, need memory for every pair of tokens",
        f"{INSTALL} 'nki=={NKI_OF_TRN1}.*', with SDK 2.28",
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def _begins(version: str, start: str) -> bool:
    return version == start or version.startswith(f"{start}.")
