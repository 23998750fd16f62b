"""Disk space: checked before an operation writes, against what others at work have claimed and not yet used."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from plugin.errors import exhausted
from plugin.host.lock import is_locked

CLAIM = "claimed"  # beside a partial file: how many bytes its operation will have written, and the file's name
_AHEAD = 8 << 20  # bytes claimed at once for a file that grows
_SPARE = 16 << 20  # bytes of disk left for records, maps and the filesystem's own needs


def claim(partial: Path, fd: int, needed: int, owner: str) -> None:
    """Claim `needed` bytes of disk, what it has already included, for the file `partial`, open as `fd`.

    The claim ends with the operation. Raises EXHAUSTED when they are not free, counting the claims of others.
    """
    directory = partial.parent
    missing = max(0, needed - os.fstat(fd).st_blocks * 512)
    # An image's own directory, or one in it for its unpacked disk.
    image = next((found for found in (directory, directory.parent) if (found / "record.json").exists()), None)
    if image is None:  # an export: nobody else's claim is about that filesystem
        _check(fd, needed, missing, 0, owner)
        return
    gate = os.open(image.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        claims = [*image.parent.glob(f"*/{CLAIM}"), *image.parent.glob(f"*/*/{CLAIM}")]
        others = sum(_outstanding(path.parent) for path in claims if path.parent != directory)
        _check(fd, needed, missing, others, owner)
        (directory / CLAIM).write_text(f"{needed} {partial.name}")
    finally:
        os.close(gate)


class Room:
    """The disk space of the file `partial`, open as `fd`, which is claimed as it grows; `used` of it by now."""

    def __init__(self, partial: Path, fd: int, owner: str) -> None:
        self.used = 0
        self._partial, self._fd, self._owner = partial, fd, owner
        self._claimed = 0

    def cover(self, needed: int) -> None:
        """Have `needed` bytes claimed, and where that is new some more. Raises EXHAUSTED."""
        if needed > self._claimed:
            more = _AHEAD if self._claimed else 0
            claim(self._partial, self._fd, needed + more, self._owner)
            self._claimed = needed + more


def _outstanding(directory: Path) -> int:
    """What the operation in `directory` has still to write; 0 for a claim that a kill left."""
    with suppress(OSError, ValueError):
        if is_locked(directory):
            claimed, name = (directory / CLAIM).read_text().split()
            return max(0, int(claimed) - (directory / name).stat().st_blocks * 512)
    return 0


def _check(fd: int, needed: int, missing: int, others: int, owner: str) -> None:
    found = os.fstatvfs(fd)
    free = max(0, found.f_bavail * found.f_frsize - others)
    if free < missing + _SPARE:
        raise exhausted(
            f"{owner} needs {needed >> 20} MiB of disk, and {free >> 20} MiB are free"
            + (f" beside the {others >> 20} MiB that other operations will take" if others else ""),
            "free space in the data directory",
        )
