"""A warning that a run shows once, though every rank has it."""

from __future__ import annotations

import logging


def warn_once_per_run(message: str, *arguments: object) -> None:
    """Log what every rank notices: a warning of rank 0, an info line of the other ranks."""
    logger = logging.getLogger("llamax")  # as llamax.runtime.logging has set it up
    others = any(handler.level > logging.INFO for handler in logger.handlers)
    logger.log(logging.INFO if others else logging.WARNING, message, *arguments)
