"""Log lines on the console and in files, by rank."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest

from llamax.runtime.logging import log_to_file, logger, setup_logging

# ---- the logger


def test_rank_0_logs_information_and_other_ranks_warnings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        setup_logging("rank 0", main=True)
        setup_logging("rank 0", main=True)
        logger.info("resumed at step %d", 200)
        logger.debug("not this")
        assert capsys.readouterr().err == "llamax: resumed at step 200\n"
        assert not logger.propagate  # or a root logger would say it twice
        setup_logging("rank 3", main=False)
        logger.info("not this")
        logging.getLogger("llamax.data").warning("slow disk")
        assert capsys.readouterr().err == "llamax: [rank 3] slow disk\n"
    finally:
        logger.handlers[:], logger.level, logger.propagate = before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_messages_on_a_full_disk_end_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        setup_logging()
        with log_to_file(tmp_path, "job", 0):
            handler = logger.handlers[-1]
            assert isinstance(handler, logging.FileHandler)
            before = handler.setStream(open("/dev/full", "w"))  # type: ignore[arg-type]  # noqa: SIM115
            assert before is not None
            before.close()
            logger.info("told")
            with open("/dev/full", "wb", buffering=0) as full:
                monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
                logger.info("lost")
                monkeypatch.undo()
    finally:
        logger.handlers.clear()
    assert capsys.readouterr().err == "llamax: told\n"


# --- logs and environment ------------------------------------------------------------------------


def test_every_rank_keeps_its_log_and_what_ended_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging("tp3", main=False)

    def rank() -> None:
        with log_to_file(tmp_path, "job-7", 3):
            logger.info("quiet on the terminal")
            logger.warning("told")
            raise ZeroDivisionError("the end")

    with pytest.raises(ZeroDivisionError):
        rank()
    kept = (tmp_path / "logs" / "job-7" / "rank-00003.log").read_text()
    assert "INFO quiet on the terminal" in kept
    assert "ZeroDivisionError: the end" in kept
    assert capsys.readouterr().err == "llamax: [tp3] told\n"
    assert len(logger.handlers) == 1
    logger.handlers[:] = [logging.StreamHandler(io.StringIO())]
