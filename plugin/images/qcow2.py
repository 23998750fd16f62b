"""qcow2 files, read where they lie: versions 2 and 3, compressed clusters, zero clusters, subclusters.

No number in the file is believed: each offset and length is held against the file's size, each table and each
decompressed cluster against its bound. A file that names other files (a backing file, external data) is refused, since
reading it would hand out files of this host. Source: docs/interop/qcow2.rst of QEMU.
"""

import os
import struct
import sys
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from plugin.errors import EbiError, invalid, unsupported
from plugin.host.files import Extent, read_exactly

# magic, version, backing file offset and size, cluster bits, size, encryption method, L1 size and offset, refcount
# table's offset and clusters, snapshots and their offset; version 3 goes on with three sets of feature bits, the
# refcount order and the header's length.
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_HEADER_3 = struct.Struct(">QQQII")
_CORRUPT, _EXTERNAL_DATA, _COMPRESSION, _EXTENDED_L2 = 1 << 1, 1 << 2, 1 << 3, 1 << 4
_KNOWN_FEATURES = 1 | _CORRUPT | _EXTERNAL_DATA | _COMPRESSION | _EXTENDED_L2  # bit 0, dirty, is about refcounts
_L1_LIMIT = 32 << 20  # bytes, as in QEMU
_CACHE = 8 << 20  # bytes of L2 tables kept

_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COMPRESSED = 1 << 62
_ZERO = 1
_RESERVED_L1 = 0x7F00_0000_0000_01FF
_RESERVED_L2 = 0x3F00_0000_0000_01FE
_SUBCLUSTERS = 32
_DEFLATE, _ZSTD = 0, 1


@dataclass(frozen=True)
class _Run:
    """Bytes `start` to `end` of a cluster; at `host` in the file, zeros where that is None."""

    start: int
    end: int
    host: int | None


@dataclass(frozen=True)
class _Packed:
    """A compressed cluster: at most `length` bytes at `host` in the file."""

    host: int
    length: int


