"""The forms of names that several checks share: of images, and whether a path lies below another.

Source: the grammar of Docker's image references.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator

PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
IMAGE = re.compile(
    rf"(?:(?:localhost|[\w-]+(?:\.[\w-]+)+)(?::\d+)?/|[\w-]+:\d+/)?{PART}(?:/{PART})*"
    r"(?::\w[\w.-]{0,127})?(?:@sha256:[0-9a-f]{64})?",
    re.ASCII,
)


def image_problem(key: str, name: str) -> Iterator[str]:
    """The problem of the name of an image that is given, if there is one."""
    if name and not IMAGE.fullmatch(name):
        yield f"{key}={name!r} is not an image name; use registry/repository:tag in lower case"


def inside(path: str, mount: str) -> bool:
    """Whether a path is ``mount`` or lies below it."""
    path, mount = os.path.normpath(path), os.path.normpath(mount)
    return path == mount or path.startswith(mount.rstrip("/") + "/")
