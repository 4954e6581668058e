"""Checks of versions that must match: torch, torch-xla, torch-neuronx, compiler, NxD, drivers.

The versions themselves are in ``llamax.runtime.versions`` and ``llamax.config.neuron_sdk``, with
their sources.  Source: GitHub advisory GHSA-63cw-57p8-fm3p of PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from llamax.config.constants import FLASH_MULTIPLE
from llamax.config.neuron_sdk import (
    NONE,
    UNKNOWN,
    NeuronSdk,
    absent,
    begins,
    known_sdks,
    known_variables,
    numbers,
    sdk_of_compiler,
    torchneuron_sdk,
    trn1_names,
    trn1_sdk,
)
from llamax.runtime.errors import join_or
from llamax.runtime.versions import OLDEST_TORCH, TORCH_XLA, WEIGHTS_ONLY, XLA_REQUIREMENTS
from llamax.tools.doctor.finding import Finding, Host, Level, passed, unknown

# Packages that read checkpoints with torch.load.
LOADERS = ("neuronx-distributed", "optimum-neuron", "transformers", "accelerate", "lightning")
# The oldest NVIDIA driver for a release of CUDA: "CUDA Compatibility", minor version compatibility.
DRIVERS = {12: 525, 13: 580}
INSTALL = "from the package index of AWS Neuron: python3 -m pip install"
REMOVE = "python3 -m pip uninstall"


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
    if numbers(torch) < numbers(OLDEST_TORCH):
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
    if backend == "neuron":
        yield from _torchneuron(host, torch)
    if backend == "cuda":
        yield from _cuda(host, torch)


def _advisory(host: Host, torch: str) -> Iterator[Finding]:
    """A known fault in torch.load, which other programs of this environment may call."""
    others = [name for name in LOADERS if host.version(name) is not None]
    if numbers(torch) < numbers(WEIGHTS_ONLY.version) and others:
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
    elif numbers(driver[1])[0] < (least := DRIVERS.get(cuda := _cuda_release(host, torch), 0)):
        yield Finding(
            "warning",
            "driver",
            f"NVIDIA driver {driver[1]} with torch for CUDA {cuda}, which needs {least} or newer",
            "torch finds no GPU with it, unless NVIDIA's package cuda-compat is in use",
            "install a newer driver, or a torch for an older CUDA",
        )
    else:
        yield passed("driver", f"NVIDIA driver {driver[1]}")


def _cuda_release(host: Host, torch: str) -> int:
    """The major release of CUDA that torch was built for; 0 where nothing says."""
    if built := re.search(r"\+cu(\d+)\d$", torch):
        return int(built[1])
    packages = ("nvidia-cuda-runtime", *(f"nvidia-cuda-runtime-cu{n}" for n in DRIVERS))
    found = filter(None, map(host.version, packages))
    return next((numbers(version)[0] for version in found), 0)


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
    elif numbers(found)[:2] != numbers(TORCH_XLA) or numbers(torch)[:2] != numbers(TORCH_XLA):
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
        yield _not_here("neuron", neuronx)
        return
    sdk, _ = sdk_of_compiler(compiler)
    remedy = f"SDK {trn1_names()}: {INSTALL} 'neuronx-cc=={trn1_sdk().neuronx_cc}.*'"
    lacks = "that SDK does not support training with torch-xla, the only way on trn1"
    yield _compiler(compiler, "warning", "" if sdk.trains_trn1 else lacks, remedy)
    if numbers(neuronx)[:2] != numbers(torch)[:2]:
        yield Finding(
            "error",
            "torch-neuronx",
            f"torch-neuronx {neuronx} with torch {torch}",
            "its first two numbers are those of the torch that it is built for",
            f"{INSTALL} 'torch-neuronx=={'.'.join(map(str, numbers(torch)[:2]))}.*'",
        )
    else:
        yield from _of_sdk("torch-neuronx", neuronx, _for_torch(sdk, torch), sdk)
    if (nxd := host.version("neuronx-distributed")) is None:
        yield passed("nxd", "neuronx-distributed is not installed; llamax does not need it")
    else:
        yield from _of_sdk("neuronx-distributed", nxd, sdk.nxd, sdk, "nxd")
    yield _nki(host, sdk)
    yield from _system(host, sdk)
    yield from variables(host, sdk)


def _not_here(name: str, neuronx: str | None) -> Finding:
    """The finding of a machine without torch-neuronx, or without its compiler."""
    package = "torch-neuronx" if neuronx is None else "neuronx-cc"
    return unknown(name, f"{package} is not installed here", "run doctor on a node")


def _compiler(compiler: str, level: Level, lacks: str, remedy: str) -> Finding:
    """The compiler and its SDK; ``lacks``: why that SDK does not do, empty where it does."""
    sdk, note = sdk_of_compiler(compiler)
    if note:
        why = f"the other packages are compared with those of SDK {sdk.name}"
        return Finding("warning", "neuronx-cc", note, why, remedy)
    if lacks:
        text = f"neuronx-cc {compiler} is of Neuron SDK {sdk.name}"
        return Finding(level, "neuronx-cc", text, lacks, remedy)
    return passed("neuronx-cc", f"neuronx-cc {compiler} (Neuron SDK {sdk.name})")


def _torchneuron(host: Host, torch: str) -> Iterator[Finding]:
    """TorchNeuron, the native device of trn2 and trn3, and the SDK that it is part of."""
    neuronx, compiler = host.version("torch-neuronx"), host.version("neuronx-cc")
    if neuronx is None or compiler is None:
        yield _not_here("TorchNeuron", neuronx)
        return
    (sdk, note), first = sdk_of_compiler(compiler), torchneuron_sdk()
    remedy = f"{INSTALL} --upgrade neuronx-cc nki 'torch-neuronx=={first.torchneuron[-1]}.*'"
    lacks = f"the native device of trn2 and trn3 came with SDK {first.name}"
    yield _compiler(compiler, "error", "" if sdk.torchneuron else lacks, remedy)
    if not (note or sdk.torchneuron):
        return
    fitting = [each for each in sdk.torchneuron if begins(torch, each) and begins(neuronx, each)]
    if fitting:
        yield passed("torch-neuronx", f"torch-neuronx {neuronx}")
    else:
        yield Finding(
            "error",
            "torch-neuronx",
            f"torch-neuronx {neuronx} with torch {torch}",
            f"TorchNeuron of SDK {sdk.name} is for torch {join_or(sdk.torchneuron)}, and begins "
            "with the number of its torch",
            remedy,
        )
    yield from _system(host, sdk)
    yield from variables(host, sdk)


def _for_torch(sdk: NeuronSdk, torch: str) -> str:
    """torch-neuronx of an SDK, for an installed torch that it fits."""
    short = ".".join(map(str, numbers(torch)[:2]))
    if short not in sdk.torch or sdk.torch_neuronx in (NONE, UNKNOWN):
        return sdk.torch_neuronx
    return f"{short}.{sdk.torch_neuronx.split('.', 2)[2]}"


def _of_sdk(
    package: str, version: str, expected: str, sdk: NeuronSdk, name: str = ""
) -> Iterator[Finding]:
    """Whether a Python package is the one of an SDK."""
    if expected == UNKNOWN:
        return
    if expected != NONE and begins(version, expected):
        yield passed(name or package, f"{package} {version}")
        return
    contains = f"contains {expected}" if expected != NONE else "contains none"
    yield Finding(
        "error",
        name or package,
        f"{package} {version} with Neuron SDK {sdk.name}",
        f"what it compiles goes through neuronx-cc; SDK {sdk.name} {contains}",
        f"{INSTALL} '{package}=={expected}.*'" if expected != NONE else f"{REMOVE} {package}",
    )


def _system(host: Host, sdk: NeuronSdk) -> Iterator[Finding]:
    """The driver, and the packages of the operating system, where dpkg knows them."""
    driver = host.read("sys/module/neuron/version")
    status = host.read("var/lib/dpkg/status") or ""
    of_runtime = _of_runtime(_from_dpkg(status, "aws-neuronx-runtime-lib")) or sdk
    if driver is None:
        yield unknown("driver", "the Neuron driver is not loaded here", "run doctor on a node")
    elif numbers(driver) < numbers(sdk.driver):
        yield Finding(
            "error",
            "driver",
            f"Neuron driver {driver} with Neuron SDK {sdk.name}",
            f"its runtime comes with driver {sdk.driver}, and may not start on an older one",
            _with_driver(sdk.driver),
        )
    elif of_runtime.newest_driver and numbers(driver)[:2] > numbers(of_runtime.newest_driver):
        yield Finding(
            "error",
            "driver",
            f"Neuron driver {driver} with Neuron SDK {sdk.name}",
            f"the runtime {of_runtime.runtime} does not start on a driver after "
            f"{of_runtime.newest_driver}",
            _with_driver(of_runtime.newest_driver),
        )
    else:
        yield passed("driver", f"Neuron driver {driver}")
    for package, expected in (
        ("aws-neuronx-runtime-lib", sdk.runtime),
        ("aws-neuronx-collectives", sdk.collectives),
        ("aws-neuronx-tools", sdk.tools),
    ):
        found, name = _from_dpkg(status, package), package.removeprefix("aws-neuronx-")
        if found is None:
            continue
        if begins(found, expected):
            yield passed(name, f"{package} {found}")
            continue
        yield Finding(
            "warning",
            name,
            f"{package} {found} with Neuron SDK {sdk.name}",
            f"SDK {sdk.name} contains {expected}; another one is not tested with its compiler",
            f"sudo apt-get install --allow-downgrades --yes '{package}={expected}.*'",
        )


def _from_dpkg(status: str, package: str) -> str | None:
    """The version of a package in dpkg's list; None where it is not in it."""
    entry = re.search(rf"^Package: {package}$(?:\n(?!$).*)*?\nVersion: (\S+)", status, re.MULTILINE)
    return entry and entry[1]


