"""The programs of a run by their hashes: what precompiling notes in the cache, and doctor asks for.

Neuron's own hash, in the name of a compiled MODULE, is of what its plugin was given, and nothing
that runs without NeuronCores makes it.  So ``--precompile`` leaves a note beside the MODULEs for
each program of the run, named by the hash that ``llamax audit --json`` gives::

    NEURON_COMPILE_CACHE_URL/llamax-programs/<sha256>.json   {"program": "microstep", ...}

The hash is made without a device, so any machine with torch-xla can ask whether a note is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from llamax.config.load import dump_config
from llamax.config.schema import Config
from llamax.runtime.errors import BackendError
from llamax.runtime.versions import installed

NOTES = "llamax-programs"
FOREIGN = ("NEURON_", "PJRT_", "XLA_")  # what a process that traces without a device must not see
VERSIONS = ("torch-xla", "neuronx-cc")


def hashes(config: Config, world: int, cores: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Kind of program -> sha256 of its normal text, on ``world`` ranks, ``cores`` of them a node.

    Traced in a process of its own, without a device.  BackendError with its last line if it fails.
    """
    if installed("torch-xla") is None:
        raise BackendError("the run's own cannot be traced without torch-xla")
    with TemporaryDirectory(prefix="llamax-") as folder:
        path = Path(folder, "run.toml")
        path.write_text(dump_config(config))
        done = subprocess.run(
            [sys.executable, "-m", "llamax.tools.audit.trace", str(path), str(world), str(cores)],
            env={k: value for k, value in environ.items() if not k.startswith(FOREIGN)},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        why = last[0].removeprefix("llamax: ")
        raise BackendError(f"the run's own cannot be traced: {why}")
    found: dict[str, str] = json.loads(done.stdout)
    return found


def note(cache: Path, found: Mapping[str, str]) -> None:
    """Leave a note for each program in the compile cache."""
    folder = cache / NOTES
    folder.mkdir(parents=True, exist_ok=True)
    for kind, digest in found.items():
        part = folder / f".{digest}.{os.getpid()}"
        about = {"program": kind} | {package: installed(package) for package in VERSIONS}
        part.write_text(json.dumps(about) + "\n")
        part.replace(folder / f"{digest}.json")


def noted(cache: Path) -> bool:
    """Whether the compile cache has any note."""
    return any((cache / NOTES).glob("*.json"))


def missing(cache: Path, found: Mapping[str, str]) -> list[str]:
    """The kinds of program that have no note in the compile cache."""
    return [
        kind for kind, digest in found.items() if not (cache / NOTES / f"{digest}.json").is_file()
    ]
