"""Which images could not be used: counted, listed, and no reason to lose a night's run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from caco.errors import CacoError
from caco.files import replace_file

if TYPE_CHECKING:
    from caco.distributed.world import World


class BrokenImages:
    """The broken images met so far; safe to use from many threads."""

    def __init__(self, total: int, largest_share: float) -> None:
        """total: images in all; largest_share: more than this share of broken ones is an error."""
        self.total = total
        self.largest_share = largest_share
        self.path: Path | None = None
        self._reasons: dict[str, str] = {}
        self._written = 0
        self._lock = threading.Lock()

    def list_in(self, path: Path) -> None:
        """From now on keep the list in a file, beginning with those that are in it."""
        with self._lock:
            self.path = path
            if path.exists():
                lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
                listed = dict(line.split("\t", 1) for line in lines if "\t" in line)
                self._written = len(listed)
                self._reasons = {**listed, **self._reasons}

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, key: str, reason: str) -> None:
        """Note a broken image. Raises CacoError when there are too many."""
        with self._lock:
            self._reasons[key] = reason
            count = len(self._reasons)
        if count > self.largest_share * self.total:
            self.write()
            where = f"those seen so far are in {self.path}" if self.path else f"among them {key}: {reason}"
            raise CacoError(
                f"at least {count:,} of {self.total:,} images are broken, more than the share of {self.largest_share:g} "
                f"that --monitor.broken-share allows, so the run stops before it has seen them all; {where}"
            )

    def merge(self, world: World) -> None:
        """Bring together what all processes have met, and write the list. Raises CacoError when there are too many."""
        for reasons in world.gather_objects(self._reasons):
            for key, reason in reasons.items():
                self.add(key, reason)
        self.write()

    def write(self) -> None:
        """Write the list (key, tab, reason) if it has grown."""
        with self._lock:
            if self.path is None or len(self._reasons) == self._written:
                return
            lines = [f"{key}\t{reason}\n" for key, reason in sorted(self._reasons.items())]
            replace_file(self.path, "".join(lines).encode("utf-8", "surrogateescape"))  # names need not be UTF-8
            self._written = len(self._reasons)
