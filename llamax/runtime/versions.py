"""Versions of installed packages."""

from __future__ import annotations

from importlib import metadata


def installed(package: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
