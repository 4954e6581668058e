"""How a long program begins: once more, with a heap that stays flat; a disk that is full."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from llamax.cli.doctor import NOT_READY
from llamax.cli.plan import DOES_NOT_FIT
from llamax.runtime import errors
from llamax.runtime.errors import NoRoom
from llamax.runtime.logging import log_to_file, logger, setup_logging
from llamax.runtime.process import run_main
from llamax.tools.audit.audit import DIFFERS

OLD = (
    sys.platform == "linux"
    and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc 2.")
    and int((os.confstr("CS_GNU_LIBC_VERSION") or "").split(".")[1]) < 38
)
CODE = """
import os, sys
print("begins", os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES", ""), flush=True)
from llamax.runtime import process, signals
process.steady_heap()
signals.install()
print("goes on", os.getpid(), flush=True)
"""


def begin(*argv: str, tunables: str | None = None) -> tuple[int, list[str]]:
    environ = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    if tunables is not None:
        environ["GLIBC_TUNABLES"] = tunables
    done = subprocess.run(
        [sys.executable, "-c", CODE, *argv], env=environ, capture_output=True, text=True
    )
    return done.returncode, done.stdout.splitlines()


@pytest.mark.skipif(not OLD, reason="this C library keeps its heap flat by itself")
def test_a_program_starts_again_once_as_itself() -> None:
    code, lines = begin("a b", "--c=d")
    assert code == 0
    assert len(lines) == 3, lines
    pid = lines[0].split()[1]
    assert [line.split()[1 if line.startswith("begins") else 2] for line in lines] == [pid] * 3
    assert lines[0].endswith("['a b', '--c=d'] ")
    assert lines[1].endswith("['a b', '--c=d'] glibc.malloc.tcache_count=0")


@pytest.mark.skipif(not OLD, reason="this C library keeps its heap flat by itself")
def test_other_tunables_are_kept() -> None:
    _, lines = begin(tunables="glibc.malloc.arena_max=4")
    assert lines[1].endswith("glibc.malloc.arena_max=4:glibc.malloc.tcache_count=0")


def test_a_cache_that_was_chosen_stays() -> None:
    code, lines = begin(tunables="glibc.malloc.tcache_count=3")
    assert code == 0
    assert len(lines) == 2
    assert lines[0].endswith("tcache_count=3")


@pytest.mark.skipif(not OLD, reason="this C library keeps its heap flat by itself")
def test_signals_wait_for_the_program_to_listen() -> None:
    code = """
import os, signal, sys
from llamax.runtime import process, signals
if "GLIBC_TUNABLES" in os.environ:  # started again: they are held back until someone listens
    os.kill(os.getpid(), signal.SIGTERM)
    print("held", flush=True)
process.steady_heap()
signals.install()
import time; time.sleep(10)
print("never reached")
"""
    environ = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "held\n"
    assert "stopped by SIGTERM" in done.stderr
    assert done.returncode not in (0, -signal.SIGTERM)


@pytest.mark.parametrize(("name", "about"), [(None, ""), ("run/x", " for run/x")])
def test_no_room_is_one_line(
    name: str | None, about: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: Sequence[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", name)

    assert run_main(main, []) == NoRoom.exit_code
    line = f"llamax: no room{about}: No space left on device; make some\n"
    assert capsys.readouterr().err == line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_messages_on_a_full_disk_end_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs" / "job").mkdir(parents=True)
    (tmp_path / "logs" / "job" / "rank-00000.log").symlink_to("/dev/full")
    try:
        setup_logging()
        with log_to_file(tmp_path, "job", 0):
            logger.info("told")
            with open("/dev/full", "wb", buffering=0) as full:
                monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
                logger.info("lost")
                monkeypatch.undo()
    finally:
        logger.handlers.clear()
    assert capsys.readouterr().err == "llamax: told\n"


def test_every_exit_code_means_one_thing_and_is_listed() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    lists = {
        "errors": re.findall(r"^    (\d+) ", errors.__doc__ or "", re.M),
        "README": re.findall(r"^\| (\d+) \|", readme, re.M),
    }
    kinds = [each for each in vars(errors).values() if isinstance(each, type)]
    own = {each.exit_code for each in kinds if issubclass(each, errors.LlamaxError)}
    others = {DOES_NOT_FIT, DIFFERS, NOT_READY}
    assert len(others) == 3
    assert not own & others
    for name, told in lists.items():
        assert len(set(told)) == len(told), name
        assert own | others <= set(map(int, told)), name
