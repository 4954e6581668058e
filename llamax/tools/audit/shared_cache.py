"""A compile cache that machines share: on S3, in a Hub repository, or in a folder, by fsspec.

Neuron's compile cache is a folder with one folder for each program that was compiled::

    neuronxcc-VERSION/MODULE_<hash of the HLO>+<hash of the flags>/    model.neff and small files

``push`` copies what is whole to a place that others read, ``pull`` copies back what is missing::

    PLACE/neuronxcc-VERSION/MODULE_.../<sha256>                the content of a file, named by it
    PLACE/neuronxcc-VERSION/MODULE_.../entry.json              written last: names, sizes, sha256
    PLACE/llamax-programs/neuronxcc-VERSION/<sha256>.json      a note: see ``compile_cache``
    PLACE/llamax-programs/neuronxcc-VERSION/compile-time.json  how long the last compilation took

An entry without its ``entry.json``, or with a file of another size, does not count: so an upload
that was cut off is invisible, and the next ``push`` goes on where it ended.  Two writers of one
entry write different contents to different names, and the later ``entry.json`` counts.  ``pull``
compares sizes and sha256 before an entry gets its place in the local cache, under one rename.

A note lists the modules that the local cache held when it was pushed, for the same compiler: those
of its program and maybe others.  Which of them are its own only a process with NeuronCores knows.

Source: AWS Neuron, "Neuron persistent cache"; fsspec, "Built-in implementations".
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from llamax.runtime.errors import BackendError, LinkError
from llamax.runtime.files import (
    SHA256,
    is_file_name,
    make_folder,
    refuse_link,
    same_file,
    write_atomic,
)
from llamax.runtime.files import sha256 as sha256_of
from llamax.runtime.json_reader import JsonError, parse_object
from llamax.runtime.text import printable_line
from llamax.runtime.units import count
from llamax.tools.audit.cache_place import Place
from llamax.tools.audit.compile_cache import NOTES, Note, read_notes

COMPILER = re.compile(r"neuronxcc-[A-Za-z0-9][\w.+-]{0,99}", re.ASCII)
MODULE = re.compile(r"MODULE_[A-Za-z0-9][\w.+-]{0,199}", re.ASCII)
COMPILED = re.compile(r"model\.[\w.]+|compile_flags\.json")  # what a compiler leaves in a folder
ENTRY, TIME, NEFF = "entry.json", "compile-time.json", "model.neff"
MOST_BYTES = 2**20  # of an entry.json or a note
NOT_KEPT = (".lock", ".partial")  # endings of files that a running compiler holds


class File(NamedTuple):
    """A file of an entry: its path inside, with ``/``, its size and its sha256."""

    name: str
    size: int
    digest: str


@dataclass
class Report:
    """What a copy did with entries, by ``neuronxcc-.../MODULE_...``; ``refused``: why each is."""

    copied: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    sent_bytes: int = 0


class CompileTime(NamedTuple):
    """How long a compilation took: wall time, and the number of programs."""

    seconds: float
    programs: int


def modules(cache: Path) -> dict[str, Path]:
    """The compiled programs of a local cache, by ``neuronxcc-.../MODULE_...``."""
    found = sorted(path.parent for path in cache.glob(f"neuronxcc-*/MODULE_*/{NEFF}"))
    return {
        f"{path.parent.name}/{path.name}": path
        for path in found
        if MODULE.fullmatch(path.name) and COMPILER.fullmatch(path.parent.name)
    }


def push(cache: Path, place: Place) -> Report:
    """Copy the compiled programs and the notes of a local cache to a place.

    Notes of a compiler are held back while a program of it has failed or was left out: what they
    promise would not be there.
    """
    report, names = Report(), place.names()
    for key, folder in modules(cache).items():
        if _whole(place, key, names):
            report.present.append(key)
            continue
        try:
            before = _times(folder)
            files = list(_files(folder))
            sent = [each for each in files if names.get(f"{key}/{each.digest}") != each.size]
            for each in sent:
                place.write(f"{key}/{each.digest}", folder / each.name)
            if _times(folder) != before:
                for each in sent:
                    place.remove(f"{key}/{each.digest}")
                report.refused[key] = "it changed while it was copied"
                continue
        except (OSError, LinkError) as error:
            report.refused[key] = str(error)
            continue
        entry = {"files": {each.name: [each.size, each.digest] for each in files}}
        place.write(f"{key}/{ENTRY}", json.dumps(entry).encode())
        report.sent_bytes += sum(each.size for each in sent)
        report.copied.append(key)
    for folder in sorted(cache.glob("neuronxcc-*/MODULE_*")):
        if not (folder / NEFF).exists():
            report.refused[f"{folder.parent.name}/{folder.name}"] = f"it has no {NEFF}"
    _push_notes(cache, place, names, {key.partition("/")[0] for key in report.refused})
    return report


def _push_notes(
    cache: Path, place: Place, names: Mapping[str, int], held_back: Collection[str]
) -> None:
    """Write the notes of a cache, each with the modules of its compiler."""
    known = modules(cache)
    for note in read_notes(cache):
        compiler = compiler_folder(note.compiler)
        if compiler is None or compiler in held_back:
            continue
        held = sorted(key.partition("/")[2] for key in known if key.startswith(f"{compiler}/"))
        name = f"{NOTES}/{compiler}/{note.digest}.json"
        content = json.dumps({**note.content, "modules": held}).encode()
        if name not in names or place.read(name, MOST_BYTES) != content:
            place.write(name, content)


def pull(place: Place, cache: Path, compiler: str | None) -> Report:
    """Copy the programs of a place that a local cache lacks; ``compiler``: of this version alone.

    Raises BackendError if the local cache cannot be written.
    """
    try:
        return _pulled(place, cache, compiler_folder(compiler))
    except OSError as error:
        why = f"{cache} cannot be written: {error.strerror}; see llamax doctor"
        raise BackendError(why) from None


def _pulled(place: Place, cache: Path, wanted: str | None) -> Report:
    """What ``pull`` does; ``wanted``: the folder of the compiler."""
    report, names = Report(), place.names()
    for key in _entries(names):
        if wanted is not None and not key.startswith(f"{wanted}/"):
            continue
        target = cache / key
        if (target / NEFF).exists():
            report.present.append(key)
            continue
        try:
            files = _entry(place, key)
        except JsonError as error:
            report.refused[key] = f"its {ENTRY} {error}"
            continue
        if not _present(key, files, names):
            names = place.names()  # a writer may have replaced the entry since
            if not _present(key, files, names):
                report.refused[key] = "a file is missing or has another size"
                continue
        if why := _take(place, key, files, target):
            report.refused[key] = why
            continue
        report.copied.append(key)
        report.sent_bytes += sum(each.size for each in files)
    _pull_notes(place, cache, names, wanted)
    return report


def _pull_notes(place: Place, cache: Path, names: Mapping[str, int], wanted: str | None) -> None:
    """Copy the notes of which the local cache holds every module."""
    held = set(modules(cache))
    for name in sorted(names):
        folder, compiler, file = [*name.split("/"), "", ""][:3]
        digest = file.removesuffix(".json")
        if (folder, name) != (NOTES, f"{NOTES}/{compiler}/{digest}.json"):
            continue
        if not SHA256.fullmatch(digest) or not COMPILER.fullmatch(compiler):
            continue
        target = cache / NOTES / f"{digest}.json"
        if wanted not in (None, compiler) or (wanted is None and target.exists()):
            continue
        try:
            content = parse_object(place.read(name, MOST_BYTES))
        except JsonError:
            continue
        listed = content.pop("modules", None)
        if isinstance(listed, list) and listed and {f"{compiler}/{m}" for m in listed} <= held:
            make_folder(target.parent)
            write_atomic(target, f"{json.dumps(content)}\n".encode())


def _take(place: Place, key: str, files: Sequence[File], target: Path) -> str:
    """Copy an entry to its place in the local cache; why it is not taken, or nothing."""
    partial = target.with_name(f".{target.name}.{uuid4().hex}.partial")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        return f"{target} is not a folder; remove it"
    make_folder(target.parent)
    partial.mkdir()
    try:
        for each in files:
            path = partial / each.name
            path.parent.mkdir(parents=True, exist_ok=True)
            place.fetch(f"{key}/{each.digest}", path)
            if path.stat().st_size != each.size or sha256_of(path) != each.digest:
                return f"{each.name} differs from its sha256; remove {place.url}/{key}"
        try:
            partial.rename(target)
        except OSError:
            if (target / NEFF).exists():  # another process was faster
                return ""
            if not target.exists():
                raise
            if why := _in_the_way(target):
                return why
            failed = partial.with_suffix(".failed")  # a failed compilation, which is cached too
            target.rename(failed)
            partial.rename(target)
            shutil.rmtree(failed, ignore_errors=True)
        return ""
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _in_the_way(target: Path) -> str:
    """Why a local folder without a program is more than a failed compilation, or nothing."""
    for path in sorted(target.iterdir()):
        if path.is_symlink() or not path.is_file() or not COMPILED.fullmatch(path.name):
            return f"{target} holds {path.name}, which no compiler made; move it away"
        if path.suffix == ".lock":
            with open(path, "rb", opener=same_file) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return f"{target} is being compiled; pull again later"
    return ""


class Found(NamedTuple):
    """The programs of a run in a place, by kind, and the last compilation recorded there."""

    present: list[str]
    missing: list[str]
    entries: int
    time: CompileTime | None


def check(place: Place, hashes: Mapping[str, str], note: Note) -> Found:
    """Which programs of a run (kind -> hash) a place holds for a compiler and its flags.

    Sizes are compared and not contents: nothing but small files is read.  Without an installed
    compiler any will do.
    """
    names, wanted = place.names(), compiler_folder(note.compiler)
    whole = {key for key in _entries(names) if _whole(place, key, names)}
    compilers = [wanted] if wanted else sorted({key.partition("/")[0] for key in whole})
    present = set()
    for kind, digest in hashes.items():
        for compiler in compilers:
            name = f"{NOTES}/{compiler}/{digest}.json"
            if name in names and _promised(place, name, note.flags) <= whole:
                present.add(kind)
    times = [time for each in compilers if (time := read_time(place, each, names))]
    return Found(
        [kind for kind in hashes if kind in present],
        [kind for kind in hashes if kind not in present],
        sum(key.partition("/")[0] in compilers for key in whole),
        times[-1] if times else None,
    )


def _promised(place: Place, name: str, flags: str) -> set[str]:
    """The modules that a note lists; one that no place has for a note of other flags."""
    try:
        content = parse_object(place.read(name, MOST_BYTES))
    except JsonError:
        return {""}
    held = content.get("modules")
    if content.get("flags") != flags or not isinstance(held, list) or not held:
        return {""}
    compiler = name.split("/")[1]
    return {f"{compiler}/{module}" for module in held}


def compiler_folder(version: str | None) -> str | None:
    """The folder of a version of neuronx-cc; None for none, or for a name that is not safe."""
    name = f"neuronxcc-{version}"
    return name if version is not None and COMPILER.fullmatch(name) else None


def write_time(place: Place, compiler: str, time: CompileTime) -> None:
    """Record how long the last compilation into a place took."""
    content = json.dumps(time._asdict()).encode()
    place.write(f"{NOTES}/{compiler}/{TIME}", content)


def read_time(place: Place, compiler: str, names: Mapping[str, int]) -> CompileTime | None:
    """The last compilation that is recorded in a place."""
    name = f"{NOTES}/{compiler}/{TIME}"
    if name not in names:
        return None
    try:
        content = parse_object(place.read(name, MOST_BYTES))
        seconds, programs = content["seconds"], content["programs"]
    except (JsonError, KeyError):
        return None
    if not isinstance(seconds, int | float) or not isinstance(programs, int) or seconds < 0:
        return None
    return CompileTime(float(seconds), programs)


def lines(report: Report, verb: str, where: str) -> Iterator[str]:
    """A report in words."""
    yield (
        f"{verb} {count(len(report.copied), 'compiled program')}, "
        f"{report.sent_bytes / 2**20:.1f} MiB, {where}; {len(report.present)} were there"
    )
    for key, why in report.refused.items():
        yield f"{printable_line(key)} is left out: {printable_line(why)}"


# ---- entries


def _files(folder: Path) -> Iterator[File]:
    """The files of a local entry; raises LinkError for a link or a special file."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        refuse_link(path)
        if not name.endswith(NOT_KEPT):
            yield File(name, path.stat().st_size, sha256_of(path))


