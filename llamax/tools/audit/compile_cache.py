"""Notes in the compile cache: the programs of a run that were precompiled, by hash.

Neuron names a compiled MODULE by a hash that only a process with NeuronCores can compute.  So
``--precompile`` writes a note for each program of the run into the cache, named by the hash that
``llamax audit --json`` prints::

    NEURON_COMPILE_CACHE_URL/llamax-programs/<sha256>.json   {"program": "microstep", ...}

This hash needs no device, so any machine with torch-xla can check whether a run is precompiled.  A
note is of the compiler and of the flags (NEURON_CC_FLAGS) that it names: others compile anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from llamax.config.load import dump_config
from llamax.config.schema import Config
from llamax.runtime.errors import BackendError, LinkError
from llamax.runtime.files import SHA256, make_folder, new_file, read_file
from llamax.runtime.json_reader import JsonError, parse_object
from llamax.runtime.versions import installed

NOTES, FLAGS = "llamax-programs", "NEURON_CC_FLAGS"
DEVICE_VARIABLES = ("NEURON_", "PJRT_", "XLA_")  # prefixes; unset where nothing runs on a device
VERSIONS = ("torch-xla", "neuronx-cc")


def hashes(config: Config, world: int, cores: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Kind of program -> sha256 of its normal text, on ``world`` ranks, ``cores`` on each node.

    Traces in a separate process without a device.  Raises BackendError with the last line of its
    output if it fails.
    """
    if installed("torch-xla") is None:
        raise BackendError("the programs of the run cannot be traced without torch-xla")
    with TemporaryDirectory(prefix="llamax-") as folder:
        path = Path(folder, "run.toml")
        path.write_text(dump_config(config))
        done = subprocess.run(
            [sys.executable, "-m", "llamax.tools.audit.trace", str(path), str(world), str(cores)],
            env={k: value for k, value in environ.items() if not k.startswith(DEVICE_VARIABLES)},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        why = last[0].removeprefix("llamax: ")
        raise BackendError(f"the programs of the run cannot be traced: {why}")
    found: dict[str, str] = json.loads(done.stdout)
    return found


class Note(NamedTuple):
    """What a program was compiled with, and for a note that was read its hash and its content."""

    compiler: str | None
    flags: str
    digest: str = ""
    content: Mapping[str, Any] = {}

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Note:
        """The note that this machine would write."""
        return cls(installed("neuronx-cc"), environ.get(FLAGS, ""))


def write_notes(cache: Path, hashes: Mapping[str, str], environ: Mapping[str, str]) -> None:
    """Write a note for each program (kind -> hash) into the compile cache."""
    folder = cache / NOTES
    make_folder(folder)
    for kind, digest in hashes.items():
        part = folder / f".{digest}.{os.getpid()}"
        content = {"program": kind} | {package: installed(package) for package in VERSIONS}
        content["flags"] = environ.get(FLAGS, "")
        with open(part, "w", opener=new_file) as file:
            file.write(json.dumps(content) + "\n")
        part.replace(folder / f"{digest}.json")


def read_notes(cache: Path) -> Iterator[Note]:
    """The notes of a compile cache; files that are none are passed by."""
    for path in sorted((cache / NOTES).glob("*.json")):
        if not SHA256.fullmatch(path.stem):
            continue
        try:
            content = parse_object(read_file(path))
        except (JsonError, OSError, LinkError):
            continue
        compiler, flags = content.get("neuronx-cc"), content.get("flags", "")
        if isinstance(compiler, str | None) and isinstance(flags, str):
            yield Note(compiler, flags, path.stem, content)


def has_notes(cache: Path) -> bool:
    """Whether the compile cache has any notes."""
    return any((cache / NOTES).glob("*.json"))


def missing(cache: Path, hashes: Mapping[str, str], note: Note) -> list[str]:
    """The kinds of programs (kind -> hash) without a note of the same compiler and flags.

    Without an installed compiler any will do.
    """
    known = {
        each.digest
        for each in read_notes(cache)
        if each.flags == note.flags and note.compiler in (None, each.compiler)
    }
    return [kind for kind, digest in hashes.items() if digest not in known]
