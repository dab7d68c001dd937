"""Which of this machine's addresses and interfaces lead to another machine."""

from __future__ import annotations

import socket
import struct


def own_address_towards(host: str, port: int) -> str:
    """Return the address of this machine from which `host` is reached; nothing is sent. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        address: str = probe.getsockname()[0]
        return address


def interface_towards(host: str, port: int) -> str | None:
    """Return the name of the interface from which `host` is reached; None where that cannot be told (not on Linux).

    Gloo needs it: left alone it takes the address of the machine's host name, which is often 127.0.0.1.
    """
    try:
        import fcntl

        address = own_address_towards(host, port)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                if _address_of(name, probe, fcntl) == address:
                    return name
    except (ImportError, OSError):
        pass
    return "lo" if host.startswith("127.") and "lo" in _names() else None


def _address_of(interface: str, probe: socket.socket, fcntl: object) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    try:
        answer: bytes = fcntl.ioctl(probe.fileno(), 0x8915, request)  # type: ignore[attr-defined]  # SIOCGIFADDR
    except OSError:  # without an IPv4 address
        return None
    return socket.inet_ntoa(answer[20:24])


def _names() -> list[str]:
    try:
        return [name for _, name in socket.if_nameindex()]
    except (AttributeError, OSError):
        return []
