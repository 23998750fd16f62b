"""The arithmetic of dm-snapshot, and the tables of a volume's mappers. All pure.

The layout of a persistent store is that of drivers/md/dm-snap-persistent.c: a header chunk, then areas, each a chunk
of metadata (16 bytes for every exception) followed by the chunks of data that it tells of. The next area's metadata
is cleared as soon as an area is full, so there is always one area more than is needed.
"""

from collections.abc import Iterable, Iterator

from plugin.host.dm import SECTOR
from plugin.host.files import Extent

_EXCEPTION = 16  # bytes of metadata a chunk


def round_up(value: int, unit: int) -> int:
    """`value`, or the next multiple of `unit` above it."""
    return -(-value // unit) * unit


def store_size(covered: int, chunk: int) -> int:
    """Bytes that a snapshot's store needs so that every chunk of `covered` bytes can be written; `chunk` in bytes."""
    data = -(-covered // chunk)
    areas = data // (chunk // _EXCEPTION) + 1
    return (1 + areas + data) * chunk


def base(extents: Iterable[Extent], size: int, covered: int, image: str) -> str:
    """The image (`image`: MAJOR:MINOR, `size` bytes) as a device of `covered` bytes: its data, and zeros elsewhere."""
    return "\n".join(_segments(extents, size, covered, image)) + "\n"


def _segments(extents: Iterable[Extent], size: int, covered: int, image: str) -> Iterator[str]:
    done = 0
    for start, end in _runs(extents, size):
        if start > done:
            yield f"{done // SECTOR} {(start - done) // SECTOR} zero"
        yield f"{start // SECTOR} {(end - start) // SECTOR} linear {image} {start // SECTOR}"
        done = end
    if covered > done:
        yield f"{done // SECTOR} {(covered - done) // SECTOR} zero"


def _runs(extents: Iterable[Extent], size: int) -> Iterator[tuple[int, int]]:
    """The extents in whole sectors, within `size`, with those that touch each other joined."""
    start = end = 0
    for extent in extents:
        first, last = extent.start // SECTOR * SECTOR, min(round_up(extent.end, SECTOR), size)
        if first > end:
            if end > start:
                yield start, end
            start = first
        elif end == start:
            start = first
        end = max(end, last)
    if end > start:
        yield start, end


def snapshot(base_device: str, store_device: str, covered: int, capacity: int, chunk: int) -> str:
    """A volume of `capacity` bytes: a persistent snapshot of `base_device`, `covered` bytes, its exceptions of `chunk`
    bytes in `store_device`; what is behind them lies there, behind the exceptions.
    """
    head = f"0 {covered // SECTOR} snapshot {base_device} {store_device} P {chunk // SECTOR}\n"
    if capacity == covered:
        return head
    place = store_size(covered, chunk) // SECTOR
    return head + f"{covered // SECTOR} {(capacity - covered) // SECTOR} linear {store_device} {place}\n"


def linear(device: str, size: int) -> str:
    """The first `size` bytes of `device`."""
    return f"0 {size // SECTOR} linear {device} 0\n"
