"""Which images could not be used: counted, listed, and no reason to lose a night's run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from caco.errors import CacoError
from caco.files import replace_file

if TYPE_CHECKING:
    from caco.distributed.world import World


_ONE_LINE = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})
"""Names may hold anything; in the list a tab ends a name and a line's end an entry."""


class BrokenImages:
    """The broken images met so far; safe to use from many threads."""

    def __init__(self, total: int, largest_share: float) -> None:
        """total: images in all; largest_share: more than this share of broken ones is an error."""
        self.total = total
        self.largest_share = largest_share
        self.path: Path | None = None
        self._reasons: dict[str, str] = {}
        # What an earlier start has met and this one has not. It is listed, not counted: after an outage of a disk a run
        # could never go on.
        self._listed: dict[str, str] = {}
        self._changed = False
        self._lock = threading.Lock()

    def list_in(self, path: Path) -> None:
        """From now on keep the list in a file, beginning with those that are in it."""
        with self._lock:
            self.path = path
            if path.exists():
                lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
                listed = dict(line.split("\t", 1) for line in lines if "\t" in line)
                self._changed = any(key not in listed for key in self._reasons)
                self._listed = {key: reason for key, reason in listed.items() if key not in self._reasons}

    def __len__(self) -> int:
        """Return how many are listed."""
        return len(self._reasons) + len(self._listed)

    def add(self, key: str, reason: str) -> None:
        """Note a broken image. Raises CacoError when there are too many."""
        key, reason = key.translate(_ONE_LINE), reason.translate(_ONE_LINE)
        with self._lock:
            self._changed |= key not in self._reasons and key not in self._listed
            self._reasons[key] = reason
            self._listed.pop(key, None)
            count = len(self._reasons)
        if count > self.largest_share * self.total:
            self.write()
            where = f"those seen so far are in {self.path}" if self.path else f"among them {key}: {reason}"
            raise CacoError(
                f"at least {count:,} of {self.total:,} images are broken, more than the share of {self.largest_share:g} "
                f"that --monitor.broken-share allows, so the run stops before it has seen them all; {where}. Mend or remove "
                "them, or allow more; a run that has begun goes on with --resume"
            )

    def forget(self, key: str) -> None:
        """Note that an image could be read: what ailed it, such as a disk that was away, is over."""
        key = key.translate(_ONE_LINE)
        if key in self._reasons or key in self._listed:
            with self._lock:
                self._changed = True
                self._reasons.pop(key, None)
                self._listed.pop(key, None)

    def merge(self, world: World) -> None:
        """Bring together what all processes have met, and write the list. Raises CacoError when there are too many."""
        with self._lock:
            met = dict(self._reasons)  # threads go on adding to the other
        for reasons in world.gather_objects(met):
            for key, reason in reasons.items():
                self.add(key, reason)
        self.write()

    def write(self) -> None:
        """Write the list (key, tab, reason) if it has changed; no file for none."""
        with self._lock:
            if self.path is None or not self._changed:
                return
            entries = {**self._listed, **self._reasons}
            if entries:
                lines = [f"{key}\t{reason}\n" for key, reason in sorted(entries.items())]
                content = "".join(lines).encode("utf-8", "surrogateescape")  # names need not be UTF-8
                replace_file(self.path, content)
            else:
                self.path.unlink(missing_ok=True)
            self._changed = False