def _times(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of change of the files of a local entry."""
    found = [(path, path.lstat()) for path in sorted(folder.rglob("*"))]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found]


def _entries(names: Mapping[str, int]) -> Iterator[str]:
    """The entries of a place by ``neuronxcc-.../MODULE_...``; names that are none are passed by."""
    for name in sorted(names):
        parts = name.split("/")
        if len(parts) != 3 or parts[2] != ENTRY:
            continue
        if COMPILER.fullmatch(parts[0]) and MODULE.fullmatch(parts[1]):
            yield f"{parts[0]}/{parts[1]}"


def _entry(place: Place, key: str) -> list[File]:
    """The files of an entry; raises JsonError for an ``entry.json`` that says something else."""
    table = parse_object(place.read(f"{key}/{ENTRY}", MOST_BYTES)).get("files")
    if not isinstance(table, dict) or NEFF not in table:
        raise JsonError("lists no files")
    files = []
    for name, value in table.items():
        if not all(map(is_file_name, name.split("/"))):
            raise JsonError(f"names the file {name!r}")
        match value:
            case [int(size), str(digest)] if type(size) is int and SHA256.fullmatch(digest):
                files.append(File(name, size, digest))
            case _:
                raise JsonError(f"has no size and sha256 of {name!r}")
    return files


def _present(key: str, files: Sequence[File], names: Mapping[str, int]) -> bool:
    """Whether all files of an entry are among ``names``, in their sizes."""
    return all(names.get(f"{key}/{each.digest}") == each.size for each in files)


def _whole(place: Place, key: str, names: Mapping[str, int]) -> bool:
    """Whether an entry has all of its files."""
    if f"{key}/{ENTRY}" not in names:
        return False
    try:
        return _present(key, _entry(place, key), names)
    except JsonError:
        return False
