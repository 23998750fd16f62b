"""Checksums of what was written, piece by piece, so that damage is found and the place of it named.

CRC-32 over the bytes as they lie in the file: it is made to find damage, not a forger, and with zlib it costs a third
of what ciphering does. A piece has at most 4 MiB. Holes have none: they cost nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from zlib import crc32

from plugin.host.files import Extent


@dataclass(frozen=True)
class Sum:
    """The CRC-32 of `length` bytes from byte `start` on."""

    start: int
    length: int
    crc: int

    @classmethod
    def of(cls, part: memoryview, start: int) -> "Sum":
        """That of `part`, which lies at `start`."""
        return cls(start, len(part), crc32(part))

    @property
    def extent(self) -> Extent:
        """Where its bytes are."""
        return Extent(self.start, self.length)


def to_text(sums: Iterable[Sum]) -> str:
    """For a file."""
    return " ".join(f"{item.start}+{item.length}:{item.crc:08x}" for item in sums)


def from_text(text: str) -> list[Sum]:
    """The inverse of `to_text`. Raises ValueError."""
    return [_parsed(word) for word in text.split()]


def _parsed(word: str) -> Sum:
    place, _, crc = word.partition(":")
    start, _, length = place.partition("+")
    return Sum(int(start), int(length), int(crc, 16))


def damaged(kept: Iterable[Sum], found: Iterable[Sum]) -> list[Extent]:
    """The pieces of `kept` whose bytes are others now."""
    now = set(found)
    return [item.extent for item in kept if item not in now]
