"""LUKS2 headers as they lie on the disk: the binary header and its JSON, both copies, checked before they are believed.

Source: "LUKS2 On-Disk Format Specification", version 1.1.3, chapters 2 and 3.
"""

import hashlib
import json
import os
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plugin.errors import invalid, unsupported
from plugin.luks.parameters import Pbkdf

_MAGIC = b"LUKS\xba\xbe"
_SECOND_MAGIC = b"SKUL\xba\xbe"
# magic, version, header size, sequence id, label, checksum algorithm, salt, uuid, subsystem, header offset, padding,
# checksum; a pad to 4096 bytes and the JSON area follow.
_BINARY = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
_BINARY_SIZE = 4096
_CHECKSUM = slice(448, 512)
_SIZES = tuple(1 << power for power in range(14, 23))  # 16 KiB to 4 MiB, binary header included
_ALGORITHMS = ("sha256", "sha512", "sha384", "sha224", "sha1")
_LONGEST_KEY = 512  # bytes, as in cryptsetup
_SECTOR_SIZES = (512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Header:
    """A LUKS2 header with one encrypted segment; offsets and sizes in bytes, `key_size` in bits.

    `payload_size` is None where the payload takes the rest of the device. `pbkdf` is that of the first keyslot, None
    where there is no keyslot with one (an erased header).
    """

    uuid: str
    payload_offset: int
    payload_size: int | None
    sector_size: int
    cipher: str
    key_size: int
    iv_tweak: int
    pbkdf: Pbkdf | None
    label: str = ""
    json: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


def is_luks(path: Path) -> bool:
    """Whether `path` starts as a LUKS device does, of whatever version and in whatever state."""
    with path.open("rb") as file:
        return file.read(6) == _MAGIC


def read(path: Path) -> Header:
    """The newer one of the two copies of the header that are whole.

    Raises INVALID when `path` holds no LUKS2 header or none that is whole, UNSUPPORTED for a version or a layout that
    nothing here handles.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_fd(fd, str(path))
    finally:
        os.close(fd)


def read_fd(fd: int, name: str) -> Header:
    """As `read`, of an open file; `name` is for messages."""
    head = b""
    with suppress(OSError):  # the second copy may be readable
        head = os.pread(fd, 8, 0)
    if head[:6] == _MAGIC and head[6:8] == b"\x00\x01":
        raise unsupported(f"{name} has a LUKS1 header", "convert it with cryptsetup convert --type luks2")
    copies = _copies(fd)
    if not copies:
        if head[:6] == _MAGIC:
            raise invalid(f"the LUKS2 header of {name} is damaged", "restore it from its backup")
        raise invalid(f"{name} has no LUKS2 header", "is it encrypted?")
    _, binary, document = copies[-1]
    try:
        return _header(binary, document, name)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
        raise invalid(f"the LUKS2 header of {name} makes no sense", "restore it from its backup") from None


def costs(path: Path) -> list[Pbkdf]:
    """The key derivations of all keyslots of the LUKS2 file or device `path`; none where it has no whole header.

    Any layout will do, also one that `read` refuses.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        copies = _copies(fd)
    finally:
        os.close(fd)
    try:
        slots = copies[-1][2]["keyslots"].values() if copies else ()
        return [pbkdf_of(slot["kdf"]) for slot in slots if slot["type"] == "luks2"]
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        return []  # cryptsetup will say what is wrong with it


def sequence(path: Path) -> int:
    """The number of the newest whole copy of the header, which grows with each change; 0 where none is whole."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        copies = _copies(fd)
    finally:
        os.close(fd)
    return copies[-1][0] if copies else 0


def damaged(path: Path) -> list[str]:
    """Which of the two copies of the header are damaged: of "primary" and "secondary", those that are."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        whole = {found[1][9] == 0 for found in _copies(fd)}
    except OSError:  # none can be read
        whole = set()
    finally:
        os.close(fd)
    return [name for name, first in (("primary", True), ("secondary", False)) if first not in whole]


def _copies(fd: int) -> list[tuple[int, tuple[Any, ...], Any]]:
    """The copies of the header that are whole, the newest last. Raises OSError where none is, and one can't be read."""
    found, failure = [], None
    for offset, magic in _places():
        try:
            if (copy := _copy(fd, offset, magic)) is not None:
                found.append(copy)
        except OSError as error:
            failure = error
    if failure and not found:
        raise failure
    return sorted(found, key=lambda copy: copy[0])


def _places() -> list[tuple[int, bytes]]:
    return [(0, _MAGIC), *((size, _SECOND_MAGIC) for size in _SIZES)]


def _copy(fd: int, offset: int, magic: bytes) -> tuple[int, tuple[Any, ...], Any] | None:
    """(sequence id, binary header, JSON) of the copy at `offset`; None where none is, or a damaged one."""
    binary = os.pread(fd, _BINARY_SIZE, offset)
    if len(binary) < _BINARY_SIZE or binary[:6] != magic:
        return None
    fields = _BINARY.unpack_from(binary)
    version, size, sequence, algorithm, at = fields[1], fields[2], fields[3], _string(fields[5]), fields[9]
    if version != 2 or size not in _SIZES or at != offset or offset not in (0, size) or algorithm not in _ALGORITHMS:
        return None
    area = os.pread(fd, size - _BINARY_SIZE, offset + _BINARY_SIZE)
    blank = bytearray(binary)
    blank[_CHECKSUM] = bytes(64)
    digest = hashlib.new(algorithm, blank + area, usedforsecurity=False).digest()
    if len(area) != size - _BINARY_SIZE or fields[11][: len(digest)] != digest:
        return None
    try:
        return sequence, fields, json.loads(area.split(b"\0", 1)[0])
    except (ValueError, RecursionError):
        return None


def _header(binary: tuple[Any, ...], document: dict[str, Any], name: str) -> Header:
    requirements = document["config"].get("requirements", {}).get("mandatory", [])
    if requirements:
        raise unsupported(
            f"the LUKS2 header of {name} requires {', '.join(str(item) for item in requirements)}",
            "finish a reencryption with cryptsetup reencrypt --resume-only",
        )
    segments = document["segments"]
    if len(segments) != 1:
        raise unsupported(f"the LUKS2 header of {name} has {len(segments)} segments", "only one is handled")
    segment = next(iter(segments.values()))
    if segment["type"] != "crypt" or "integrity" in segment:
        raise unsupported(f"the payload of {name} is not plainly encrypted", "integrity protection is not handled")
    sector_size = int(segment["sector_size"])
    offset, tweak = _count(segment["offset"]), _count(segment["iv_tweak"])
    size = None if segment["size"] == "dynamic" else _count(segment["size"])
    if sector_size not in _SECTOR_SIZES or offset % 512 or (size is not None and size % sector_size):
        raise ValueError
    slots = sorted(document["keyslots"].items(), key=lambda item: int(item[0]))
    key_size = int(slots[0][1]["key_size"]) if slots else 0
    if not 0 <= key_size <= _LONGEST_KEY:
        raise ValueError
    return Header(
        uuid=_string(binary[7]),
        payload_offset=offset,
        payload_size=size,
        sector_size=sector_size,
        cipher=_text(segment["encryption"]),
        key_size=8 * key_size,
        iv_tweak=tweak,
        pbkdf=next((pbkdf_of(slot["kdf"]) for _, slot in slots if slot["type"] == "luks2"), None),
        label=_string(binary[4]),
        json=document,
    )


def pbkdf_of(kdf: dict[str, Any]) -> Pbkdf:
    """A keyslot's derivation. Raises KeyError, TypeError or ValueError where it is none."""
    if kdf["type"] == "pbkdf2":
        return Pbkdf("pbkdf2", _cost(kdf["iterations"]))
    return Pbkdf(_text(kdf["type"]), _cost(kdf["time"]), _cost(kdf["memory"]), _cost(kdf["cpus"]))


def _cost(value: Any) -> int:
    """A 32-bit number."""
    number = int(value)
    if not 0 <= number < 1 << 32:
        raise ValueError
    return number


def _count(value: Any) -> int:
    """A 64-bit number, which the format writes as a string."""
    number = int(_text(value))
    if not 0 <= number < 1 << 63:
        raise ValueError
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _string(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode("ascii", errors="replace")
