"""A stand-in of the Hugging Face Hub's HTTP interface on the loopback, for the real client.

It serves repositories that a test fills, over the routes that huggingface_hub uses to list,
download and commit, and fails as a test asks: by a status for a path, by cutting an answer off, by
answering other bytes, or by naming files that leave their folder.

Source: the requests of huggingface_hub 1.33 and 2.4; the Hub's error headers as
``utils/_http.py`` reads them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_standInToken123"
_NO_WAIT = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})


@dataclass
class Repository:
    """Files by commit; ``refs`` name commits, and ``gated`` is whether reading needs TOKEN."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Put files on top of a branch; the commit."""
        whole = {**self.commits.get(self.refs.get(ref, ""), {}), **files}
        text = repr(sorted(whole.items())) + self.refs.get(ref, "")
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = whole
        self.refs[ref] = sha
        return sha


@dataclass
class Hub:
    """The repositories ("org/name", "datasets/org/name"), what was asked, and what fails."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    fail: dict[str, int] = field(default_factory=dict)  # end of a path -> status
    headers: dict[str, str] = field(default_factory=dict)  # of failures
    cut: dict[str, int] = field(default_factory=dict)  # end of a path -> answers that are cut
    other: dict[str, bytes] = field(default_factory=dict)  # end of a path -> bytes sent instead
    sha: str = ""  # a commit that is named in the place of the real one
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by sha256

    def add(self, name: str, files: dict[str, bytes] | Path, **how: Any) -> str:
        """A repository with these files, or with those of a folder; its commit."""
        if isinstance(files, Path):
            paths = (path for path in files.rglob("*") if path.is_file())
            files = {str(path.relative_to(files)): path.read_bytes() for path in paths}
        repository = self.repositories.setdefault(name, Repository(**how))
        return repository.commit(files)

    def downloads(self) -> list[str]:
        """The files that were downloaded, in order."""
        return [line.split("/", 1)[1] for line in self.requests if line.startswith("FILE/")]


LARGE = (".safetensors", ".parquet", ".bin")  # kept by LFS


def _is_lfs(path: str) -> bool:
    return path.endswith(LARGE)


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        address = urlsplit(self.path)
        path, hub = unquote(address.path).strip("/"), self.hub
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        hub.requests.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        hub.tokens |= {token} - {""}
        for end, status in hub.fail.items():
            if path.endswith(end):
                return self._send(status, {}, dict(hub.headers))
        words = path.split("/")
        if words[:1] == ["lfs"]:
            hub.objects[words[1]] = body
            return self._send(200, {})
        if words[:2] == ["api", "repos"]:
            wanted = json.loads(body)
            kind = "" if wanted.get("type", "model") == "model" else f"{wanted['type']}s/"
            name = f"{kind}{wanted['organization']}/{wanted['name']}"
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            if not token:
                return self._send(401, {}, {"X-Error-Message": "Invalid username or password."})
            if name in hub.repositories:
                return self._send(409, {"url": f"{hub.endpoint}/{name}"})
            hub.add(name, {".gitattributes": b""}, private=private)
            return self._send(200, {"url": f"{hub.endpoint}/{name}", "id": name})
        if words[:2] == ["api", "validate-yaml"]:
            return self._send(200, {"errors": [], "warnings": []})
        if words[0] == "api" and len(words) > 3:
            kind, name, rest = words[1], "/".join(words[2:4]), words[4:]
            full = name if kind == "models" else f"{kind}/{name}"
            return self._api(full, rest, body, token)
        if len(words) > 1 and "info" in words and words[-1] == "batch":
            return self._lfs(json.loads(body))
        if "resolve" in words:
            at = words.index("resolve")
            return self._file("/".join(words[:at]), words[at + 1 :], token)
        return self._send(404, {}, {"X-Error-Code": "RepoNotFound"})

    def _found(self, name: str, token: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and token != TOKEN):
            code = {"X-Error-Code": "RepoNotFound"} if token else {}
            said = {"X-Error-Message": "Invalid username or password."}
            self._send(404 if token else 401, {}, code or said)
            return None
        return repository

    def _commit(self, repository: Repository, revision: str) -> str:
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self._send(404, {}, {"X-Error-Code": "RevisionNotFound"})
            return ""
        return commit

    def _api(self, name: str, rest: list[str], body: bytes, token: str) -> None:
        repository = self._found(name, token)
        if repository is None:
            return None
        if rest[:1] in (["preupload"], ["commit"]):
            return self._write(name, repository, rest, body, token)
        if rest[:1] == ["branch"]:
            repository.refs.setdefault("/".join(rest[1:]), repository.refs["main"])
            return self._send(200, {})
        revision = "/".join(rest[1:]) if rest[:1] in (["revision"], ["tree"]) else "main"
        below = ""
        if rest[:2] == ["tree", "main"] and rest[2:]:  # the files of a folder
            revision, below = "main", "/".join([*rest[2:], ""])
        if not (commit := self._commit(repository, revision)):
            return None
        siblings, tree = [], []
        for path, data in repository.commits[commit].items():
            digest = hashlib.sha256(data).hexdigest()
            lfs = {"sha256": digest, "oid": digest, "size": len(data), "pointerSize": 1}
            entry: dict[str, Any] = {"size": len(data)} | ({"lfs": lfs} if _is_lfs(path) else {})
            siblings.append({"rfilename": path, "blobId": _git(data), **entry})
            if path.startswith(below):
                tree.append({"type": "file", "path": path, "oid": _git(data), **entry})
        if below and not tree:
            return self._send(404, {}, {"X-Error-Code": "EntryNotFound"})
        if rest[:1] == ["tree"]:
            return self._send(200, tree)
        info = {"id": name, "sha": self.hub.sha or commit, "siblings": siblings, "private": False}
        return self._send(200, {**info, "tags": [], "downloads": 0, "likes": 0})

    def _file(self, name: str, rest: list[str], token: str) -> None:
        repository = self._found(name, token)
        if repository is None:
            return None
        if repository.gated and token != TOKEN:
            said = "Access to this repository is restricted."
            status = 403 if token else 401
            return self._send(status, {}, {"X-Error-Code": "GatedRepo", "X-Error-Message": said})
        commit = self._commit(repository, rest[0])
        if not commit:
            return None
        path = "/".join(rest[1:])
        data = repository.commits[commit].get(path)
        if data is None:
            return self._send(404, {}, {"X-Error-Code": "EntryNotFound"})
        digest = hashlib.sha256(data).hexdigest() if _is_lfs(path) else _git(data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        for end, wrong in self.hub.other.items():
            if path.endswith(end):
                data = wrong
        if self.command == "GET":
            self.hub.requests.append(f"FILE/{path}")
        start, status = 0, 200
        if asked := self.headers.get("Range"):
            start, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        for end, times in self.hub.cut.items():
            if path.endswith(end) and self.command == "GET" and times:
                self.hub.cut[end] = times - 1
                return self._send_bytes(status, data[start:], headers, cut=True)
        return self._send_bytes(status, data[start:], headers)

    def _write(
        self, name: str, repository: Repository, rest: list[str], body: bytes, token: str
    ) -> None:
        if token != TOKEN:
            return self._send(403, {}, {"X-Error-Message": "You may not write here."})
        if rest[0] == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if _is_lfs(each["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for each in files
            ]
            return self._send(200, {"files": modes})
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = repository.commit(files, "/".join(rest[1:]))
        url = f"{self.hub.endpoint}/{name}/commit/{sha}"
        done = {"success": True, "commitOid": sha, "commitUrl": url}
        return self._send(200, {**done, "hookOutput": ""})

    def _lfs(self, wanted: dict[str, Any]) -> None:
        objects = [
            {
                **{key: each[key] for key in ("oid", "size")},
                "authenticated": True,
                "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"}},
            }
            for each in wanted["objects"]
        ]
        return self._send(200, {"transfer": "basic", "objects": objects})

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(value).encode(), headers or {})

    def _send_bytes(
        self, status: int, data: bytes, headers: dict[str, str], cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()


@contextmanager
def served_hub() -> Iterator[Hub]:
    """A Hub that answers on the loopback until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use(hub: Hub, home: Path, patch: pytest.MonkeyPatch, token: str = "") -> None:
    """Have this process use the stand-in, with a cache and a token in ``home``."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    patch.delenv("HF_TOKEN", raising=False)
    patch.setenv("HF_HUB_DISABLE_XET", "1")
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for module in (_http, file_download):
        patch.setattr(module, "time", _NO_WAIT)
    if token:
        home.mkdir(parents=True, exist_ok=True)
        (home / "token").write_text(token)


def environment(hub: Hub, home: Path, token: str = "") -> dict[str, str]:
    """The variables by which a program uses the stand-in."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": token,
    }
