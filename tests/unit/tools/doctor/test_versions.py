"""The doctor on versions of an SDK."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hosts import SDK, levels, trainium

from llamax.tools.doctor import Host, versions


def test_versions_of_an_sdk_fit(tmp_path: Path) -> None:
    host = trainium(tmp_path)
    found = levels(versions.check(Host(host.root, packages=SDK), "xla"))
    assert found.pop("torch.load") == "warning"  # neuronx-distributed uses it, with torch 2.9
    assert set(found.values()) == {"ok"}
    assert len(found) == 7
    newer = {
        **SDK,
        "neuronx-cc": "2.24.5133.0",
        "neuronx-distributed": "0.18.27753",
        "torch-neuronx": "2.9.0.2.13.24727",
    }
    found = levels(versions.check(Host(host.root, packages=newer), "xla"))
    differ = ["torch.load", "nki", "driver"]  # nki 0.2 is of SDK 2.28
    assert [name for name, level in found.items() if level != "ok"] == differ


@pytest.mark.parametrize(
    ("packages", "warned"),
    [
        ({"torch": "2.9.0"}, False),
        ({"torch": "2.9.1+cpu", "transformers": "5.23.0"}, True),
        ({"torch": "2.10.0", "transformers": "5.23.0"}, False),
        ({"torch": "2.13.0", "neuronx-distributed": "0.17.1"}, False),
    ],
)
def test_other_programs_that_load_files_with_torch_2_9_are_named(
    tmp_path: Path, packages: dict[str, str], warned: bool
) -> None:
    found = {f.name: f for f in versions.check(Host(tmp_path, packages=packages), "cpu")}
    assert ("torch.load" in found) == warned
    if warned:
        assert "CVE-2026-24747" in found["torch.load"].what
        assert "transformers" in found["torch.load"].what
        assert "2.10" in found["torch.load"].fix


@pytest.mark.parametrize(
    ("changes", "name", "level"),
    [
        ({"torch": "2.8.1"}, "torch", "error"),
        ({"torch": "2.13.0"}, "torch-xla", "error"),
        ({"torch-xla": "2.8.0"}, "torch-xla", "error"),
        ({"torch-xla": None}, "torch-xla", "error"),
        ({"torch-neuronx": "2.8.0.1"}, "torch-neuronx", "error"),
        ({"torch-neuronx": "2.9.0.2.13.24727"}, "torch-neuronx", "error"),
        ({"torch-neuronx": None}, "neuron", "unknown"),
        ({"neuronx-cc": "2.21.1"}, "neuronx-cc", "warning"),
        ({"neuronx-cc": "2.26.6360.0"}, "neuronx-cc", "warning"),
        ({"neuronx-cc": "2.40.1"}, "neuronx-cc", "warning"),
        ({"neuronx-distributed": "0.18.1"}, "nxd", "error"),
        ({"neuronx-distributed": None}, "nxd", "ok"),
        ({"nki": None}, "nki", "warning"),
        ({"nki": "0.3.0"}, "nki", "warning"),
        ({"nki": "0.20.0"}, "nki", "warning"),
        ({"nki": "0.2.0+g12"}, "nki", "ok"),
    ],
)
def test_versions_that_do_not_fit(
    tmp_path: Path, changes: dict[str, str | None], name: str, level: str
) -> None:
    packages = {key: value for key, value in {**SDK, **changes}.items() if value}
    host = Host(trainium(tmp_path).root, packages=packages)
    assert levels(versions.check(host, "xla"))[name] == level


def test_versions_on_other_machines(tmp_path: Path) -> None:
    assert levels(versions.check(Host(tmp_path, packages={}), "cpu")) == {"torch": "error"}
    laptop = Host(tmp_path, packages={"torch": "2.13.0"})
    assert levels(versions.check(laptop, "cpu")) == {"torch": "ok"}
    assert levels(versions.check(laptop, "xla"))["torch-xla"] == "unknown"
    bare = Host(tmp_path, packages=SDK)
    assert levels(versions.check(bare, "xla"))["driver"] == "unknown"
