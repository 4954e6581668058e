"""The process that reads hostile folders under an audit hook."""

from __future__ import annotations

from typing import Any

import pytest
from support.hostile import Watched


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    guard = Watched(tmp_path_factory.getbasetemp())
    yield guard
    assert guard.process.stdin is not None
    guard.process.stdin.close()
    assert guard.process.wait(300) == 0
