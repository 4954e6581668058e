"""Files of repositories on the Hugging Face Hub, downloaded by ``huggingface_hub`` into its cache.

::

    org/name@main ──> org/name@COMMIT ──> CACHE/models--org--name/snapshots/COMMIT/config.json
                                                                 llamax/COMMIT.json
                                                                 llamax/revisions/main
                                                                 llamax/lock

``CACHE`` (HF_HUB_CACHE, or HF_HOME/hub), the token (HF_TOKEN, or HF_HOME/token), the Hub's address
(HF_ENDPOINT) and HF_HUB_OFFLINE are those of huggingface_hub.  Beside the snapshots llamax keeps
the list of files of each commit with their hashes, the commits that revisions stood for, and a
lock: one process of a machine downloads while the others wait.

Of a repository only the files that are wanted are fetched; each is compared with the hash that the
Hub states, and removed where it differs.  Names in the Hub's answers are data: one that would leave
the folder is never asked for.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from llamax.runtime.errors import HubError, LinkError, NoRoom
from llamax.runtime.files import free_bytes, read_file, sha256, write_atomic
from llamax.runtime.hub_errors import explained, is_unreachable
from llamax.runtime.hub_name import COMMIT, HubName, Kind, hub_name
from llamax.runtime.json_reader import read_object
from llamax.runtime.logging import logger
from llamax.runtime.progress import Progress, reported
from llamax.runtime.units import show_bytes

SHARED_S = 60.0  # for which processes of a machine share what a revision stands for
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
ABANDONED_S = 3600.0  # after which an unfinished download of a killed process is removed


class Wanted(NamedTuple):
    """Which files of a repository are needed, chosen by name, and what they are called together."""

    what: str
    choose: Callable[[Sequence[str]], list[str]]


class HubFile(NamedTuple):
    """A file of a commit: its size in bytes, and its sha256 or, where it has none, its git hash."""

    size: int
    sha256: str
    git: str


def local_folder(
    place: str | Path, wanted: Wanted, kind: Kind = "model", within: Path = Path()
) -> Path:
    """The folder that a path or a name on the Hub stands for; what is missing is downloaded.

    Raises HubError, NoRoom or ConfigError for a repository that cannot be fetched.
    """
    name = hub_name(place, kind, within)
    return within / place if name is None else download(name, wanted)


def resolve(name: HubName) -> HubName:
    """The name with the commit that its revision stands for now.

    Without a connection it is the commit of the last time.  Raises HubError if there is none.
    """
    if name.pinned:
        return name
    cache, revision = _Cache(name), name.revision or "main"
    with cache.locked():
        if commit := cache.commit_of(revision, SHARED_S):
            return name._replace(revision=commit)
        try:
            with explained(name):
                commit = _ask(name, cache)
        except HubError as error:
            known = cache.commit_of(revision)
            if not known or not is_unreachable(error):
                raise
            logger.warning("%s; taking %s from %s", error, known[:12], cache.folder)
            commit = known
        else:
            cache.remember(revision, commit)
    return name._replace(revision=commit)


def download(name: HubName, wanted: Wanted) -> Path:
    """The folder in the cache with the wanted files of a repository, and perhaps with others."""
    name = resolve(name)
    cache = _Cache(name)
    chosen = _missing(name, wanted, cache)
    if chosen:
        with cache.locked():
            if chosen := _missing(name, wanted, cache):  # perhaps another process has been here
                _fetch(name, chosen, cache)
    return cache.snapshot


def file_names(name: HubName) -> list[str]:
    """The names of all files of a commit; without a connection those that are here."""
    cache = _Cache(name)
    return [path for path in _files(name, cache) or cache.present() if _stays_inside(path)]


def _files(name: HubName, cache: _Cache) -> dict[str, HubFile] | None:
    """The files of a commit; None if the Hub cannot be asked, and some files are here."""
    files = cache.files()
    if files is None:
        try:
            with explained(name):
                _ask(name, cache)
            files = cache.files()
        except HubError as error:
            if not is_unreachable(error) or not cache.present():
                raise
    return files


def _missing(name: HubName, wanted: Wanted, cache: _Cache) -> dict[str, HubFile]:
    """The wanted files that are not in the cache; HubError if the repository has no such files."""
    files = _files(name, cache)
    if files is None:  # another program has put some there
        files = dict.fromkeys(cache.present(), HubFile(0, "", ""))
    chosen = wanted.choose([path for path in files if _stays_inside(path)])
    if not chosen:
        raise HubError(
            f"{name} on the Hub has no {wanted.what}; give another repository, or a folder"
        )
    return {path: files[path] for path in chosen if not (cache.snapshot / path).exists()}


def _ask(name: HubName, cache: _Cache) -> str:
    """The commit of a name, by the Hub; its list of files is kept."""
    from huggingface_hub import HfApi

    info = HfApi().repo_info(
        name.repo, repo_type=name.kind, revision=name.revision or None, files_metadata=True
    )
    commit = str(info.sha)
    if not COMMIT.fullmatch(commit):
        raise HubError(f"the Hub names {commit[:80]!r} as the commit of {name}, which it is not")
    files = {}
    for each in getattr(info, "siblings", None) or ():
        lfs: Any = each.lfs or {}
        whole = lfs.get("sha256") if isinstance(lfs, dict) else lfs.sha256
        files[each.rfilename] = HubFile(int(each.size or 0), whole or "", each.blob_id or "")
    cache.keep_files(commit, files)
    return commit


def _fetch(name: HubName, files: dict[str, HubFile], cache: _Cache) -> None:
    """Download files of a commit, each whole or not at all."""
    size = sum(file.size for file in files.values())
    free = free_bytes(cache.folder)
    if free is not None and free < size:
        raise NoRoom(
            f"{name} needs {show_bytes(size)} and {cache.root} has {show_bytes(free)} free; free "
            "some, or set HF_HOME to a folder on a larger disk"
        )
    cache.remove_abandoned()
    with Progress(f"downloading {name.repo}", size) as progress, explained(name):
        from huggingface_hub import hf_hub_download

        bar = _bar(progress)
        for path, file in files.items():
            place = hf_hub_download(
                name.repo,
                path,
                repo_type=name.kind,
                revision=name.revision,
                tqdm_class=bar,
            )
            _verify(name, path, file, Path(place))


def _verify(name: HubName, path: str, file: HubFile, place: Path) -> None:
    """Remove a file that is not what the Hub states, and raise HubError."""
    if file.sha256:
        stated, actual = file.sha256, sha256(place.resolve())
    elif file.git:
        text = place.read_bytes()
        stated, actual = file.git, hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()
    else:
        return
    if actual != stated:
        blob = place.resolve()
        place.unlink()
        blob.unlink(missing_ok=True)
        raise HubError(
            f"{path} of {name} arrived damaged: its hash is {actual[:12]}, and the Hub states "
            f"{stated[:12]}; it was removed, start again"
        )


def _stays_inside(path: str) -> bool:
    """Whether a name in the Hub's answer is a relative path below the folder."""
    return not re.search(r"[\\\0-\x1f\x7f]", path) and all(
        part not in ("", ".", "..") for part in path.split("/")
    )


