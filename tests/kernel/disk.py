"""A disk of our own with a filesystem on it: its sectors can be made to fail, and its writes be kept in their order."""

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from plugin.host import blockdev, loop, mounts, udev

SECTOR = 512
# drivers/md/dm-log-writes.c: the superblock, and the head of an entry; each takes a sector, an entry's data follows.
_SUPER = struct.Struct("<QQQI")
_MAGIC = 0x6A736677736872
_ENTRY = struct.Struct("<QQQQ")
_DISCARD, _MARK = 4, 8


def dmsetup(*arguments: str, table: str = "") -> str:
    """Run dmsetup; returns what it says."""
    return subprocess.run(["dmsetup", *arguments], input=table, capture_output=True, text=True, check=True).stdout


def replace(name: str, table: str) -> None:
    """Give the mapper `name` another table, under running I/O."""
    dmsetup("load", name, table=table)  # before the suspend, which one that is refused would leave
    dmsetup("suspend", "--nolockfs", "--noflush", name)
    dmsetup("resume", name)


@dataclass(frozen=True)
class Disk:
    """The mapper `name` over the loop device `device` of `size` bytes, with ext4 on it, mounted at `path`."""

    name: str
    device: Path
    size: int
    path: Path

    def heal(self) -> None:
        """Have all sectors work."""
        replace(self.name, f"0 {self.size // SECTOR} linear {blockdev.number(self.device)} 0\n")

    def fail(self, file: Path, dice: Random | None = None, start: int = 0) -> None:
        """Have every sector fail that holds data of `file` from its byte `start` on; with `dice` only some of them."""
        number = blockdev.number(self.device)
        done, lines = 0, []
        places = list(_places(file, start // SECTOR))
        if dice:
            begin, length = dice.choice(places)
            first = dice.randrange(length)
            places = [(begin + first, min(dice.randrange(8, 64), length - first))]
        for begin, length in sorted(places):
            if begin > done:
                lines.append(f"{done} {begin - done} linear {number} {done}")
            lines.append(f"{begin} {length} error")
            done = begin + length
        if self.size // SECTOR > done:
            lines.append(f"{done} {self.size // SECTOR - done} linear {number} {done}")
        replace(self.name, "\n".join(lines) + "\n")


def _places(file: Path, start: int) -> Iterator[tuple[int, int]]:
    """(start, length) in sectors of the disk of each run of `file` from its sector `start` on."""
    said = subprocess.check_output(["filefrag", "-e", "-b512", "-s", file], text=True)
    for line in said.splitlines():
        words = line.replace(":", " ").replace("..", " ").split()
        if words and words[0].isdigit():
            first, last, at = (int(word) for word in words[1:4])
            skipped = max(0, start - first)
            if first + skipped <= last:
                yield at + skipped, last - first - skipped + 1


@contextmanager
def disk(home: Path, name: str, size: int, *, log: bool = False) -> Iterator[Disk]:
    """A disk of `size` bytes; `log` keeps its writes in `home`/NAME.log."""
    backing = home / f"{name}.disk"
    with backing.open("wb") as file:
        file.truncate(size)
    path = home / name
    path.mkdir(mode=0o700)
    with loop.attached(backing) as device:
        number, sectors = blockdev.number(device), size // SECTOR
        if log:
            log_file = home / f"{name}.log"
            with log_file.open("wb") as file:
                file.truncate(8 * size)
            with loop.attached(log_file) as log_device:
                dmsetup("create", name, table=f"0 {sectors} log-writes {number} {blockdev.number(log_device)}\n")
        else:
            dmsetup("create", name, table=f"0 {sectors} linear {number} 0\n")
        try:
            subprocess.run(["mkfs.ext4", "-q", "-m", "0", f"/dev/mapper/{name}"], check=True)
            mounts.mount(Path("/dev/mapper", name), path, "ext4")
            try:
                yield Disk(name, device, size, path)
            finally:
                unmount(path)
        finally:
            dmsetup("remove", "--retry", name)


def unmount(path: Path) -> None:
    """Unmount `path` when no loop device is over its files any more: udevd may still be looking at one."""
    udev.watch().wait_until(lambda: not loop.below(path), 10)
    mounts.unmount(path)


def replay(log: Path, target: Path, mark: str) -> None:
    """Write into `target` what was on the disk for certain when `mark` was made: all writes up to the flush before it.

    dm-log-writes logs a write once a flush after it has ended, so that what no flush covers comes later, or never.
    """
    source, to = os.open(log, os.O_RDONLY), os.open(target, os.O_RDWR)
    try:
        magic, _, count, sector = _SUPER.unpack_from(os.pread(source, SECTOR, 0))
        assert magic == _MAGIC
        at = sector
        for _ in range(count):
            place, sectors, flags, length = _ENTRY.unpack_from(head := os.pread(source, sector, at))
            at += sector
            if flags & _MARK and head[_ENTRY.size : _ENTRY.size + length].rstrip(b"\0").decode() == mark:
                return
            if flags & _DISCARD or not sectors:
                continue
            os.pwrite(to, os.pread(source, sectors * sector, at), place * sector)
            at += sectors * sector
        raise AssertionError(f"there is no mark {mark}")
    finally:
        os.close(source)
        os.close(to)
