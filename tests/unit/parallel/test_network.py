"""The interface by which this machine reaches another one, and free ports."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from llamax.parallel import network


def test_the_loopback_is_reached_by_the_loopback() -> None:
    assert network.source_address("127.0.0.1") == "127.0.0.1"
    assert network.interface("127.0.0.1") == "lo"
    assert network.is_loopback("127.0.1.1")
    assert not network.is_loopback("10.0.0.1")


def test_every_interface_is_found_by_its_address() -> None:
    """As iproute2 lists them."""
    try:
        command = ["ip", "-4", "-oneline", "address"]
        listed = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("ip is not installed: apt-get install iproute2")
    for line in listed.splitlines():
        _, name, _, address = line.split()[:4]
        assert network.interface(address.partition("/")[0]) == name.partition("@")[0]


def test_no_interface_has_a_foreign_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network.interface("192.0.2.253") == ""
    assert network.interface("") == ""
    assert network.source_address("240.0.0.1.5") == ""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert network.interface("127.0.0.1") == ""


def test_a_free_port_is_none_that_the_kernel_hands_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its choice and its use the kernel would give such a port to any program."""
    monkeypatch.setattr(network, "HANDED_OUT", span := tmp_path / "span")
    span.write_text("10020\t60999\n")
    with ExitStack() as stack:
        for port in range(10000, 10010):
            with suppress(OSError):  # another program has it, which is as well
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
        assert 10010 <= network.free_port("127.0.0.1") < 10020


@pytest.mark.parametrize("span", ["", "1024\t65535\n", "x", None])
def test_a_free_port_where_the_kernel_hands_out_all_or_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, span: str | None
) -> None:
    monkeypatch.setattr(network, "HANDED_OUT", tmp_path / "span")
    if span is not None:
        (tmp_path / "span").write_text(span)
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", network.free_port("127.0.0.1")))
