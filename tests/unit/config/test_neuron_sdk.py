"""The table of Neuron SDKs, against the packages that AWS lists for each release on trn1."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.hosts import host_with, levels
from support.launch_jobs import job

from llamax.config.neuron_sdk import (
    TABLE,
    find_sdk,
    installed_sdk,
    known_sdks,
    known_variables,
    sdk_of_compiler,
    torchneuron_sdk,
    trn1_sdk,
    vllm_image,
)
from llamax.launch import environment, image
from llamax.launch.checks import problems
from llamax.runtime.errors import ConfigError
from llamax.tools.doctor import Finding, Host, doctor, versions

# torch-neuronx, neuronx-cc, neuronx-distributed, nki, runtime-lib, collectives, dkms, tools of each
# release: src/helperscripts/n2-manifest.json of aws-neuron-sdk, and "Release content" of 2.33.0.
LISTED = """
2.28.0 2.9.0.2.12.22436 2.23.6484.0 0.17.26814 0.2.0 2.30.51.0 2.30.59.0 2.26.5.0 2.28.23.0
2.28.1 2.9.0.2.12.22436 2.23.6484.0 0.17.26814 0.2.0 2.30.51.0 2.30.59.0 2.26.10.0 2.28.23.0
2.29.0 2.9.0.2.13.24727 2.24.5133.0 0.18.27753 0.3.0 2.31.24.0 2.31.24.0 2.27.4.0 2.29.18.0
2.29.1 2.9.0.2.13.26312 2.24.8799.0 0.18.27753 0.3.0 2.31.24.0 2.31.24.0 2.27.4.0 2.29.22.0
2.30.0 2.9.0.2.14.27725 2.25.3371.0 0.19.28093 0.4.0 2.32.31.0 2.32.28.0 2.28.0.0 2.30.10.0
2.31.0 2.9.0.2.15.32035 2.26.6360.0 0.19.28492 0.5.0 2.33.10.0 2.33.10.0 2.29.0.0 2.31.13.0
2.31.1 2.9.0.2.15.32035 2.26.6360.0 0.19.28492 0.5.0 2.33.10.0 2.33.10.0 2.29.0.0 2.31.15.0
2.32.0 - 2.27.5334.0 - 0.6.0 2.34.10.0 2.34.10.0 2.30.2.0 2.32.28.0
2.33.0 2.9.0.2.15.32035 2.28.7631.0 - 0.7.0 2.35.30.0 2.35.43.0 2.31.7.0 2.33.38.0
"""
RELEASES = {line.split()[0]: line.split()[1:] for line in LISTED.strip().splitlines()}
PYTHON = ("torch-neuronx", "neuronx-cc", "neuronx-distributed", "nki")
SYSTEM = ("runtime-lib", "collectives", "dkms", "tools")
ASYNC = "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS"


def machine(root: Path, release: str, **changed: str) -> Host:
    """A trn1 node with a release of the SDK."""
    versions_ = dict(zip((*PYTHON, *SYSTEM), RELEASES[release], strict=True)) | changed
    status = "\n\n".join(
        f"Package: aws-neuronx-{name}\nStatus: install ok installed\nVersion: {versions_[name]}"
        for name in SYSTEM
    )
    files = {"var__lib__dpkg__status": status, "sys__module__neuron__version": versions_["dkms"]}
    packages = {name: versions_[name] for name in PYTHON if versions_[name] != "-"}
    packages |= {"torch": "2.9.0", "torch-xla": "2.9.0"}
    return Host(host_with(root, **files).root, packages=packages)


def findings(host: Host) -> dict[str, Finding]:
    return {each.name: each for each in versions.check(host, "xla")}


@pytest.mark.parametrize("release", RELEASES)
def test_a_row_has_the_versions_of_its_releases(tmp_path: Path, release: str) -> None:
    host, name = machine(tmp_path, release), release.rpartition(".")[0]
    sdk = find_sdk(release).sdk
    assert (find_sdk(release).note, sdk.name) == ("", name)
    if host.version("torch-neuronx") is None:  # no longer in this release
        assert sdk.torch_neuronx == "none"
        assert sdk.nxd == "none"
        return
    found = findings(host)
    assert f"Neuron SDK {name}" in found["neuronx-cc"].what
    for package in ("torch-neuronx", "nxd", "driver", "runtime-lib", "collectives", "tools"):
        assert found[package].level == "ok", found[package]
    trains = name in ("2.28", "2.29")
    assert (found["neuronx-cc"].level == "ok") == sdk.trains_trn1 == trains
    assert (found["nki"].level == "ok") == sdk.nki_for_trn1 == (name == "2.28")


@pytest.mark.parametrize(
    ("name", "profiler", "tag", "communicators", "asynchronous"),
    [
        ("2.28", "neuron-profile", "2.9.0-neuronx-py312-sdk2.28.0-ubuntu24.04", 12, True),
        ("2.29", "neuron-explorer", "2.9.0-neuronx-py312-sdk2.29.0-ubuntu24.04", 12, True),
        ("2.30", "neuron-explorer", "2.9.0-neuronx-py312-sdk2.30.0-ubuntu24.04", 12, True),
        ("2.31", "neuron-explorer", "none", 12, False),
        ("2.32", "neuron-explorer", "none", 16, False),
        ("2.33", "neuron-explorer", "unknown", 16, False),
    ],
)
def test_a_row_decides_image_variables_and_limits(
    name: str, profiler: str, tag: str, communicators: int, asynchronous: bool
) -> None:
    sdk = known_sdks()[name]
    assert (sdk.profiler, sdk.image, sdk.communicators) == (profiler, tag, communicators)
    assert sdk.dropped
    assert sdk.sources
    assert re.fullmatch(r"2026-\d\d-\d\d", sdk.released)
    this = job(neuron_sdk=name, environment={ASYNC: "3"})
    notes = [line for line in environment.sdk_notes(this) if ASYNC in line]
    assert (not notes) == asynchronous == sdk.has(ASYNC)
    wrong = [line for line in problems(this, "k8s", "image") if "image" in line]
    assert bool(wrong) == (tag in ("none", "unknown"))
    if wrong:
        with pytest.raises(ConfigError, match=r"use 2.28, 2.29 or 2.30, or set base_image"):
            image.dockerfile(this)
    else:
        assert f"FROM {image.NEURON}:{tag}\n" in image.dockerfile(this)


def test_every_row_is_tested() -> None:
    assert {release.rpartition(".")[0] for release in RELEASES} == {*known_sdks()}
    assert list(known_sdks()) == sorted(known_sdks())
    for row in known_variables().values():
        assert row.purpose
        assert row.source
        assert {row.since, row.until} <= {"", *known_sdks()}


def test_variables_of_a_job_exist_in_the_sdks_that_train_on_trn1() -> None:
    for name in ("2.28", "2.29"):
        this = job(neuron_sdk=name)
        neuron = {v.name for v in environment.variables(this) if v.name.startswith("NEURON_")}
        assert neuron <= {*known_variables()}
        assert ASYNC not in neuron
        assert list(environment.sdk_notes(this)) == []


def test_an_sdk_that_the_table_lacks_is_replaced_by_the_nearest() -> None:
    for version, nearest in (("2.20", "2.28"), ("2.34.0", "2.33"), ("3.1", "2.33")):
        sdk, note = find_sdk(version)
        assert sdk.name == nearest
        assert f"Neuron SDK {version} is not in llamax's table" in note
        assert note.count("2.28 to 2.33") == 1
    assert sdk_of_compiler("2.99.1").sdk.name == "2.33"
    for wrong in ("", "new", "2", "2.x", "2.28\n"):
        with pytest.raises(ConfigError, match="is not the version of a Neuron SDK"):
            find_sdk(wrong)
    (line,) = [x for x in problems(job(neuron_sdk="new"), "slurm", "train") if "neuron_sdk" in x]
    assert line == "neuron_sdk='new' is not the version of a Neuron SDK; write one such as 2.28"
    unknown, old = environment.sdk_notes(job(neuron_sdk="2.34"))
    assert unknown.endswith("; set neuron_sdk to the one on the nodes, or update llamax")
    assert old.endswith("use 2.28 or 2.29")
    assert not any("neuron_sdk" in x for x in problems(job(neuron_sdk="2.34"), "slurm", "train"))


def test_sdks_of_instances() -> None:
    assert job().sdk.sdk == trn1_sdk() == known_sdks()["2.28"]
    trn2 = job(instance="trn2.48xlarge")
    assert trn2.sdk.sdk == torchneuron_sdk() == known_sdks()["2.33"]
    (line,) = [x for x in problems(trn2, "k8s", "image") if "base_image" in x]
    assert "no image of AWS with TorchNeuron" in line
    assert list(environment.sdk_notes(job(instance="p5.48xlarge", neuron_sdk="2.34"))) == []


def test_doctor_names_packages_of_another_sdk(tmp_path: Path) -> None:
    changes = {
        "torch-neuronx": "2.9.0.2.15.32035",
        "neuronx-distributed": "0.19.28492",
        "runtime-lib": "2.33.10.0",
        "tools": "2.31.13.0",
        "dkms": "2.25.4.0",
    }
    found = findings(machine(tmp_path, "2.28.0", **changes))
    assert found["torch-neuronx"].level == found["nxd"].level == found["driver"].level == "error"
    assert found["runtime-lib"].level == found["tools"].level == "warning"
    assert found["collectives"].level == "ok"
    assert found["nxd"].what == "neuronx-distributed 0.19.28492 with Neuron SDK 2.28"
    assert "0.17" in found["nxd"].why
    none = machine(tmp_path / "later", "2.33.0", **{"neuronx-distributed": "0.19.28492"})
    assert findings(none)["nxd"].fix == "python3 -m pip uninstall neuronx-distributed"


@pytest.mark.parametrize(
    ("release", "changed", "level", "fix"),
    [
        ("2.28.0", {"dkms": "2.28.4.0"}, "ok", ""),
        ("2.28.0", {"dkms": "2.29.16.0"}, "error", "'aws-neuronx-dkms=2.28.*'"),
        ("2.29.0", {"dkms": "2.31.7.0"}, "error", "'aws-neuronx-dkms=2.28.*'"),
        ("2.28.0", {"dkms": "2.29.16.0", "runtime-lib": "2.33.10.0"}, "ok", ""),
        ("2.28.0", {"dkms": "2.25.4.0"}, "error", "'aws-neuronx-dkms=2.26.*'"),
        ("2.31.0", {"dkms": "2.31.7.0"}, "ok", ""),
    ],
)
def test_a_driver_that_is_too_new_for_the_runtime(
    tmp_path: Path, release: str, changed: dict[str, str], level: str, fix: str
) -> None:
    """From driver 2.29 on nrt_init fails with a runtime before 2.33."""
    found = findings(machine(tmp_path, release, **changed))["driver"]
    assert found.level == level
    assert fix in found.fix


def test_doctor_compares_an_unknown_sdk_with_the_nearest(tmp_path: Path) -> None:
    host = machine(tmp_path, "2.33.0", **{"neuronx-cc": "2.30.1"})
    found = [
        each for each in versions.check(host, "xla") if "is not in llamax's table" in each.what
    ]
    assert [(each.name, each.level) for each in found] == [("neuronx-cc", "warning")]
    assert findings(host)["driver"].level == "ok"


def test_doctor_names_variables_that_an_sdk_ignores(tmp_path: Path) -> None:
    old, new = (machine(tmp_path / release, release) for release in ("2.30.0", "2.31.0"))
    for host, named in ((old, False), (new, True)):
        host = Host(host.root, {ASYNC: "7"}, host.packages)
        assert ("environment" in findings(host)) == named
    assert (
        "the last with it is 2.30"
        in findings(Host(new.root, {ASYNC: "7"}, new.packages))["environment"].why
    )
    assert not known_sdks()["2.28"].has("NEURON_RT_ONE_THREAD_PER_CORE")
    assert known_sdks()["2.29"].has("NEURON_RT_ONE_THREAD_PER_CORE")


@pytest.mark.parametrize(
    ("release", "torch", "neuronx", "wrong"),
    [
        ("2.33.0", "2.14.0", "2.14.3.0", []),
        ("2.33.0", "2.13.1+cpu", "2.13.3.0.7", []),
        ("2.33.0", "2.14.0", "2.13.3.0", ["torch-neuronx"]),
        ("2.33.0", "2.9.0", "2.9.0.2.15.32035", ["torch-neuronx"]),
        ("2.32.0", "2.13.0", "2.13.3.0", ["neuronx-cc"]),
        ("2.33.0", "2.14.0", None, []),
    ],
)
def test_doctor_on_the_native_device(
    tmp_path: Path, release: str, torch: str, neuronx: str | None, wrong: list[str]
) -> None:
    host = machine(tmp_path, release)
    packages = {**(host.packages or {}), "torch": torch, "torch-neuronx": neuronx}
    host = Host(host.root, {}, {name: v for name, v in packages.items() if v})
    found = levels(versions.check(host, "neuron"))
    assert [name for name, level in found.items() if level == "error"] == wrong
    assert (found.get("TorchNeuron") == "unknown") == (neuronx is None)
    if neuronx and not wrong:
        assert {*found.values()} == {"ok"}


def test_doctor_compares_the_sdk_of_the_job(tmp_path: Path) -> None:
    host = machine(tmp_path, "2.29.0")

    def named(**changes: Any) -> list[str]:
        found = [each for each in doctor._sdk(host, job(**changes))]
        levels(found)
        return [each.what for each in found]

    assert named(neuron_sdk="2.29") == []
    assert named() == ["Neuron SDK 2.29 is installed, but the job is for 2.28"]
    assert len(named(neuron_sdk="2.34", environment={ASYNC: "3"})) == 4
    assert named(instance="p5.48xlarge") == []


def test_containers_of_vllm() -> None:
    assert vllm_image(trn1=True) == "0.16.0-neuronx-py312-sdk2.29.1-ubuntu24.04"
    assert vllm_image(trn1=False) == "0.24.0.1.1.0-neuronx-py313-sdk2.32.0-ubuntu24.04"


def test_the_installed_sdk() -> None:
    assert installed_sdk(lambda _: None) is None
    found = installed_sdk({"neuronx-cc": "2.24.8799.0+6f62ff7c"}.get)
    assert found is not None
    assert found.sdk.name == "2.29"
    assert TABLE.read_text().count("[sdk.") == len(known_sdks())
