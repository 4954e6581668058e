"""The doctor on versions of an SDK."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hosts import SDK, levels, trainium

from llamax.tools.doctor import Host, versions


def test_versions_of_an_sdk_fit(tmp_path: Path) -> None:
    host = trainium(tmp_path)
    found = levels(versions.check(Host(host.root, packages=SDK), "xla"))
    assert set(found.values()) == {"ok"}
    assert len(found) == 6
    newer = {**SDK, "neuronx-cc": "2.24.5133.0", "neuronx-distributed": "0.18.27753"}
    found = levels(versions.check(Host(host.root, packages=newer), "xla"))
    assert [name for name, level in found.items() if level != "ok"] == ["driver"]


@pytest.mark.parametrize(
    ("changes", "name", "level"),
    [
        ({"torch": "2.8.1"}, "torch", "error"),
        ({"torch": "2.13.0"}, "torch-xla", "error"),
        ({"torch-xla": "2.8.0"}, "torch-xla", "error"),
        ({"torch-xla": None}, "torch-xla", "error"),
        ({"torch-neuronx": "2.8.0.1"}, "torch-neuronx", "error"),
        ({"torch-neuronx": None}, "neuron", "unknown"),
        ({"neuronx-cc": "2.21.1"}, "neuronx-cc", "warning"),
        ({"neuronx-distributed": "0.18.1"}, "nxd", "error"),
        ({"neuronx-distributed": None}, "nxd", "ok"),
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
