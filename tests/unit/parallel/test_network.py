"""The interface by which this machine reaches another one."""

from __future__ import annotations

import subprocess
import sys

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