def _of_runtime(version: str | None) -> NeuronSdk | None:
    """The SDK that contains a version of the runtime; None where no row does."""
    rows = known_sdks().values()
    return next((row for row in rows if version and begins(version, row.runtime)), None)


def _with_driver(version: str) -> str:
    """The commands that put a version of the driver in the place of another."""
    return (
        f"on the machine itself: sudo apt-get install --allow-downgrades --yes "
        f"'aws-neuronx-dkms={version}.*' && sudo modprobe --remove neuron && sudo modprobe neuron"
    )


def variables(host: Host, sdk: NeuronSdk) -> Iterator[Finding]:
    """Variables of the environment that an SDK does not have."""
    for name in known_variables():
        if name in host.environ and not sdk.has(name):
            yield Finding(
                "warning",
                "environment",
                f"{name}={host.environ[name]}",
                absent(name, sdk).rpartition(";")[0],
                f"unset {name}",
            )


def _nki(host: Host, sdk: NeuronSdk) -> Finding:
    """The package that compiles llamax's NKI kernels."""
    nki, good = host.version("nki"), trn1_sdk()
    if nki is not None and begins(nki, good.nki) and sdk == good:
        return passed("nki", f"nki {nki} compiles llamax's NKI kernels for trn1")
    if nki is None:
        what = "nki is not installed"
    elif not begins(nki, good.nki):
        what = f"nki {nki} does not compile for trn1"
    else:
        what = f"nki {nki} with Neuron SDK {sdk.name}, which contains {sdk.nki}"
    return Finding(
        "warning",
        "nki",
        what,
        "llamax's NKI kernels cannot run: documents kept apart, or sequences that are no "
        f"multiple of {FLASH_MULTIPLE}, need memory for every pair of tokens",
        f"{INSTALL} 'nki=={good.nki}.*', with SDK {good.name}",
    )
