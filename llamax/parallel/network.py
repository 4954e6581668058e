"""The network interface to another machine, and ports.  Standard library only."""

from __future__ import annotations

import array
import fcntl
import ipaddress
import random
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

SIOCGIFCONF = 0x8912
HANDED_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")  # absent on macOS
USER_PORTS = 10_000  # below are many of well-known programs


def source_address(target: str) -> str:
    """The IPv4 address from which this machine reaches ``target``; empty without a route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))  # sends nothing
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def interface(address: str) -> str:
    """The network interface that has an IPv4 address; empty if none has it, or not on Linux.

    Source: netdevice(7), SIOCGIFCONF; an entry is a name of 16 bytes and a socket address.
    """
    if sys.platform != "linux":
        return ""
    size, entry = 1 << 16, 40
    buffer = array.array("B", bytes(size))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("iP", size, buffer.buffer_info()[0])
        filled = struct.unpack("iP", fcntl.ioctl(probe, SIOCGIFCONF, request))[0]
    for start in range(0, filled, entry):
        name, _, _, found = struct.unpack_from("=16sHH4s", buffer, start)
        if socket.inet_ntoa(found) == address:
            return str(name.partition(b"\0")[0].partition(b":")[0].decode())
    return ""


def free_port(address: str) -> int:
    """A free TCP port of ``address``, for a program that opens it only some seconds later.

    It is below the ports that the kernel hands out, of which any program may get one meanwhile.
    """
    with suppress(OSError, ValueError, IndexError):
        first = int(HANDED_OUT.read_text().split()[0])
        for port in random.Random().sample(range(USER_PORTS, first), 20):
            with suppress(OSError), socket.socket() as probe:
                probe.bind((address, port))
                return port
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def is_loopback(address: str) -> bool:
    return ipaddress.IPv4Address(address).is_loopback
