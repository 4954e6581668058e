"""The Neuron SDKs: what each contains, what it dropped, and the nearest one to another version.

The table is ``neuron_sdks.toml``, with its sources.  It decides what ``llamax doctor`` expects to
find installed, the variables and the base image of a job, the program that opens a profile of the
device, and the communicators that ``llamax audit`` allows in a program.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from llamax.config.toml import Problems, build, read_toml
from llamax.runtime.errors import ConfigError, join_or, refuse

TABLE = Path(__file__).with_name("neuron_sdks.toml")
NONE, UNKNOWN = "none", "unknown"


@dataclass(frozen=True)
class NeuronSdk:
    """One SDK.  Versions are beginnings; ``"none"``: it has no such part; ``"unknown"``."""

    name: str
    released: str
    torch: tuple[str, ...]
    """Versions of torch that its torch-neuronx for torch-xla fits."""
    torch_neuronx: str
    """torch-neuronx for torch-xla, for the newest of these."""
    neuronx_cc: str
    nxd: str
    nki: str
    runtime: str
    collectives: str
    driver: str
    """The oldest driver that its runtime works with."""
    tools: str
    profiler: str
    """The program that opens profiles of the device."""
    image: str
    """Tag of AWS's container for training with torch-xla."""
    communicators: int
    """Most groups of ranks for the collectives of a program."""
    dropped: tuple[str, ...]
    sources: tuple[str, ...]
    trains_trn1: bool = False
    """Whether it trains with torch-xla, the only way on trn1."""
    vllm_image: str = UNKNOWN
    """Tag of AWS's container of vLLM, in the README of its containers."""
    nki_for_trn1: bool = False
    """Whether its nki compiles for trn1."""
    newest_driver: str = ""
    """The newest driver that its runtime works with; "": none is known to be too new."""
    torchneuron: tuple[str, ...] = ()
    """Versions of torch that its TorchNeuron, the native device of trn2 and trn3, fits."""

    def has(self, variable: str) -> bool:
        """Whether a variable of the environment exists in it; true for one that no row names."""
        row = known_variables().get(variable)
        if row is None:
            return True
        here = numbers(self.name)
        return (not row.since or numbers(row.since) <= here) and (
            not row.until or here <= numbers(row.until)
        )


@dataclass(frozen=True)
class NeuronVariable:
    """A variable of the environment, with the SDKs that have it; "": no limit in the table."""

    name: str
    purpose: str
    source: str
    since: str = ""
    until: str = ""


class Match(NamedTuple):
    """The row for an SDK; ``note``: a line on why it is another one, empty where it is that SDK."""

    sdk: NeuronSdk
    note: str = ""


@cache
def known_sdks() -> dict[str, NeuronSdk]:
    """The SDKs of the table by name, oldest first."""
    return {name: _row(NeuronSdk, "sdk", name, table) for name, table in _tables("sdk").items()}


@cache
def known_variables() -> dict[str, NeuronVariable]:
    """The variables of the table by name."""
    tables = _tables("variable").items()
    return {name: _row(NeuronVariable, "variable", name, table) for name, table in tables}


def absent(variable: str, sdk: NeuronSdk) -> str:
    """Why an SDK does not have a variable, and what to do."""
    row = known_variables()[variable]
    if row.until and numbers(sdk.name) > numbers(row.until):
        return f"Neuron SDK {sdk.name} ignores it, the last with it is {row.until}; remove it"
    return f"Neuron SDK {sdk.name} ignores it, the first with it is {row.since}; remove it"


def trn1_sdk() -> NeuronSdk:
    """The newest SDK that trains on trn1 and compiles NKI kernels for it."""
    return [each for each in known_sdks().values() if each.trains_trn1 and each.nki_for_trn1][-1]


def trn1_names() -> str:
    """The names of the SDKs that train on trn1."""
    return join_or([each.name for each in known_sdks().values() if each.trains_trn1])


def vllm_image(trn1: bool) -> str:
    """The newest known tag of AWS's container of vLLM, for trn1 or for trn2 and trn3."""
    rows = [each for each in known_sdks().values() if each.trains_trn1 or not trn1]
    return [each.vllm_image for each in rows if each.vllm_image != UNKNOWN][-1]


def torchneuron_sdk() -> NeuronSdk:
    """The first SDK with the native device of trn2 and trn3."""
    return next(each for each in known_sdks().values() if each.torchneuron)


def find_sdk(version: str) -> Match:
    """The SDK of a version such as ``2.29`` or ``2.29.1``, or the nearest one with a note.

    Raises ConfigError if ``version`` is not a version.
    """
    if not re.fullmatch(r"\d+\.\d+(\.\d+)*", version):
        raise ConfigError(f"{version!r} is not the version of a Neuron SDK; write one such as 2.28")
    return _nearest(version, lambda sdk: sdk.name, f"Neuron SDK {version}")


def sdk_of_compiler(version: str) -> Match:
    """The SDK that contains a version of neuronx-cc, or the nearest one with a note."""
    return _nearest(version, lambda sdk: sdk.neuronx_cc, f"neuronx-cc {version}")


def installed_sdk(version: Callable[[str], str | None]) -> Match | None:
    """The SDK whose compiler is installed; None without one.  ``version`` takes a package."""
    found = version("neuronx-cc")
    return None if found is None else sdk_of_compiler(found)


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, without a local part."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def begins(version: str, start: str) -> bool:
    """Whether a version is ``start`` or has more numbers after it."""
    return numbers(version)[: len(numbers(start))] == numbers(start)


def _nearest(version: str, key: Callable[[NeuronSdk], str], what: str) -> Match:
    rows = list(known_sdks().values())
    for sdk in rows:
        if begins(version, key(sdk)):
            return Match(sdk)
    wanted = numbers(version)[:2]
    older = [sdk for sdk in rows if numbers(key(sdk)) <= wanted]
    sdk = older[-1] if older else rows[0]
    return Match(
        sdk,
        f"{what} is not in llamax's table of Neuron SDKs, which has {rows[0].name} to "
        f"{rows[-1].name}; SDK {sdk.name} is taken for it",
    )


@cache
def _tables(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = read_toml(TABLE)[kind]
    return found


def _row(kind: type[Any], prefix: str, name: str, table: dict[str, Any]) -> Any:
    problems = Problems()
    row = build(kind, table, problems, f"{prefix}.{name}", {"name": name})
    refuse(problems.lines(row, f"{prefix}.{name}"), str(TABLE))
    return row
