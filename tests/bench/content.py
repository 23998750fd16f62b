"""Disks to measure with: random bytes that neither compress nor deduplicate, or compress by half, and holes."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.bench.result import MIB

_PIECE = 4 * MIB
_HALF = bytes(value & 0x0F for value in range(256))  # four bits of chance a byte: deflate and zstd make it half as long


def dense(path: Path, size: int, *, compressible: bool = False) -> Path:
    """A file of `size` bytes of data, on the disk when this returns."""
    return with_runs(path, size, [(0, size)], compressible=compressible)


def partitioned(path: Path, size: int) -> Path:
    """As `dense`, but marked as holding a partition table, so that its encrypted sectors are 512 bytes long."""
    with dense(path, size).open("r+b") as file:
        file.seek(510)
        file.write(b"\x55\xaa")
        os.fsync(file.fileno())
    return path


def with_holes(path: Path, size: int, data: int, *, compressible: bool = False) -> Path:
    """A file of `size` bytes, `data` of them in pieces of 4 MiB spread evenly, holes between them."""
    count = -(-data // _PIECE)
    starts = [number * (size // _PIECE) // count * _PIECE for number in range(count)]
    return with_runs(path, size, [(start, min(_PIECE, size - start)) for start in starts], compressible=compressible)


def with_runs(path: Path, size: int, runs: Sequence[tuple[int, int]], *, compressible: bool = False) -> Path:
    """A file of `size` bytes with data in `runs` (start, length)."""
    with path.open("wb") as file:
        file.truncate(size)
        for start, length in runs:
            file.seek(start)
            for at in range(0, length, _PIECE):
                data = os.urandom(min(_PIECE, length - at))
                file.write(data.translate(_HALF) if compressible else data)
        file.flush()
        os.fsync(file.fileno())
    return path


def qcow2(raw: Path, path: Path, compression: str) -> Path:
    """The disk in `raw` as compressed qcow2 (`zlib` or `zstd`)."""
    options = ["-f", "raw", "-O", "qcow2", "-c", "-o", f"compression_type={compression}"]
    subprocess.run(["qemu-img", "convert", *options, raw, path], check=True)
    return path
