"""Two groups of tests, a process each: a tracer does not survive replicas that ran before it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_run import make_dataset


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        module = item.getparent(pytest.Module)
        assert module is not None
        group = "replicas" if hasattr(module.obj, "ranks") else "traced"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_dataset(tmp_path)
