"""The check of a compile cache that jobs share: which programs of the run it lacks."""

from __future__ import annotations

from collections.abc import Iterator

from llamax.runtime.errors import BackendError
from llamax.runtime.units import count, show_time
from llamax.tools.audit.cache_place import Place
from llamax.tools.audit.compile_cache import Note
from llamax.tools.audit.shared_cache import CompileTime, check
from llamax.tools.doctor.finding import Finding, passed, unknown
from llamax.tools.doctor.storage import COMPILES, PRECOMPILE, Hashes

NAME = "shared cache"


def shared_cache(url: str, hashes: Hashes, note: Note) -> Iterator[Finding]:
    """Whether a shared cache holds the programs of a run; ``hashes`` as in ``storage.cache``."""
    try:
        place = Place(url)
        place.names()
    except BackendError as error:
        fix = "check the address, and the credentials of this machine"
        yield Finding("warning", NAME, str(error), COMPILES, fix)
        return
    try:
        traced = hashes()
    except BackendError as error:
        yield unknown(NAME, f"{url}: {error}", "run doctor where torch-xla is installed")
        return
    found = check(place, traced, note)
    programs = f"{count(found.entries, 'compiled program')} in {url}"
    if found.missing:
        lacking = " and ".join(found.missing)
        what = f"{programs}, without {lacking} of this run"
        yield Finding("warning", NAME, what, _how_long(found.time), PRECOMPILE)
    else:
        yield passed(NAME, f"{programs}, with {', '.join(found.present)} of this run")


def _how_long(time: CompileTime | None) -> str:
    """How long compiling takes: by what the cache has recorded, or by what others published."""
    if time is None:
        return f"{COMPILES}; no compilation into this cache is recorded"
    return (
        "they are compiled while training waits; the last compilation into this cache took "
        f"{show_time(time.seconds)} for {count(time.programs, 'program')}"
    )
