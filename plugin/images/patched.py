"""A disk made of two others: one below, and patches that lie in another one and cover parts of it."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plugin.host.files import Extent
from plugin.images.disk import Source


@dataclass(frozen=True, slots=True)
class Patch:
    """`length` bytes of the disk from byte `start` on, which lie at byte `place` of the upper disk."""

    start: int
    length: int
    place: int

    @property
    def end(self) -> int:
        """The first byte of the disk behind it."""
        return self.start + self.length


@dataclass
class Patched:
    """A disk of `size` bytes: `patches` from `upper`, in order, and elsewhere `lower`, or zeros where that ends.

    `runs` is where `lower` has data, in order; another process that only reads needs none.
    """

    size: int
    lower: Source | None
    runs: Sequence[Extent]
    upper: Source | None
    patches: Sequence[Patch]

    def extents(self) -> Iterator[Extent]:
        """The data of both, in order; what overlaps is one."""
        pieces = [*self.runs, *(Extent(patch.start, patch.length) for patch in self.patches)]
        start = end = 0
        for piece in sorted(pieces, key=lambda piece: piece.start):
            if piece.start > end:
                if end > start:
                    yield Extent(start, end - start)
                start = piece.start
            end = max(end, min(piece.end, self.size))
        if end > start:
            yield Extent(start, end - start)

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`, from each part what is its own."""
        at, end = offset, offset + len(buffer)
        index = bisect_right(self.patches, at, key=lambda patch: patch.end)
        while at < end:
            patch = self.patches[index] if index < len(self.patches) else None
            if patch is not None and patch.start <= at:
                assert self.upper is not None
                upto = min(patch.end, end)
                self.upper.read(buffer[at - offset : upto - offset], patch.place + at - patch.start)
                index += 1
            else:
                upto = min(patch.start, end) if patch is not None else end
                self._read_lower(buffer[at - offset : upto - offset], at)
            at = upto

    def _read_lower(self, buffer: memoryview, offset: int) -> None:
        there = min(max(0, (self.lower.size if self.lower else 0) - offset), len(buffer))
        if there and self.lower:
            self.lower.read(buffer[:there], offset)
        buffer[there:] = bytes(len(buffer) - there)

    def description(self) -> dict[str, Any]:
        """For another process; may hold keys."""
        return {
            "kind": "patched",
            "size": self.size,
            "lower": self.lower.description() if self.lower else None,
            "upper": self.upper.description() if self.upper else None,
            "patches": [(patch.start, patch.length, patch.place) for patch in self.patches],
        }

    @classmethod
    def restored(cls, value: Mapping[str, Any], lower: Source | None, upper: Source | None) -> "Patched":
        """The inverse of `description`, both disks restored."""
        return cls(value["size"], lower, (), upper, [Patch(*patch) for patch in value["patches"]])
