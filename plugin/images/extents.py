"""Which parts of a disk hold data: computed, kept beside an encrypted file, found again from the file alone.

In an encrypted file a hole of the file is a hole of the disk. A ciphertext sector of zeros is no proof against itself:
that a sector of random-looking bytes comes out as zeros has a chance of 2^-32768. So the map can be rebuilt.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from plugin.host.files import Extent, data_extents, read_exactly, read_json, write_json
from plugin.images import sums
from plugin.images.sums import Sum

# A shorter hole is filled: it would cost a segment of a device table and save next to nothing.
SHORTEST_HOLE = 64 << 10
BLOCK = 4096
_CHUNK = 4 << 20


def normalised(runs: Iterable[Extent], size: int) -> Iterator[Extent]:
    """`runs`, in order, widened to whole blocks of 4096 bytes within `size`, those closer than 64 KiB made one."""
    start = end = -1
    for run in runs:
        first, last = run.start // BLOCK * BLOCK, min(-(-run.end // BLOCK) * BLOCK, size)
        if last <= first:
            continue
        if end < 0:
            start, end = first, last
        elif first - end < SHORTEST_HOLE:
            end = max(end, last)
        else:
            yield Extent(start, end - start)
            start, end = first, last
    if end >= 0:
        yield Extent(start, end - start)


def merged(runs: Iterable[Extent]) -> Iterator[Extent]:
    """`runs`, in order, those that touch made one."""
    current: Extent | None = None
    for run in runs:
        if current and current.end == run.start:
            current = Extent(current.start, current.length + run.length)
        else:
            if current:
                yield current
            current = run
    if current:
        yield current


def without(runs: Iterable[Extent], others: Iterable[Extent]) -> Iterator[Extent]:
    """What of `runs` is in none of `others`; both in order."""
    rest = iter(others)
    other = next(rest, None)
    for run in runs:
        at = run.start
        while other and other.start < run.end:
            if other.start > at:
                yield Extent(at, other.start - at)
            at = max(at, other.end)
            if other.end > run.end:
                break
            other = next(rest, None)
        if at < run.end:
            yield Extent(at, run.end - at)


def total(runs: Iterable[Extent]) -> int:
    """Bytes in all `runs`."""
    return sum(run.length for run in runs)


def save(path: Path, runs: Iterable[Extent] | None, size: int, kept: Iterable[Sum] = ()) -> None:
    """Keep the map of a disk of `size` bytes in the file `path`, and the checksums of the file's bytes.

    `runs` is None for an image that tells them itself.
    """
    value = {"size": size, "crc32": sums.to_text(kept)}
    if runs is not None:
        value["data"] = " ".join(f"{run.start}+{run.length}" for run in runs)
    write_json(path, value)


def load_sums(path: Path) -> list[Sum]:
    """The checksums that `save` wrote; empty where there are none, or none that can be read."""
    try:
        value = read_json(path)
        return sums.from_text(value["crc32"]) if value else []
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


def load(path: Path, size: int) -> list[Extent] | None:
    """What `save` wrote; None where there is no such file, or none for a disk of `size` bytes."""
    try:
        value = read_json(path)
        if value is None or value["size"] != size:
            return None
        runs = [Extent(*(int(number) for number in text.split("+"))) for text in value["data"].split()]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    at = 0
    for run in runs:
        if run.start < at or run.length <= 0 or run.end > size:
            return None
        at = run.end
    return runs


def rebuilt(fd: int, base: int, size: int) -> list[Extent]:
    """The map of the disk of `size` bytes whose ciphertext lies in the file `fd` from `base` on, from that alone."""
    return list(normalised(_not_zero(fd, base, size), size))


def _not_zero(fd: int, base: int, size: int) -> Iterator[Extent]:
    zeros = bytes(BLOCK)
    for run in data_extents(fd, base, base + size):
        for at in range(run.start, run.end, _CHUNK):
            data = bytearray(min(_CHUNK, run.end - at))
            read_exactly(fd, memoryview(data), at)
            for inside in range(0, len(data), BLOCK):
                block = data[inside : inside + BLOCK]
                if block != zeros[: len(block)]:
                    yield Extent(at + inside - base, len(block))
