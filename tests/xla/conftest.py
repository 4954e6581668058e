"""Two groups of tests, a process each: a tracer does not survive replicas that ran before it."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        module = item.getparent(pytest.Module)
        assert module is not None
        group = "replicas" if hasattr(module.obj, "ranks") else "traced"
        item.add_marker(pytest.mark.xdist_group(group))
