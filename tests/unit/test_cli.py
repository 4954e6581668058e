"""The ``llamax`` command: what it finds, what it refuses, how it ends, and how fast it answers."""

from __future__ import annotations

import errno
import importlib.util
import logging
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Sequence

import pytest

from llamax import __version__
from llamax.__main__ import COMMANDS, dispatch
from llamax.runtime.errors import DataError
from llamax.runtime.logging import logger, setup_logging
from llamax.runtime.process import run_main


def llamax(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "llamax", *argv], capture_output=True, text=True)


def test_version_and_help() -> None:
    assert llamax("--version").stdout == f"llamax {__version__}\n"
    shown = llamax("--help")
    assert shown.returncode == 0
    for name, (_, about) in COMMANDS.items():
        assert f"  {name:<12} {about}\n" in shown.stdout
    bare = llamax()
    assert (bare.returncode, bare.stdout) == (2, shown.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_plain_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(COMMANDS[name][0]).main(["--help"])
    shown = capsys.readouterr().out
    assert f"llamax {name}" in shown
    assert "``" not in shown


def test_unknown_commands_are_refused_with_the_nearest() -> None:
    done = llamax("trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "llamax: 'trian' is not a command; did you mean train?\n"
    assert llamax("zzz").stderr == (
        f"llamax: 'zzz' is not a command; there are {', '.join(COMMANDS)}\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_program(name: str) -> None:
    assert importlib.util.find_spec(COMMANDS[name][0]) is not None


def test_a_command_gets_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sequence[str]] = []
    module = types.ModuleType("llamax_test_program")
    module.main = lambda argv: seen.append(argv) or 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(COMMANDS, "try", (module.__name__, "a program of this test"))
    assert dispatch(["try", "--a", "b"]) == 5
    assert seen == [["--a", "b"]]


def test_help_is_answered_without_torch_and_at_once() -> None:
    code = (
        "import sys; from llamax.__main__ import dispatch; dispatch(['--help']); "
        "print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    took, bare = [], []
    for _ in range(5):
        for command, times in ((["-m", "llamax", "--help"], took), (["-c", "pass"], bare)):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], capture_output=True, check=True)
            times.append(time.perf_counter() - start)
    assert min(took) - min(bare) < 0.15, (statistics.median(took), statistics.median(bare))


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


def test_run_reads_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["llamax", "a", "b"])
    assert run_main(lambda argv: len(argv)) == 2
    assert run_main(lambda argv: len(argv), ["x"]) == 1


@pytest.mark.parametrize(
    "prints",
    ["[print('x' * 100) for _ in range(10**5)] and 0", "(time.sleep(0.3), print('late')) and 0"],
)
def test_a_reader_that_goes_away_ends_the_program_quietly(prints: str) -> None:
    code = (
        "import sys, time; from llamax.runtime.process import run_main; "
        f"sys.exit(run_main(lambda _: {prints}, []))"
    )
    command = f'{sys.executable} -c "{code}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


# ---- the logger


def test_rank_0_speaks_and_others_only_when_something_is_wrong(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        setup_logging("rank 0", main=True)
        setup_logging("rank 0", main=True)
        logger.info("resumed at step %d", 200)
        logger.debug("not this")
        assert capsys.readouterr().err == "llamax: resumed at step 200\n"
        assert not logger.propagate  # or a root logger would say it twice
        setup_logging("rank 3", main=False)
        logger.info("not this")
        logging.getLogger("llamax.data").warning("slow disk")
        assert capsys.readouterr().err == "llamax: [rank 3] slow disk\n"
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
