"""The first seconds of a run: what takes long is reported while it lasts."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
from support import tiny_run

from llamax.model.llama import Llama
from llamax.parallel.rendezvous import Rendezvous
from llamax.runtime import progress
from llamax.runtime.logging import logger, setup_logging
from llamax.train import train
from llamax.training.parts import Parts


class Awaited(logging.Handler):
    """Sets an event when a message with ``text`` is logged."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.logged = text, threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self.text in record.getMessage():
            self.logged.set()


def test_a_model_that_takes_long_to_build_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_S", 0.0)
    monkeypatch.setattr(progress, "LEAST_S", 0.0)
    building = Awaited("building the model: ")

    class Slow(Llama):
        """A Llama that is ready when the log has reported that it is being built."""

        def init(self, seed: int) -> Llama:
            assert building.logged.wait(300)
            return super().init(seed)

    (tmp_path / "data").mkdir()
    config = tiny_run.config(
        tiny_run.make_dataset(tmp_path / "data"), tmp_path / "run", validate_batches=1
    )
    setup_logging()
    logger.addHandler(building)
    try:
        train(config, Rendezvous(), Parts(model_class=Slow))
    finally:
        logger.removeHandler(building)
    assert building.logged.is_set()
