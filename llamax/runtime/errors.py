"""What can go wrong by a user's hand: each error is one line that names the thing and the remedy.

Programs print the message on stderr and leave with ``exit_code``; no traceback is shown for these.
Anything else that escapes is a defect of llamax, keeps its traceback and exits with 1.

::

    0     done
    2     a mistake to mend: configuration, data, checkpoint, device
    3     no room for a checkpoint (disk, quota or file size limit); the previous one stays
    4     loss or gradients were not finite for longer than the run allows
    5     another rank died, froze or was lost: the message names it and its last step
    6     llamax plan: the run does not fit into memory
    7     llamax audit: the cluster would compile a program more than once, or one that is refused
    8     llamax doctor: something on this machine, or in the job for it, would end a run
    75    stopped by SIGTERM or SIGUSR1 and saved: start the run again to go on
    130   interrupted from the keyboard
    141   the reader of our output went away (as ``head`` does)
    143   ended by SIGTERM while it wrote a folder, of which nothing is left
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LlamaxError(Exception):
    """A mistake the user can mend; the message is one line."""

    exit_code = 2


class ConfigError(LlamaxError):
    """A configuration that is unknown, impossible or contradicts itself."""


class DataError(LlamaxError):
    """A corpus, tokenizer or token file that cannot be used."""


class CheckpointError(LlamaxError):
    """A checkpoint or model folder that cannot be read or written."""


class NoRoom(CheckpointError):
    """A disk, quota or limit that a checkpoint does not fit; what was saved before is untouched."""

    exit_code = 3


class BackendError(LlamaxError):
    """A device, process group or rendezvous that is not there."""


class NotFinite(LlamaxError):
    """Loss or gradients that stay infinite or NaN; no such update was made."""

    exit_code = 4


class LostRank(BackendError):
    """A rank that died, froze or is out of reach, so that the others cannot go on."""

    exit_code = 5


class Stopped(LlamaxError):
    """No error: the run was asked to stop, and stands saved (75 is sysexits' EX_TEMPFAIL)."""

    exit_code = 75


class Terminated(LlamaxError):
    """No error: SIGTERM came while a folder was written, and nothing of it is left."""

    exit_code = 143


def refuse(problems: list[str], where: str) -> None:
    """Raise one ConfigError that names ``where`` and lists every problem, if there are any."""
    if len(problems) == 1:
        raise ConfigError(f"{where}: {problems[0]}")
    if problems:
        raise ConfigError("\n  ".join([f"{where}: {len(problems)} problems", *problems]))


# ---- wording


def join_or(choices: Sequence[object]) -> str:
    """``a, b or c``."""
    *most, last = map(str, choices)
    return f"{', '.join(most)} or {last}" if most else last


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """``; did you mean ...?``, or the list of ``names`` where none is near."""
    names = list(names)
    same_leaf = [known for known in names if known.rpartition(".")[2] == name]
    if close := same_leaf or difflib.get_close_matches(name.lower(), names, n=1):
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(names)}" if len(names) <= 16 else "; see --help"
