"""What huggingface_hub raises, as one line: what is wrong, and what to do about it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llamax.runtime.errors import HubError, LlamaxError, NoRoom
from llamax.runtime.hub_name import HubName


class Unreachable(HubError):
    """The Hub cannot be asked: no connection, or HF_HUB_OFFLINE."""


def is_unreachable(error: Exception) -> bool:
    """Whether what is in the cache may be used in the place of an answer."""
    return isinstance(error, Unreachable)


@contextmanager
def explained(name: HubName, writing: bool = False) -> Iterator[None]:
    """Raise a HubError of one line for what huggingface_hub raises inside, and keep it quiet.

    ``writing``: whether the block writes to the repository.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise HubError(
            f"{name} is not a folder on this machine, and the Hugging Face Hub needs the package "
            "huggingface_hub, which is not installed; check the path, or pip install 'llamax[hub]'"
        ) from None
    logs: Any = huggingface_hub.logging
    level = logs.get_verbosity()
    logs.set_verbosity_error()  # its retries and hints are not mistakes
    try:
        yield
    except LlamaxError:
        raise
    except Exception as error:  # the Hub, the network, its client and TLS raise what they like
        raise _explain(name, error, writing) from None
    finally:
        logs.set_verbosity(level)


def _explain(name: HubName, error: Exception, writing: bool) -> LlamaxError:
    from huggingface_hub import constants, get_token

    chain = [*_causes(error)]
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return NoRoom(
                f"no space left in {constants.HF_HUB_CACHE} for {name}; free some, or set HF_HOME "
                "to a folder on a larger disk"
            )
    response: Any = next(
        (r for e in chain if (r := getattr(e, "response", None)) is not None), None
    )
    status = getattr(response, "status_code", 0)
    code = response.headers.get("X-Error-Code", "") if response is not None else ""
    page = f"{constants.ENDPOINT}/{name.page}"
    log_in = "hf auth login, or HF_TOKEN"
    if code == "GatedRepo":
        first = f"{name.repo} is gated: accept its terms at {page} with your account"
        return HubError(
            f"{first}, and wait until access is granted; the token in use has none yet"
            if get_token()
            else f"{first}, then log in here ({log_in})"
        )
    if code == "RevisionNotFound":
        return HubError(
            f"{name.repo} on the Hub has no revision {name.revision}; {page} lists its branches "
            "and tags"
        )
    if code == "EntryNotFound":
        return HubError(f"a file of {name} is missing on the Hub; see {page}")
    if status in (401, 403) and get_token():
        needed = "write to" if writing else "read"
        return HubError(
            f"the Hub refuses the token of {_token_source()} for {name} ({status}); use one that "
            f"may {needed} it ({log_in})"
        )
    if writing and status in (401, 403, 404):
        return HubError(
            f"the Hub lets nobody write to {name} without a token that may ({status}); check the "
            f"name, or log in ({log_in})"
        )
    if status in (401, 404):
        private = "" if get_token() else f", or log in ({log_in}) if it is private"
        return HubError(
            f"{name} is neither a folder on this machine nor a repository of {constants.ENDPOINT} "
            f"that can be read; check the spelling{private}"
        )
    if status == 429:
        after = response.headers.get("Retry-After", "")
        when = f"in {after} s" if after.isdecimal() else "in some minutes"
        more = "" if get_token() else f", or log in ({log_in}) for a higher limit"
        return HubError(f"the Hub limits the requests from here (429); start again {when}{more}")
    if _offline(chain):
        if writing:
            return Unreachable(f"cannot write to {name} while HF_HUB_OFFLINE is set; unset it")
        return Unreachable(
            f"{name} is not on this machine and HF_HUB_OFFLINE is set; download it where there is "
            "a connection, or unset HF_HUB_OFFLINE"
        )
    said = " ".join(str(chain[-1] if status else error).split())[:160]
    if status:
        return (Unreachable if status >= 500 else HubError)(
            f"the Hub answers {status} for {name} ({said}); start again later"
        )
    if any(part in type(each).__name__ for each in chain for part in NETWORK):
        cut = f"{constants.ENDPOINT} cannot be reached or the connection was cut ({said})"
        return Unreachable(
            f"{name} is not written: {cut}; check the network, and start again"
            if writing
            else f"{name} is not a folder on this machine, and {cut}; check the path and the "
            "network, and start again"
        )
    return HubError(f"{name} cannot be {'written' if writing else 'read'} ({said}); start again")


NETWORK = (
    "Connect",
    "Timeout",
    "Protocol",
    "NetworkError",
    "ReadError",
    "WriteError",
    "ProxyError",
)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    at: BaseException | None = error
    seen: set[int] = set()
    while at is not None and id(at) not in seen:
        yield at
        seen.add(id(at))
        at = at.__cause__ or at.__context__


def _offline(chain: list[BaseException]) -> bool:
    from huggingface_hub import constants, errors

    offline = any(isinstance(each, errors.OfflineModeIsEnabled) for each in chain)
    return constants.HF_HUB_OFFLINE or offline


def _token_source() -> str:
    """Where the token comes from, without the token."""
    from huggingface_hub import constants

    return "HF_TOKEN" if os.environ.get("HF_TOKEN") else constants.HF_TOKEN_PATH
