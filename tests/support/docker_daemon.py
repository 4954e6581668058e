"""A stand-in of dockerd on a socket: it records what the real docker command asks it to run."""

from __future__ import annotations

import json
import re
import shutil
import socketserver
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

DOCKER = shutil.which("docker")


class Daemon:
    """One container at most: its state, the log that it writes, and all that was asked."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.state = ""
        """State of the container; empty: there is none."""
        self.log = ""
        self.created: dict[str, Any] = {}
        """The body of the last request that created a container."""
        self.asked: list[str] = []

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and body of an answer."""
        url = urlsplit(path)
        what = re.sub(r"^/v[\d.]+", "", url.path)
        self.asked.append(f"{method} {what}")
        if what == "/containers/json":
            (pattern,) = json.loads(parse_qs(url.query)["filters"][0])["name"]
            name = self.created.get("name", "")
            shown = {"Id": "0" * 64, "Names": [f"/{name}"], "State": self.state, "Image": "x"}
            there = self.state and re.search(pattern, f"/{name}")
            return 200, [{**shown, "Created": 0, "Ports": []}] if there else []
        if what == "/containers/create":
            self.created = {**body, "name": parse_qs(url.query)["name"][0]}
            self.state = "created"
            return 201, {"Id": "0" * 64, "Warnings": []}
        if method == "DELETE":
            self.state = ""
            return 204, None
        if what.endswith("/start"):
            self.state = "running"
        if what.endswith("/stop"):
            self.state = "exited"
        if what.endswith("/wait"):
            return 200, {"StatusCode": 0}
        if what.endswith("/json"):
            return 200, {
                "Id": "0" * 64,
                "Config": {"Tty": True},
                "HostConfig": {},
                "State": {"Status": self.state, "ExitCode": 3},
            }
        return (204, None) if method == "POST" else (200, "OK")


@contextmanager
def docker_daemon() -> Iterator[Daemon]:
    """A daemon with a socket in a folder with a short path: a socket's has 107 bytes at most."""
    folder = tempfile.TemporaryDirectory(prefix="docker-", dir="/tmp")
    daemon = Daemon(Path(folder.name) / "docker.sock")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            text = self.rfile.read(length)
            logs = "/logs" in self.path
            status, found = daemon.answer(self.command, self.path, json.loads(text or "{}"))
            plain = found if isinstance(found, str) else json.dumps(found)
            data = daemon.log.encode() if logs else b"" if found is None else plain.encode()
            self.send_response(status)
            self.send_header("Api-Version", "1.50")
            self.send_header("Ostype", "linux")
            self.send_header("Content-Type", "text/plain" if logs else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_DELETE = do_HEAD = handle_one

        def address_string(self) -> str:
            return "docker"

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True

    with folder, Server(str(daemon.socket), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield daemon
        finally:
            server.shutdown()
            thread.join()
