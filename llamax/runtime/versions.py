"""Versions: of llamax, of installed packages, and those that llamax needs.

``pyproject.toml`` and ``requirements*.txt`` cannot read this file; ``tests/unit/runtime`` compares
them with it.  Versions of the Neuron SDKs are in ``llamax.config.neuron_sdk``.
"""

from __future__ import annotations

from typing import NamedTuple

LLAMAX = "0.1.0"
OLDEST_TORCH = "2.9"
TORCH_XLA = "2.9"  # of torch and torch-xla: the last that AWS Neuron trains with on trn1
XLA_REQUIREMENTS = (f"torch=={TORCH_XLA}.0", f"torch-xla=={TORCH_XLA}.0")


class Fix(NamedTuple):
    """The first version of a package without a published fault, and the name of the advisory."""

    version: str
    advisory: str


# pyproject.toml allows no version with a known fault, except torch: torch-xla needs its 2.9.
FIXES = {
    "h11": Fix("0.16", "CVE-2025-43859"),
    "jinja2": Fix("3.1.6", "CVE-2025-27516"),
    "numpy": Fix("1.22", "CVE-2021-41495"),
    "pyarrow": Fix("23.0.1", "CVE-2026-25087"),
    "pydantic": Fix("2.4", "CVE-2024-3772"),
    "pytest": Fix("9.0.3", "CVE-2025-71176"),
    "PyYAML": Fix("5.4", "CVE-2020-14343"),
    "sagemaker": Fix("2.256", "CVE-2026-1777"),
    "sentencepiece": Fix("0.2.1", "CVE-2026-1260"),
    "setuptools": Fix("80.10.2", "CVE-2026-23949"),
    "starlette": Fix("1.3.1", "CVE-2026-54283"),
    "tqdm": Fix("4.66.3", "CVE-2024-34062"),
    "transformers": Fix("5.10", "CVE-2026-9856"),
}
WEIGHTS_ONLY = Fix(
    "2.10", "CVE-2026-24747"
)  # torch.load with weights_only=True; llamax has no torch.load


def installed(package: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    from importlib import metadata  # takes milliseconds

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
