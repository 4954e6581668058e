"""Reports of neuron-monitor: several processes, missing parts, parts of other types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.run_folders import NOW, make_run

from llamax.tools.monitor.neuron_monitor import core_utilization, parse_report
from llamax.tools.monitor.run_folder import read_run
from llamax.tools.monitor.watch import render


def runtime(**percent: object) -> dict[str, Any]:
    cores = {core.lstrip("c"): {"neuroncore_utilization": use} for core, use in percent.items()}
    counters = {"period": 5.0, "neuroncores_in_use": cores, "error": ""}
    return {"pid": 1, "error": "", "report": {"neuroncore_counters": counters}}


def report(*runtimes: object) -> str:
    return json.dumps({"neuron_runtime_data": list(runtimes), "system_data": {}})


BUSY = (2.926414908153532, 3.0803098003189486, 2.517060487060293, 2.4)
NAMES = ("c0", "c1", "c2", "c3")
FOUR = [
    runtime(**{name: use if name == busy else 0 for name in NAMES})
    for busy, use in zip(NAMES, BUSY, strict=True)
]  # each process lists all cores and is busy on one, as on a machine with four processes


def test_a_core_is_as_busy_as_all_processes_together(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", 12)
    (folder / "neuron-monitor-host1.json").write_text(report(*FOUR))
    starting = {"pid": 3, "error": "no data", "report": {}}
    (folder / "neuron-monitor-host2.json").write_text(report(*FOUR[:2], starting, FOUR[3]))
    run = read_run(folder, NOW)
    shares = [use / 100 for use in BUSY]
    assert [run.cores[f"host1:{core}"] for core in range(4)] == pytest.approx(shares)
    # The core of a process without counters is not known: the others list it as idle.
    second = {core: use for core, use in run.cores.items() if core.startswith("host2")}
    assert [*second] == ["host2:0", "host2:1", "host2:3"]
    assert [*second.values()] == pytest.approx([*shares[:2], shares[3]])
    assert "less than half" not in "\n".join(render(run))


def test_an_idle_core_is_reported_where_every_process_has_counters() -> None:
    assert parse_report(report(runtime(c0=40, c1=0))) == {"0": 0.4, "1": 0.0}


def test_cores_are_in_order_and_at_most_fully_used() -> None:
    shares = parse_report(report(runtime(c10=60, c2=50), runtime(c10=70.5, c0=25)))
    assert shares is not None
    assert list(shares.items()) == [("0", 0.25), ("2", 0.5), ("10", 1.0)]


STRANGE = [
    None,
    3,
    "text",
    [],
    {},
    {"report": None},
    {"report": "none"},
    {"report": {"neuroncore_counters": None}},
    {"report": {"neuroncore_counters": {"neuroncores_in_use": None}}},
    {"report": {"neuroncore_counters": {"neuroncores_in_use": [1, 2]}}},
    {"report": {"neuroncore_counters": {"neuroncores_in_use": {"0": None, "1": 3, "2": {}}}}},
    *(
        runtime(c0=value)
        for value in (None, "busy", True, [], {}, float("nan"), float("inf"), -1, 10**400)
    ),
]


@pytest.mark.parametrize("strange", STRANGE, ids=lambda value: json.dumps(value)[-60:])
def test_a_runtime_with_missing_or_strange_parts_adds_nothing(
    tmp_path: Path, strange: object
) -> None:
    folder = make_run(tmp_path / "r", 12)
    text = report(strange, runtime(c0="40", c1=20), strange)
    (folder / "neuron-monitor.json").write_text(text)
    run = read_run(folder, NOW)
    assert run.cores == {"0": 0.4, "1": 0.2}
    assert "2 cores" in "\n".join(render(run))
    (folder / "neuron-monitor.json").write_text(report(strange))
    assert read_run(folder, NOW).cores == {}
    assert "device use" not in "\n".join(render(read_run(folder, NOW)))


@pytest.mark.parametrize("text", ["", "nonsense", "null", "[1]", "{}", "[" * 100_000, '{"a": "'])
def test_a_line_that_is_not_a_report_is_skipped(tmp_path: Path, text: str) -> None:
    assert parse_report(text) is None
    path = tmp_path / "neuron-monitor-a.json"
    path.write_text(f"{report(runtime(c0=50))}\n{text}")
    assert core_utilization([path]) == {"a:0": 0.5}


def test_the_last_report_counts_even_if_nothing_runs(tmp_path: Path) -> None:
    path = tmp_path / "neuron-monitor-a.json"
    for nothing in (report(), '{"neuron_runtime_data": null}'):
        path.write_text(f"{report(runtime(c0=50))}\n{nothing}\n")
        assert core_utilization([path]) == {}


def test_an_indented_report_and_a_folder_of_that_name(tmp_path: Path) -> None:
    path = tmp_path / "neuron-monitor-a.json"
    path.write_text(json.dumps(json.loads(report(*FOUR)), indent=2))
    assert core_utilization([path])["a:1"] == pytest.approx(BUSY[1] / 100)
    (tmp_path / "neuron-monitor-b.json").mkdir()
    assert core_utilization([tmp_path / "neuron-monitor-b.json"]) == {}
