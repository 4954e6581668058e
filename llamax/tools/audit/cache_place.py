"""Where a shared compile cache lies: a folder, or a file system of fsspec such as S3 or the Hub.

Source: fsspec, "Built-in implementations".
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from llamax.runtime.errors import BackendError, LlamaxError
from llamax.runtime.files import make_folder
from llamax.runtime.text import printable_line

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "hf": "huggingface_hub", "gs": "gcsfs", "gcs": "gcsfs"}


class Place:
    """A shared cache: ``url`` is a folder, or ``protocol://path`` for fsspec.

    Raises BackendError, in one line, if it cannot be opened, read or written.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        protocol, separator, _ = url.partition("://")
        if "::" in url and separator:
            raise BackendError(f"{url}: chains of file systems are not supported; name one")
        try:
            import fsspec
        except ImportError:
            raise BackendError(
                "a shared compile cache needs fsspec, which is not installed; "
                "pip install 'llamax[cache]'"
            ) from None
        try:
            with self.talking("opened"):
                if separator:
                    self.fs, self.root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
                else:
                    self.fs = fsspec.filesystem("file")
                    self.root = os.path.abspath(os.path.expanduser(url))
        except ImportError as error:
            package = PACKAGES.get(protocol, error.name or protocol)
            raise BackendError(
                f"{url}: {protocol}:// needs the package {package}; pip install {package}"
            ) from None
        self.root = self.root.rstrip("/")
        self.folder = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else ())

    @contextmanager
    def talking(self, what: str) -> Iterator[None]:
        """Turn any failure of a file system into one line."""
        try:
            yield
        except (LlamaxError, ImportError):
            raise
        except Exception as error:  # each file system has its own
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise BackendError(
                f"{self.url} cannot be {what}: {printable_line(' '.join(reason.split()), 200)}"
            ) from error

    def names(self) -> dict[str, int]:
        """The size of every file, by its path in the place; links in a folder are left out."""
        if self.folder:
            with self.talking("read"):
                return dict(self._in_folder())
        with self.talking("read"):
            self.fs.invalidate_cache()
            try:
                found = self.fs.find(self.root, detail=True)
            except FileNotFoundError:
                return {}
        prefix = f"{self.root}/"
        return {
            path.removeprefix(prefix): int(info["size"] or 0)
            for path, info in found.items()
            if path.startswith(prefix)
        }

    def read(self, name: str, most: int) -> bytes:
        """A small file."""
        with self.talking("read"), self.fs.open(f"{self.root}/{name}", "rb") as file:
            content: bytes = file.read(most)
        return content

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to this machine."""
        with self.talking("read"):
            self.fs.get_file(f"{self.root}/{name}", str(target))

    def write(self, name: str, content: bytes | Path) -> None:
        """Write a file, in one step: object stores show it when it is complete.

        In a folder it gets its name when it is complete.  Raises LinkError for a link on the way.
        """
        path = f"{self.root}/{name}"
        with self.talking("written"):
            if not self.folder:
                self._send(path, content)
                return
            os.makedirs(self.root, exist_ok=True)  # its own name may be a link
            for parent in [*Path(name).parents][-2::-1]:
                make_folder(Path(self.root, parent))
            partial = f"{path}.{uuid4().hex}.partial"
            try:
                self._send(partial, content)
                os.replace(partial, path)
            finally:
                Path(partial).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a file."""
        with self.talking("written"):
            self.fs.rm_file(f"{self.root}/{name}")

    def _in_folder(self) -> Iterator[tuple[str, int]]:
        """The files of a folder and their sizes, without following links."""
        for folder, _, names in os.walk(self.root):
            for path in (Path(folder, name) for name in names):
                with suppress(FileNotFoundError):
                    found = path.lstat()
                    if stat.S_ISREG(found.st_mode):
                        yield path.relative_to(self.root).as_posix(), found.st_size

    def _send(self, path: str, content: bytes | Path) -> None:
        if isinstance(content, bytes):
            self.fs.pipe_file(path, content)
        else:
            self.fs.put_file(str(content), path)
