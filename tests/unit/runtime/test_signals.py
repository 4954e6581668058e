"""Signals before, while and after a program listens to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

LISTEN = """
import sys, time
from llamax.runtime import signals
signals.install("quiet" not in sys.argv)
signals.COMPILE_GRACE_S = 600.0 if "long" in sys.argv else 0.2
signals.REPEAT_S = 600.0 if "copies" in sys.argv else 0.0
if sys.argv[1] != "import":
    signals.hold()
if sys.argv[1] == "step":
    signals.stepped()
print("ready", flush=True)
while not signals.requested():
    time.sleep(0.01)
print("asked", flush=True)
sys.stdin.readline() or time.sleep(600)
signals.rest()
print("heard", signals.requested(), flush=True)
sys.stdin.readline() or time.sleep(600)
sys.exit(7)
"""
WAIT_S = 120


def listening(*words: str, ignored: bool = False) -> subprocess.Popen[str]:
    """A program that listens, as ``nohup`` starts it if ``ignored``."""
    quietly = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    quietly += "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", (quietly if ignored else "") + LISTEN, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert line(process) == "ready"
    return process


def line(process: subprocess.Popen[str]) -> str:
    """The next line that the program prints."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(
    ("phase", "code", "said"),
    [
        ("import", 75, "before training began; nothing new to save"),
        ("compile", 75, "in the first step; nothing new to save"),
        ("step", 7, ""),
    ],
)
def test_signals_by_phase(phase: str, code: int, said: str, signum: int) -> None:
    process = listening(phase)
    assert process.stderr is not None
    process.send_signal(signum)
    if signum == signal.SIGINT and code == 75:
        code = 130
    if phase == "step":
        assert line(process) == "asked"
        process.send_signal(signal.SIGTERM)  # a second one changes nothing
        go_on(process)
        assert line(process) == f"heard {signal.Signals(signum).name}"
        process.send_signal(signum)  # nor does one at the very end
        go_on(process)
    assert process.wait(WAIT_S) == code
    assert said in process.stderr.read()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["compile", "step"])
def test_ctrl_c_after_a_signal_ends_at_once(phase: str, first: signal.Signals) -> None:
    process = listening(phase, "long")
    process.send_signal(first)
    assert line(process) == "asked"
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out) == (130, "")
    assert said == (
        f"llamax: stopped by {first.name} and by Ctrl-C at once, without saving; earlier "
        "checkpoints stay\n"
    )


def test_torchrun_passes_the_second_ctrl_c_on_as_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    process = listening("step", "long")
    process.send_signal(signal.SIGINT)
    assert line(process) == "asked"
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 130
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    process = listening("step")
    process.send_signal(signal.SIGINT)
    assert line(process) == "asked"
    process.send_signal(signal.SIGTERM)
    go_on(process)
    assert line(process) == "heard SIGINT"
    go_on(process)
    assert process.wait(WAIT_S) == 7


def test_a_copy_of_ctrl_c_does_not_end_at_once() -> None:
    process = listening("step", "copies")
    process.send_signal(signal.SIGINT)
    assert line(process) == "asked"
    process.send_signal(signal.SIGINT)
    go_on(process)
    assert line(process) == "heard SIGINT"
    go_on(process)
    assert process.wait(WAIT_S) == 7


def test_signals_ignored_at_the_start_stay_ignored() -> None:
    process = listening("import", ignored=True)
    for number in (signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 75
    assert process.stderr is not None
    assert "stopped by SIGTERM" in process.stderr.read()


def test_only_rank_0_reports_a_signal_to_all_ranks() -> None:
    listen = subprocess.Popen(
        [sys.executable, "-c", LISTEN, "import", "quiet"], stdin=-1, stdout=-1, stderr=-1
    )
    assert listen.stdout is not None
    listen.stdout.readline()
    listen.send_signal(signal.SIGTERM)
    out, said = listen.communicate(timeout=WAIT_S)
    assert said == b""
    assert b"asked\n".startswith(out)  # it may end in the middle of a line
    assert listen.returncode == 75


def test_a_library_installs_no_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    import llamax.train  # noqa: F401

    assert signal.getsignal(signal.SIGTERM) is before
    from llamax.runtime import signals

    signals.rest()
    assert signal.getsignal(signal.SIGTERM) is before


OLD = (
    sys.platform == "linux"
    and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc 2.")
    and int((os.confstr("CS_GNU_LIBC_VERSION") or "").split(".")[1]) < 38
)


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
import time; time.sleep(600)
print("never reached")
"""
    environ = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "held\n"
    assert "stopped by SIGTERM" in done.stderr
    assert done.returncode not in (0, -signal.SIGTERM)
