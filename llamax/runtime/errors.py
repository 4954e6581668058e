"""Errors that a user can correct, their exit codes and the wording of their messages.

A program prints the message on stderr, without a traceback, and ends with ``exit_code``.  Any other
exception is a defect of llamax, keeps its traceback and ends with 1.

::

    0     done
    2     a mistake to correct: configuration, data, checkpoint, device
    3     no room for a checkpoint (disk, quota or file size limit); the previous one stays
    4     loss or gradients were not finite for longer than the run allows
    5     another rank died, froze or was lost; the message names it and its last step
    6     llamax plan, llamax audit: the run does not fit into memory
    7     llamax audit: the cluster would compile a program more than once, or refuse one
    8     llamax doctor: something on this machine, or in the job for it, would end a run
    75    stopped by SIGTERM, SIGHUP or SIGUSR1 and saved: start the run again to continue it
    130   interrupted from the keyboard (Ctrl-C, SIGINT); a run has saved as at 75
    141   the reader of the output closed it, as ``head`` does
    143   ended by SIGTERM while it wrote a folder, which was removed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from numbers import Integral

MOST_PROBLEMS = 50  # listed by one error


class LlamaxError(Exception):
    """A mistake that the user can correct; the message is one line."""

    exit_code = 2

    def _render_traceback_(self) -> list[str]:
        """The lines that IPython and Jupyter show in the place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(LlamaxError):
    """A configuration that is unknown, impossible or contradicts itself."""


class DataError(LlamaxError):
    """A corpus, tokenizer or token file that cannot be used."""


class CheckpointError(LlamaxError):
    """A checkpoint or model folder that cannot be read or written."""


class LinkError(CheckpointError):
    """A link or special file in the place of a file or folder that llamax would use."""


class NoRoom(CheckpointError):
    """A checkpoint that does not fit a disk, quota or file size limit; older ones are untouched."""

    exit_code = 3


class HubError(LlamaxError):
    """A repository of the Hugging Face Hub that cannot be read or written."""


class BackendError(LlamaxError):
    """A device, process group or rendezvous that is not available."""


class NotFinite(LlamaxError):
    """Loss or gradients that stayed infinite or NaN; none of them reached the weights."""

    exit_code = 4


class LostRank(BackendError):
    """A rank that died, froze or cannot be reached, so that the others cannot continue."""

    exit_code = 5


class Stopped(LlamaxError):
    """The run was asked to stop and has saved: no error (75 is EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75


class Interrupted(Stopped):
    """The run was stopped from the keyboard and has saved: no error (130 is that of SIGINT)."""

    exit_code = 130


class Terminated(SystemExit):
    """SIGTERM arrived while a folder was written, which was removed, or a model served: no error.

    Like KeyboardInterrupt it is no Exception, as it may arise in any line and is a mistake of none:
    ``except Exception`` around that line does not take it for one.
    """

    exit_code = 143

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = self.exit_code


def refuse(problems: list[str], where: str) -> None:
    """Raise one ConfigError that names ``where`` and lists the problems, if there are any."""
    if len(problems) == 1:
        raise ConfigError(f"{where}: {problems[0]}")
    if problems:
        shown, more = problems[:MOST_PROBLEMS], len(problems) - MOST_PROBLEMS
        shown += [f"and {more} more"] if more > 0 else []
        raise ConfigError("\n  ".join([f"{where}: {len(problems)} problems", *shown]))


# ---- wording


def check_whole(name: str, value: object, use: str = "write one") -> int:
    """The value of a parameter; ConfigError, with what to ``use``, if it is no whole number."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f"`{name}={value!r:.40}` is not a whole number; {use}")
    return int(value)


def join_or(choices: Sequence[object]) -> str:
    """``a, b or c``."""
    *most, last = map(str, choices)
    return f"{', '.join(most)} or {last}" if most else last


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """``; did you mean ...?``, or the list of ``names`` where none is near.

    Of ``section.key`` the keys are compared: a near section does not make a key near.
    """
    leaves: dict[str, list[str]] = {}
    for known in names:
        leaves.setdefault(known.rpartition(".")[2].lower(), []).append(known)
    wanted = name.lower()
    if close := difflib.get_close_matches(wanted.rpartition(".")[2], leaves, n=1, cutoff=0.7):
        alike = leaves[close[0]]
        return f"; did you mean {difflib.get_close_matches(wanted, alike, n=1, cutoff=0)[0]}?"
    every = [spelling for alike in leaves.values() for spelling in alike]
    return f"; there are {', '.join(every)}" if len(every) <= 32 else "; see --help"
