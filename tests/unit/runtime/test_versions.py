"""Versions stand in one place; the files that cannot read it agree with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.launch_jobs import job

from llamax.config.neuron_sdk import trn1_sdk
from llamax.config.toml import tomllib
from llamax.launch import image, image_pins
from llamax.runtime.versions import (
    FIXES,
    LLAMAX,
    OLDEST_TORCH,
    TORCH_XLA,
    XLA_REQUIREMENTS,
    installed,
)

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(name: str) -> set[str]:
    """The lines of a requirement file, without comments."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return set(filter(None, lines))


def test_the_package_has_the_version_that_checkpoints_record() -> None:
    assert PROJECT["project"]["version"] == LLAMAX


def test_torch_xla_is_installed_in_the_version_that_the_backend_needs() -> None:
    assert set(XLA_REQUIREMENTS) <= pins("requirements-xla.txt")
    assert f"torch>={OLDEST_TORCH}" in PROJECT["project"]["dependencies"]


def test_both_environments_have_the_same_packages_beside_torch() -> None:
    assert pins("requirements-xla.txt") - set(XLA_REQUIREMENTS) <= pins("requirements.txt")


def test_everything_that_the_package_needs_is_pinned() -> None:
    for name in ("requirements.txt", "requirements-xla.txt"):
        pinned = {re.split("[=;]", line)[0] for line in pins(name)}
        needed = {re.split("[>;]", line)[0] for line in PROJECT["project"]["dependencies"]}
        assert needed <= pinned, name


def test_the_oldest_python_is_the_same_for_all_tools() -> None:
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert PROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"sys.version_info < ({oldest.replace('.', ', ')})" in (ROOT / "Makefile").read_text()


def test_images_have_the_torch_of_their_backend_and_a_known_sdk() -> None:
    sdk = trn1_sdk()
    assert sdk.image.startswith(f"{TORCH_XLA}.0-neuronx-")
    assert f"-sdk{sdk.name}.0-" in sdk.image
    assert f"FROM {image.NEURON}:{sdk.image}\n" in image.dockerfile(job())
    assert TORCH_XLA in sdk.torch


@pytest.mark.parametrize("room", ["llamax", "launch"])
def test_no_other_module_states_them(room: str) -> None:
    stated = re.compile(
        r"torch(-xla)?==\d|sdk2\.\d|[\"']2\.(9|28|29|3\d)[\"'.]|neuron-profile view"
    )
    for path in (ROOT / room).rglob("*.py"):
        if path.name != "versions.py" or "runtime" not in path.parts:
            assert not stated.search(path.read_text()), path


# ---- known faults


def floors() -> dict[str, list[str]]:
    """The oldest versions that pyproject.toml allows, by package, of every group."""
    project = PROJECT["project"]
    lines = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    lines += PROJECT["dependency-groups"]["image"][1:]
    for extra in project["optional-dependencies"].values():
        lines += extra
    found: dict[str, list[str]] = {}
    for line in lines:
        if parts := re.match(r"([\w.-]+)>=([\d.]+)", line):
            found.setdefault(parts[1], []).append(parts[2])
    return found


@pytest.mark.parametrize("package", FIXES)
def test_no_version_with_a_known_fault_is_allowed(package: str) -> None:
    fix = image_pins.numbers(FIXES[package].version)
    assert floors()[package]
    for oldest in floors()[package]:
        assert image_pins.numbers(oldest) >= fix, FIXES[package].advisory
    for name in ("requirements.txt", "requirements-xla.txt"):
        for line in pins(name):
            if line.startswith(f"{package}=="):
                assert image_pins.numbers(line.partition("==")[2]) >= fix, (name, line)


def test_what_is_not_installed_has_no_version() -> None:
    assert installed("torch") is not None
    assert installed("no-such-package-as-this") is None
