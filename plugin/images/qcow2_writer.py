"""qcow2 files, written: version 3, clusters of 64 KiB, uncompressed, with nothing for what is a hole.

The tables are made first, since the data's extents tell where everything goes; then the copy engine can write the data
in any order, and what it finds to be zeros stays a hole of the file. Source: docs/interop/qcow2.rst of QEMU.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from plugin.host.files import Extent, write_exactly

_BITS = 16
CLUSTER = 1 << _BITS
_PER_TABLE = CLUSTER // 8  # entries of a second-level table
_PER_BLOCK = CLUSTER // 2  # reference counts of 16 bits
_ONE = 1 << 63  # "the reference count is exactly one"


@dataclass(frozen=True)
class Layout:
    """Where the parts of a file for a disk of `size` bytes lie, in clusters; `runs` are its data, in whole clusters."""

    size: int
    runs: list[Extent]
    blocks: int
    first_table: int
    tables: list[int]
    first_data: int
    end: int

    @property
    def places(self) -> list[tuple[int, int]]:
        """(byte of the disk, byte of the file) where each run starts."""
        places, at = [], self.first_data
        for run in self.runs:
            places.append((run.start, at << _BITS))
            at += run.length >> _BITS
        return places


def layout(runs: Iterable[Extent], size: int) -> Layout:
    """The layout for the data `runs`, in order, of a disk of `size` bytes."""
    clusters = list(_whole_clusters(runs))
    data = sum(run.length for run in clusters) >> _BITS
    span = _PER_TABLE << _BITS
    tables = sorted({number for run in clusters for number in range(run.start // span, (run.end - 1) // span + 1)})
    entries = -(-size // span)
    first_level = -(-entries * 8 // CLUSTER)
    rest = 1 + first_level + len(tables) + data
    blocks = table = 1
    while blocks * _PER_BLOCK < rest + blocks + table or table * _PER_TABLE < blocks:
        blocks = -(-(rest + blocks + table) // _PER_BLOCK)
        table = -(-blocks // _PER_TABLE)
    first_table = 1 + table + blocks
    first_data = first_table + first_level + len(tables)
    return Layout(size, clusters, blocks, first_table, tables, first_data, first_data + data)


def write_tables(fd: int, found: Layout) -> None:
    """Write everything but the data into the empty file `fd`, which grows to its final size."""
    table_clusters = found.first_table - 1 - found.blocks
    first_level = found.first_data - len(found.tables) - found.first_table
    entries = -(-found.size // (_PER_TABLE << _BITS))
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, _BITS, found.size, 0, entries, found.first_table << _BITS,
        CLUSTER, table_clusters, 0, 0, 0, 0, 0, 4, 104,
    )  # fmt: skip
    os.ftruncate(fd, found.end << _BITS)
    write_exactly(fd, header, 0)
    first_block = 1 + table_clusters
    _put(fd, 1, [(first_block + index) << _BITS for index in range(found.blocks)])
    write_exactly(fd, b"\0\1" * found.end, first_block << _BITS)
    tables = {number: found.first_table + first_level + index for index, number in enumerate(found.tables)}
    _put(fd, found.first_table, [(tables[n] << _BITS) | _ONE if n in tables else 0 for n in range(entries)])
    for number, entries_of in groupby(_clusters(found), key=lambda entry: entry[0] // _PER_TABLE):
        table = [0] * _PER_TABLE
        for index, at in entries_of:
            table[index % _PER_TABLE] = at | _ONE
        _put(fd, tables[number], table)


def _clusters(found: Layout) -> Iterator[tuple[int, int]]:
    """(number of the cluster in the disk, its byte in the file) of all data."""
    for run, (_, at) in zip(found.runs, found.places, strict=True):
        for inside in range(0, run.length, CLUSTER):
            yield (run.start + inside) >> _BITS, at + inside


def _put(fd: int, cluster: int, numbers: list[int]) -> None:
    write_exactly(fd, struct.pack(f">{len(numbers)}Q", *numbers), cluster << _BITS)


def _whole_clusters(runs: Iterable[Extent]) -> Iterator[Extent]:
    start = end = -1
    for run in runs:
        first, last = run.start >> _BITS << _BITS, -(-run.end >> _BITS) << _BITS
        if first <= end:
            end = max(end, last)
            continue
        if end > start:
            yield Extent(start, end - start)
        start, end = first, last
    if end > start:
        yield Extent(start, end - start)
