"""Warnings that a run shows once: by rank 0, also if the parent of its process had them first."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from llamax.runtime import warn
from llamax.runtime.warn import leave_to_parent, warn_once_per_run


@pytest.fixture(autouse=True)
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Handler]:
    """The handler of a rank that is not the first, as ``setup_logging`` makes it."""
    monkeypatch.setattr(warn, "_silent", [False])
    warn._log_once.cache_clear()
    logger, quiet = logging.getLogger("llamax"), logging.NullHandler(logging.WARNING)
    monkeypatch.setattr(logger, "handlers", [quiet])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.INFO)
    yield quiet
    warn._log_once.cache_clear()


def test_the_first_rank_shows_what_the_process_that_forked_it_noted(
    handler: logging.Handler, caplog: pytest.LogCaptureFixture
) -> None:
    for level in (logging.WARNING, logging.WARNING, logging.INFO, logging.INFO):
        handler.setLevel(level)
        warn_once_per_run("100% of the disk is full")
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.INFO, "100% of the disk is full"),
        (logging.WARNING, "100% of the disk is full"),
    ]


def test_a_worker_process_shows_none(caplog: pytest.LogCaptureFixture) -> None:
    leave_to_parent()
    warn_once_per_run("its parent has this too")
    assert not caplog.records
