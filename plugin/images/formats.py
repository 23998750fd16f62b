"""What an image file is, by its first bytes, and the disk in it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from plugin.errors import invalid
from plugin.images.disk import CipherSpec, Disk, Source
from plugin.images.patched import Patched
from plugin.images.qcow2 import Qcow2
from plugin.luks import metadata

SECTOR = 512


class Format(StrEnum):
    """What the file is: the disk itself, a qcow2 file that holds it, or a LUKS2 device."""

    RAW = "raw"
    QCOW2 = "qcow2"
    LUKS = "luks"


_MAGICS = {b"QFI\xfb": Format.QCOW2, b"LUKS": Format.LUKS}


def detect(path: Path) -> Format:
    """The format of the file `path`; whatever bears no known mark is raw."""
    with path.open("rb") as file:
        return _MAGICS.get(file.read(4), Format.RAW)


@contextmanager
def opened(path: Path, form: Format, key: bytes | None = None) -> Iterator[Source]:
    """The disk in the file `path`; without its volume `key` a LUKS2 device tells its size and extents only.

    Raises INVALID for a damaged file or a size that is no whole number of sectors, UNSUPPORTED for what is not handled.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield _source(fd, path, form, key)
    finally:
        os.close(fd)


def _source(fd: int, path: Path, form: Format, key: bytes | None) -> Source:
    size = os.fstat(fd).st_size
    if form is Format.QCOW2:
        return Qcow2(fd, path.name)
    if form is Format.RAW:
        return Disk(fd, _whole_sectors(size, SECTOR, path))
    header = metadata.read_fd(fd, path.name)
    if header.iv_tweak:
        raise invalid(f"the payload of {path.name} starts in the middle of another device", "it is a part of one only")
    size = size - header.payload_offset if header.payload_size is None else header.payload_size
    _whole_sectors(size, header.sector_size, path)
    cipher = CipherSpec(header.cipher, key, header.sector_size) if key else None
    return Disk(fd, size, header.payload_offset, cipher, sealed=key is None)


def restored(value: Mapping[str, Any]) -> Source:
    """The source that `value`, its `description()`, tells of, in this process."""
    if value["kind"] == "qcow2":
        return Qcow2(value["fd"], value["name"])
    if value["kind"] == "patched":
        lower, upper = (restored(part) if part else None for part in (value["lower"], value["upper"]))
        return Patched.restored(value, lower, upper)
    return Disk.restored(value)


def _whole_sectors(size: int, sector: int, path: Path) -> int:
    if size <= 0 or size % sector:
        raise invalid(
            f"the disk in {path.name} has {size} bytes", f"a disk is a multiple of {sector} bytes; is it complete?"
        )
    return size
