"""What can go wrong by a user's hand: each error is one line that names the thing and the remedy.

Programs print the message on stderr and leave with ``exit_code``; no traceback is shown for these.
Anything else that escapes is a defect of llamax and keeps its traceback.
"""

from __future__ import annotations


class LlamaxError(Exception):
    """A mistake the user can mend; the message is one line."""

    exit_code = 2


class ConfigError(LlamaxError):
    """A configuration that is unknown, impossible or contradicts itself."""


class DataError(LlamaxError):
    """A corpus, tokenizer or token file that cannot be used."""


class CheckpointError(LlamaxError):
    """A checkpoint or model folder that cannot be read or written."""


class BackendError(LlamaxError):
    """A device, process group or rendezvous that is not there."""


def refuse(found: list[str], where: str) -> None:
    """Raise one ConfigError that names ``where`` and tells every line of ``found``, if any."""
    if len(found) == 1:
        raise ConfigError(f"{where}: {found[0]}")
    if found:
        raise ConfigError("\n  ".join([f"{where}: {len(found)} problems", *found]))