def _bar(progress: Progress) -> type:
    """A bar for huggingface_hub that shows nothing itself and counts in ``progress``."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            progress.update(n or 0)
            return None

    return Bar


class _Cache:
    """The part of huggingface_hub's cache that belongs to a repository."""

    def __init__(self, name: HubName) -> None:
        with explained(name):
            from huggingface_hub import constants

        self.root = Path(constants.HF_HUB_CACHE)
        self.folder = self.root / f"{name.kind}s--{name.repo.replace('/', '--')}"
        self.notes = self.folder / "llamax"
        self.revision = name.revision

    @property
    def snapshot(self) -> Path:
        """The folder of the files of the commit."""
        return self.folder / "snapshots" / self.revision

    def present(self) -> list[str]:
        """The names of the commit's files that are in the cache."""
        found = (path for path in self.snapshot.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.snapshot)) for path in found)

    def files(self) -> dict[str, HubFile] | None:
        """The files of the commit; None if the Hub was not asked yet."""
        try:
            kept = read_object(self.notes / f"{self.revision}.json")
            files = {path: HubFile(*values) for path, values in kept.items()}
        except (OSError, ValueError, TypeError):
            return None
        kinds = [tuple(map(type, file)) for file in files.values()]
        return files if all(each == (int, str, str) for each in kinds) else None

    def keep_files(self, commit: str, files: dict[str, HubFile]) -> None:
        """Keep the list of files of a commit."""
        self._write(self.notes / f"{commit}.json", json.dumps(files))

    def _write(self, path: Path, text: str) -> None:
        """Write a note; a cache that another user made complete may be read only."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text.encode())
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise

    def commit_of(self, revision: str, within_s: float = float("inf")) -> str:
        """The commit that a revision stood for in the last ``within_s`` seconds; empty: unknown."""
        ours = self.notes / "revisions" / quote(revision, safe="")
        for path in (ours, *([self.folder / "refs" / revision] * (within_s == float("inf")))):
            with suppress(OSError, LinkError):
                if 0 <= time.time() - path.stat().st_mtime <= within_s:
                    commit = read_file(path, 100).decode(errors="replace").strip()
                    if COMMIT.fullmatch(commit):
                        return commit
        return ""

    def remember(self, revision: str, commit: str) -> None:
        """Keep the commit that a revision stands for."""
        self._write(self.notes / "revisions" / quote(revision, safe=""), commit)

    def forget(self) -> None:
        """Ask the Hub again for what its revisions stand for, as they have changed."""
        for path in (self.notes / "revisions").glob("*"):
            path.unlink(missing_ok=True)

    def remove_abandoned(self) -> None:
        """Remove the unfinished downloads of killed processes; call it with the lock held."""
        for path in (self.folder / "blobs").glob("*.incomplete"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the repository, and show that another process is waited for.

        A cache that cannot be written, or a file system without locks, is used without.
        """
        try:
            self.notes.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            handle = os.open(self.notes / "lock", flags, 0o666)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise HubError(
                    f"cannot write into the cache {self.root}: {error.strerror}; set HF_HOME to a "
                    "folder that can be written"
                ) from None
            yield
            return
        try:
            with reported(f"waiting for another download of {self.folder.name}"), suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def forget_revisions(name: HubName) -> None:
    """Have the next start ask the Hub for the commits of a repository that was written to."""
    _Cache(name).forget()