class Qcow2:
    """The disk in the open qcow2 file `fd`; `name` is for messages, `size` is the disk's in bytes.

    Raises INVALID for a damaged file, UNSUPPORTED for one that is not read here.
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd, self._name = fd, name
        self._file_size = os.fstat(fd).st_size
        raw = os.pread(fd, 256, 0).ljust(256, b"\0")
        magic, version, backing, _, bits, self.size, method, l1_size, l1_offset, *_ = _HEADER.unpack_from(raw)
        if magic != b"QFI\xfb" or version not in (2, 3):
            raise unsupported(f"{name} is no qcow2 file of version 2 or 3", "convert it with qemu-img convert")
        features = _HEADER_3.unpack_from(raw, 72)[0] if version == 3 else 0
        length = _HEADER_3.unpack_from(raw, 72)[4] if version == 3 else 72
        self._refuse(backing, method, features)
        if not 9 <= bits <= 21:
            raise self._damaged(f"clusters of 2^{bits} bytes")
        self._extended = bool(features & _EXTENDED_L2)
        self._compression = raw[104] if length > 104 else _DEFLATE
        if self._compression not in (_DEFLATE, _ZSTD):
            raise unsupported(f"{name} uses the compression method {self._compression}", "convert it with qemu-img")
        self._bits, self._cluster = bits, 1 << bits
        self._per_table = self._cluster // (16 if self._extended else 8)
        if self.size <= 0 or self.size % 512:
            raise self._damaged(f"a disk of {self.size} bytes, which are no whole sectors")
        tables = -(-self.size // (self._per_table << bits))
        if l1_size < tables or tables * 8 > _L1_LIMIT:
            raise self._damaged(f"a first-level table of {l1_size} entries for {self.size} bytes")
        self._l1 = self._numbers(l1_offset, tables)
        used = [entry & _OFFSET for entry in self._l1 if entry & _OFFSET]
        if len(set(used)) != len(used):  # or a small file could keep us busy for years
            raise self._damaged("a second-level table that stands in several places")
        self._tables: OrderedDict[int, array[int]] = OrderedDict()

    def extents(self) -> Iterator[Extent]:
        """The runs that the tables map to data; every entry of them is checked on the way."""
        start = end = -1
        for run in self._mapped():
            if run.start == end:
                end = run.end
                continue
            if end > start:
                yield Extent(start, end - start)
            start, end = run.start, run.end
        if end > start:
            yield Extent(start, end - start)

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the disk's bytes from `offset` on. Raises INVALID where the file is damaged."""
        done = 0
        while done < len(buffer):
            index, inside = divmod(offset + done, self._cluster)
            piece = buffer[done : done + self._cluster - inside]
            self._read_cluster(piece, index, inside)
            done += len(piece)

    def description(self) -> dict[str, Any]:
        """For another process."""
        return {"kind": "qcow2", "fd": self._fd, "name": self._name}

    def _refuse(self, backing: int, method: int, features: int) -> None:
        name = self._name
        if backing:
            raise unsupported(f"{name} has a backing file", "flatten it with qemu-img convert")
        if method:
            raise unsupported(f"{name} is encrypted by qcow2", "decrypt it with qemu-img convert")
        if features & _EXTERNAL_DATA:
            raise unsupported(f"{name} keeps its data in another file", "flatten it with qemu-img convert")
        if features & _CORRUPT:
            raise invalid(f"{name} is marked as corrupt", "repair it with qemu-img check -r all")
        if strange := features & ~_KNOWN_FEATURES:
            raise unsupported(
                f"{name} needs features that are not known here: {strange:#x}", "convert it with qemu-img"
            )

    def _mapped(self) -> Iterator[Extent]:
        for number, entry in enumerate(self._l1):
            table = self._table(number) if entry else None
            if table is None:
                continue
            first = number * self._per_table
            step = 2 if self._extended else 1
            for slot in range(min(self._per_table, -(-self.size // self._cluster) - first)):
                descriptor = table[slot * step]
                if not descriptor and not (self._extended and table[slot * step + 1]):
                    continue
                at = (first + slot) << self._bits
                found = self._cluster_at(descriptor, table[slot * step + 1] if self._extended else 0, at)
                if isinstance(found, _Packed):
                    yield Extent(at, min(self._cluster, self.size - at))
                    continue
                for run in found:
                    if run.host is not None and at + run.start < self.size:
                        yield Extent(at + run.start, min(run.end, self.size - at) - run.start)

    def _read_cluster(self, buffer: memoryview, index: int, inside: int) -> None:
        number, slot = divmod(index, self._per_table)
        table = self._table(number)
        if table is None:
            buffer[:] = bytes(len(buffer))
            return
        descriptor = table[2 * slot] if self._extended else table[slot]
        found = self._cluster_at(descriptor, table[2 * slot + 1] if self._extended else 0, index << self._bits)
        if isinstance(found, _Packed):
            buffer[:] = self._unpacked(found)[inside : inside + len(buffer)]
            return
        for run in found:
            start, end = max(run.start, inside), min(run.end, inside + len(buffer))
            if start >= end:
                continue
            part = buffer[start - inside : end - inside]
            if run.host is None:
                part[:] = bytes(len(part))
            else:
                read_exactly(self._fd, part, run.host + start - run.start)

    def _table(self, number: int) -> "array[int] | None":
        """The second-level table `number`, None where there is none; a few are kept."""
        entry = self._l1[number]
        if entry & _RESERVED_L1:
            raise self._damaged(f"a first-level entry {entry:#x}")
        if not entry & _OFFSET:
            return None
        if (table := self._tables.get(number)) is not None:
            self._tables.move_to_end(number)
            return table
        table = self._tables[number] = self._numbers(entry & _OFFSET, self._cluster // 8)
        while len(self._tables) > max(1, _CACHE // self._cluster):
            self._tables.popitem(last=False)
        return table

    def _numbers(self, offset: int, count: int) -> "array[int]":
        if offset % self._cluster or offset + 8 * count > self._file_size:
            raise self._damaged(f"a table at {offset}, behind its end or between clusters")
        numbers = array("Q", bytes(8 * count))
        read_exactly(self._fd, memoryview(numbers).cast("B"), offset)
        if sys.byteorder == "little":
            numbers.byteswap()
        return numbers

    def _cluster_at(self, descriptor: int, bitmap: int, at: int) -> _Packed | list[_Run]:
        """Where the cluster for byte `at` of the disk lies."""
        if descriptor & _COMPRESSED:
            shift = 62 - (self._bits - 8)
            host = descriptor & ((1 << shift) - 1)
            sectors = (descriptor & (_COMPRESSED - 1)) >> shift
            if bitmap or host >= self._file_size:
                raise self._damaged(f"a compressed cluster at {host}")
            return _Packed(host, min((sectors + 1) * 512 - host % 512, self._file_size - host))
        reserved = _RESERVED_L2 | (_ZERO if self._extended else 0)
        host = descriptor & _OFFSET
        if descriptor & reserved or host % self._cluster:
            raise self._damaged(f"a second-level entry {descriptor:#x}")
        # Of the last cluster only that part needs to be there that the disk has.
        needed = min(self._cluster, self.size - at)
        if self._extended:
            runs = self._subclusters(bitmap, host)
            if any(
                run.host is not None and run.host + min(run.end, needed) - run.start > self._file_size for run in runs
            ):
                raise self._damaged(f"data at {host}, behind its end")
            return runs
        if descriptor & _ZERO or not host:
            return [_Run(0, self._cluster, None)]
        if host + needed > self._file_size:
            raise self._damaged(f"data at {host}, behind its end")
        return [_Run(0, self._cluster, host)]

    def _subclusters(self, bitmap: int, host: int) -> list[_Run]:
        allocated, zero = bitmap & 0xFFFF_FFFF, bitmap >> 32
        if allocated & zero or (allocated and not host):
            raise self._damaged(f"a subcluster bitmap {bitmap:#x}")
        size = self._cluster // _SUBCLUSTERS
        runs: list[_Run] = []
        for number in range(_SUBCLUSTERS):
            start, is_data = number * size, bool(allocated >> number & 1)
            if runs and (runs[-1].host is not None) == is_data:
                runs[-1] = _Run(runs[-1].start, start + size, runs[-1].host)
            else:
                runs.append(_Run(start, start + size, host + start if is_data else None))
        return runs

    def _unpacked(self, packed: _Packed) -> bytes:
        data = bytearray(packed.length)
        read_exactly(self._fd, memoryview(data), packed.host)
        try:
            plain = self._inflated(data) if self._compression == _DEFLATE else self._unzstd(data)
        except zlib.error:
            plain = b""
        if len(plain) != self._cluster:
            raise self._damaged(f"a compressed cluster at {packed.host} that does not decompress")
        return plain

    def _inflated(self, data: bytearray) -> bytes:
        return zlib.decompressobj(-15).decompress(data, self._cluster)

    def _unzstd(self, data: bytearray) -> bytes:
        import zstandard  # noqa: PLC0415 - few files need it

        try:
            if zstandard.frame_content_size(data) > self._cluster:
                return b""
            # The window bounds what a frame may make the decompressor allocate.
            unpack = zstandard.ZstdDecompressor(max_window_size=max(1 << 23, self._cluster))
            with unpack.stream_reader(data) as reader:
                return reader.read(self._cluster)
        except zstandard.ZstdError:
            return b""

    def _damaged(self, what: str) -> EbiError:
        return invalid(f"{self._name} is damaged: it has {what}", "see qemu-img check")
