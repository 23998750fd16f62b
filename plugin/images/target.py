"""Where a copy writes: a disk in a file, plain or as the payload of a LUKS2 device, with what is zeros left out."""

import errno
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from plugin.errors import exhausted
from plugin.host.files import Extent, punch, write_exactly
from plugin.images import extents
from plugin.images.disk import CipherSpec
from plugin.images.extents import BLOCK, SHORTEST_HOLE
from plugin.images.sums import Sum

PIECE = 4 << 20  # bytes that a worker reads, ciphers and writes at once
LONGEST_MESSAGE = 1 << 20  # bytes that the engine and a worker say at once about a piece
Places: TypeAlias = Sequence[tuple[int, int]]
_ZEROS = bytes(SHORTEST_HOLE)


@dataclass(frozen=True)
class TargetSpec:
    """The file open as `fd`, and as `direct` past the page cache (-1: not so); the disk starts at `base` in it.

    Where there are `places`, the disk does not lie in one piece: each says from which byte of the disk on the file
    holds it at which byte, in order. `reserved` says that the file has disk space for all that is written, so that
    what is left out must be given back.
    """

    fd: int
    direct: int
    base: int
    cipher: CipherSpec | None
    sparse: bool
    places: Places = ()
    reserved: bool = False

    def description(self) -> dict[str, Any]:
        """For another process; may hold a key."""
        cipher = self.cipher.description() if self.cipher else None
        return {
            "fd": self.fd,
            "direct": self.direct,
            "base": self.base,
            "cipher": cipher,
            "sparse": self.sparse,
            "places": self.places,
            "reserved": self.reserved,
        }

    @classmethod
    def restored(cls, value: Mapping[str, Any]) -> "TargetSpec":
        """The inverse of `description`."""
        places = [(start, at) for start, at in value["places"]]
        cipher = CipherSpec.restored(value["cipher"])
        return cls(value["fd"], value["direct"], value["base"], cipher, value["sparse"], places, value["reserved"])

    def at(self, offset: int) -> int:
        """Where in the file byte `offset` of the disk lies."""
        if not self.places:
            return self.base + offset
        start, at = self.places[bisect_right(self.places, offset, key=lambda place: place[0]) - 1]
        return at + offset - start


class Target:
    """Writes pieces of the disk. Raises EXHAUSTED when the filesystem is full."""

    def __init__(self, spec: TargetSpec) -> None:
        self._spec = spec
        self._direct = spec.direct
        self._cipher = spec.cipher.make() if spec.cipher else None

    def write(self, buffer: memoryview, offset: int) -> list[Sum]:
        """Write `buffer`, which is spoiled by it, as the disk's bytes from `offset` on; returns what was written.

        The checksums are of the bytes as they lie in the file, the offsets in them those of the disk.
        """
        whole = [Extent(offset, len(buffer))]
        runs = list(not_zero(buffer, offset)) if self._spec.sparse else whole
        sums = []
        for run in runs:
            part = buffer[run.start - offset : run.end - offset]
            if self._cipher:
                self._cipher.encrypt(part, run.start)
            sums.append(Sum.of(part, run.start))
            self._put(part, self._spec.at(run.start))
        if self._spec.reserved:
            for hole in extents.without(whole, runs):
                punch(self._spec.fd, Extent(self._spec.at(hole.start), hole.length))
        return sums

    def _put(self, part: memoryview, at: int) -> None:
        try:
            # Past the page cache it costs no copy, and the disk is at work at once; but only whole blocks may go there.
            if self._direct >= 0 and at % BLOCK == 0 and len(part) >= BLOCK:
                whole = len(part) // BLOCK * BLOCK
                try:
                    write_exactly(self._direct, part[:whole], at)
                    part, at = part[whole:], at + whole
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.EACCES):
                        raise
                    self._direct = -1  # this filesystem wants larger blocks, or, as SMB, one descriptor for a lock
            write_exactly(self._spec.fd, part, at)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise exhausted("no space left on the device", "free space in the data directory") from error
            raise


def not_zero(buffer: memoryview, offset: int) -> Iterator[Extent]:
    """The runs left of `buffer`, the bytes from `offset` on, when blocks of 64 KiB of zeros are taken out."""
    start, end = offset, offset
    while end < offset + len(buffer):
        upto = min((end // SHORTEST_HOLE + 1) * SHORTEST_HOLE, offset + len(buffer))
        block = buffer[end - offset : upto - offset]
        # The first bytes tell most blocks apart without the copy that a comparison makes.
        if block[0] == 0 and block[-1] == 0 and bytes(block) == _ZEROS[: len(block)]:
            if end > start:
                yield Extent(start, end - start)
            start = upto
        end = upto
    if end > start:
        yield Extent(start, end - start)


def open_direct(path: Path) -> int:
    """`path` open for writing past the page cache; -1 where the filesystem can't."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP):
            return -1
        raise
