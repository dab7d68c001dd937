"""Two machines in one: network namespaces of Linux with a cable between them. Not a benchmark itself.

Needs root and the `ip` command.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ADDRESSES = "10.77.0.1", "10.77.0.2"


class Machines:
    """Two network namespaces, each with one network card, a cable between them."""

    def __init__(self) -> None:
        self.names = [f"caco{number}-{os.getpid()}" for number in range(2)]
        self.cards = [f"caco{number}" for number in range(2)]

    def __enter__(self) -> Machines:
        try:
            for name in self.names:
                ip("netns", "add", name)
            ends = [("name", card, "netns", name) for card, name in zip(self.cards, self.names, strict=True)]
            ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for name, card, address in zip(self.names, self.cards, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", card)
                ip("-n", name, "link", "set", card, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """End what still runs on the machines, and remove them."""
        for number, name in enumerate(self.names):
            self.kill(number)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def kill(self, number: int) -> None:
        """SIGKILL to every process of a machine."""
        found = subprocess.run(["ip", "netns", "pids", self.names[number]], capture_output=True, text=True, check=False)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cable(self, state: str) -> None:
        """Pull the cable out ("down") or put it back ("up")."""
        ip("-n", self.names[1], "link", "set", self.cards[1], state)

    def start(self, number: int, log: Path, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start Python with these arguments on a machine; all it says goes into the log."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        with log.open("ab") as file:
            words = [*(f"{name}={value}" for name, value in variables.items()), "python", *arguments]
            file.write(f"machine {number}$ {' '.join(words)}\n".encode())
            file.flush()
            command = ["ip", "netns", "exec", self.names[number], sys.executable, *arguments]
            return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
