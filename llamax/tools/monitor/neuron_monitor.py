"""Reads what ``neuron-monitor > RUN/neuron-monitor-HOST.json`` writes: a report in each line.

::

    {"neuron_runtime_data": [                            one entry per process (runtime)
        {"report": {"neuroncore_counters": {"neuroncores_in_use": {
            "0": {"neuroncore_utilization": 2.9},        percent of this core, by this process
            "1": {"neuroncore_utilization": 0}, ...      cores of other processes: 0, or absent
        }}}}, ...

A process without counters (it just started, or reports an error) adds nothing.  Any other part of
a report may be missing, null or of another type; it adds nothing either.

Source: AWS Neuron, "Neuron Monitor User Guide" (JSON format of ``neuroncore_counters``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llamax.runtime.errors import LinkError
from llamax.runtime.files import plain_file
from llamax.runtime.json_reader import JsonError, parse_json
from llamax.runtime.text import printable_line

TAIL_BYTES = 2**20  # read from the end of a file


def core_utilization(paths: Sequence[Path]) -> dict[str, float]:
    """The use of every NeuronCore, 0 to 1, from the last report in each file.

    The keys are ``HOST:CORE``, or ``CORE`` where the name of the file has no host.
    """
    cores: dict[str, float] = {}
    for path in paths:
        host = path.name.partition(".")[0].removeprefix("neuron-monitor").strip("-")
        for core, share in _last_report(path).items():
            cores[printable_line(f"{host}:{core}" if host else core, 40)] = share
    return cores


def _last_report(path: Path) -> dict[str, float]:
    """The use of each core in the last complete report of a file."""
    try:
        with open(path, "rb", opener=plain_file) as file:
            file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
            text = file.read().decode(errors="replace")
    except (OSError, LinkError):
        return {}
    for candidate in (*reversed(text.splitlines()), text):  # the whole file: an indented report
        shares = parse_report(candidate)
        if shares is not None:
            return shares
    return {}


def parse_report(text: str) -> dict[str, float] | None:
    """The use of each core, 0 to 1: the sum over all processes; None if this is not a report.

    Where a process has no counters yet, cores that the others leave idle may be its cores: they are
    not in the result.
    """
    try:
        report = parse_json(text, strict=False)
    except JsonError:
        return None
    if not isinstance(report, dict) or "neuron_runtime_data" not in report:
        return None
    percent: dict[str, list[float]] = {}
    complete = True
    for runtime in _list(report["neuron_runtime_data"]):
        counters = _field(_field(runtime, "report"), "neuroncore_counters")
        complete = complete and isinstance(_field(counters, "neuroncores_in_use"), dict)
        for core, counter in _items(_field(counters, "neuroncores_in_use")):
            value = _number(_field(counter, "neuroncore_utilization"))
            if value is not None:
                percent.setdefault(core, []).append(value)
    known = [core for core in percent if complete or any(percent[core])]
    ordered = sorted(known, key=lambda core: (len(core), core))  # 2 before 10
    return {core: min(math.fsum(percent[core]) / 100, 1.0) for core in ordered}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    yield from value.items() if isinstance(value, dict) else ()


def _number(value: Any) -> float | None:
    """A finite number that is not negative, also one written as a string; None for all else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None
