"""The wrapper of every main: errors, exit codes, restarts with other allocator settings."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from llamax.runtime import process
from llamax.runtime.errors import MOST_PROBLEMS, DataError, NoRoom, refuse
from llamax.runtime.process import defer_signals, run_main, wait_for_end

# ---- how programs end


def fails(error: BaseException) -> int:
    def main(argv: Sequence[str]) -> int:
        raise error

    return run_main(main, [])


def test_mistakes_are_one_line_and_other_errors_keep_their_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fails(DataError("corpus is empty; name another")) == 2
    assert capsys.readouterr().err == "llamax: corpus is empty; name another\n"
    assert fails(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "llamax: interrupted\n"
    assert fails(IsADirectoryError(errno.EISDIR, "Is a directory", "run/config.toml")) == 2
    assert capsys.readouterr().err == "llamax: cannot use run/config.toml: Is a directory\n"
    with pytest.raises(FileNotFoundError):
        fails(FileNotFoundError(errno.ENOENT, "No such file or directory", "ours"))
    with pytest.raises(ZeroDivisionError):
        fails(ZeroDivisionError())


def test_a_line_break_in_a_path_begins_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: Sequence[str]) -> int:
        refuse(["a\nllamax: all is well", "b\r\x1b[2J"], "run\n.toml")
        return 0

    assert run_main(main, []) == 2
    assert capsys.readouterr().err == (
        "llamax: run\\x0a.toml: 2 problems\n  a\\x0allamax: all is well\n  b\\x0d\\x1b[2J\n"
    )


def test_errors_of_any_length_are_shown_in_part(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: Sequence[str]) -> int:
        refuse([f"{number}: {'x' * 10_000}" for number in range(5000)], "run.toml")
        return 0

    assert run_main(main, []) == 2
    head, *shown, last = capsys.readouterr().err.splitlines()
    assert head == "llamax: run.toml: 5000 problems"
    assert len(shown) == MOST_PROBLEMS
    assert last == f"  and {5000 - MOST_PROBLEMS} more"
    assert max(map(len, shown)) < 5100
    assert shown[0].endswith("xxx...")


def test_run_reads_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["llamax", "a", "b"])
    assert run_main(lambda argv: len(argv)) == 2
    assert run_main(lambda argv: len(argv), ["x"]) == 1


@pytest.mark.parametrize(
    "prints",
    ["[print('x' * 100) for _ in range(10**5)] and 0", "(gone.poll(), print('late')) and 0"],
)
def test_a_reader_that_goes_away_ends_the_program_quietly(prints: str) -> None:
    code = (
        "import select, sys; from llamax.runtime.process import run_main; "
        "gone = select.poll(); gone.register(1, 0); "
        f"sys.exit(run_main(lambda _: {prints}, []))"
    )
    command = f'{sys.executable} -c "{code}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


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


@pytest.mark.parametrize(("name", "about"), [(None, ""), ("run/x", " for run/x")])
def test_no_room_is_one_line(
    name: str | None, about: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: Sequence[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", name)

    assert run_main(main, []) == NoRoom.exit_code
    line = f"llamax: no room{about}: No space left on device; make some\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        *((code, "lacks an operation") for code in ("ENOSYS", "EINVAL", "EOPNOTSUPP", "EXDEV")),
        *((code, "file system or device failed") for code in ("ESTALE", "EIO", "ENOTCONN")),
    ],
)
def test_errors_of_a_file_system_are_one_line(
    code: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    number = getattr(errno, code)
    reason = os.strerror(number)
    assert fails(OSError(number, reason, "run/.part", None, "run/config.toml")) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"llamax: cannot use run/config.toml: {reason}; ")
    assert hint in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("code", ["EIO", "ENOSYS", "ESTALE"])
def test_an_open_file_that_fails_is_one_line(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    number = getattr(errno, code)
    assert fails(OSError(number, os.strerror(number))) == 2
    assert capsys.readouterr().err.startswith(
        f"llamax: a file or device failed: {os.strerror(number)}; "
    )
    with pytest.raises(OSError, match="Invalid argument"):  # without a path: a defect
        fails(OSError(errno.EINVAL, "Invalid argument"))


def test_a_child_is_waited_for_in_short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, waits = iter([None, None, None, 7]), list[float]()
    monkeypatch.setattr(process, "time", SimpleNamespace(sleep=waits.append))
    assert wait_for_end(lambda: next(codes)) == 7
    assert len(waits) == 3
    assert max(waits) <= 0.1, "a signal just before a wait is handled after it"


def defer_nothing() -> None:
    with defer_signals():
        pass


def test_signals_are_deferred_until_a_pool_has_started() -> None:
    seen: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(n, lambda number, frame: seen.append(number)) for n in numbers]
    try:
        with defer_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert not seen
        assert seen == [signal.SIGTERM], "the first one ends the program"
        os.kill(os.getpid(), signal.SIGINT)
        assert seen == [signal.SIGTERM, signal.SIGINT]
        with ThreadPoolExecutor(1) as pool:  # only the main thread has handlers
            pool.submit(defer_nothing).result()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
