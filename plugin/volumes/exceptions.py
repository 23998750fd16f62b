"""The persistent store of a dm-snapshot, read without the kernel: which chunks of the volume lie where in it.

Layout: drivers/md/dm-snap-persistent.c. The first chunk starts with the header, four numbers of 32 bits: magic, valid,
version, sectors of a chunk. Areas follow (see `tables`), each one's metadata a list of exceptions of two numbers of 64
bits: a chunk of the volume, and where in the store it lies; the first that lies nowhere ends it. All little-endian.
"""

import struct
from collections.abc import Iterator

from plugin.errors import precondition
from plugin.host.dm import SECTOR
from plugin.images.disk import Source
from plugin.images.patched import Patch
from plugin.volumes import tables

_HEADER = struct.Struct("<4sIII")
_EXCEPTION = struct.Struct("<QQ")
_MAGIC, _VERSION = b"SnAp", 1


def patches(store: Source, chunk: int, covered: int, owner: str) -> list[Patch]:
    """What `store`, with chunks of `chunk` bytes, holds of the first `covered` bytes of the volume `owner`, in order.

    Raises PRECONDITION where the kernel has given the store up, or it is none.
    """
    head = bytearray(chunk)
    store.read(memoryview(head), 0)
    magic, valid, version, sectors = _HEADER.unpack_from(head)
    if magic != _MAGIC or version != _VERSION or sectors * SECTOR != chunk:
        raise precondition(f"{owner} is damaged: its file holds no snapshot store of {chunk}-byte chunks", "restore it")
    if not valid:
        raise precondition(f"{owner} is faulted: the kernel has given up its snapshot store", "see the kernel's log")
    found: list[Patch] = []
    end = tables.store_size(covered, chunk)
    for old, new in sorted(_exceptions(store, chunk, end)):
        start, place = old * chunk, new * chunk
        if start >= covered or place + chunk > end or (found and start < found[-1].end):
            raise precondition(f"{owner} is damaged: its snapshot store makes no sense", "restore it from a backup")
        length = min(chunk, covered - start)
        if found and (found[-1].end, found[-1].place + found[-1].length) == (start, place):
            found[-1] = Patch(found[-1].start, found[-1].length + length, found[-1].place)
        else:
            found.append(Patch(start, length, place))
    return found


def _exceptions(store: Source, chunk: int, end: int) -> Iterator[tuple[int, int]]:
    area = bytearray(chunk)
    step = (chunk // _EXCEPTION.size + 1) * chunk  # an area's metadata and the chunks that it tells of
    for at in range(chunk, end, step):
        store.read(memoryview(area), at)
        for old, new in _EXCEPTION.iter_unpack(area):
            if new == 0:
                return
            yield old, new
