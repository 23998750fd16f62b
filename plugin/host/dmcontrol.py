"""Questions to device-mapper's control node, by ioctl(2): one system call, where a scan of sysfs for a mapper that is
not there costs thousands once there are a hundred volumes. Nothing is changed here.

Numbers and structures: include/uapi/linux/dm-ioctl.h.
"""

import errno
import fcntl
import os
import struct
from pathlib import Path

from plugin.errors import unavailable

_CONTROL = Path("/dev/mapper/control")
# version, data_size, data_start, target_count, open_count, flags, event_nr, padding, dev; name, uuid, rest.
_HEAD = struct.Struct("=3I4I2IIQ128s129s7s")
_ENTRY = struct.Struct("=QI")  # dev, the offset of the next entry; then the name
_LIST_DEVICES, _DEV_STATUS = 2, 7
_BUFFER_FULL = 1 << 8
# No such mapper; or no device-mapper at all, with a control node or without one.
_NOTHING = (errno.ENXIO, errno.ENOENT, errno.ENODEV)
_LEAST, _MOST = 16 << 10, 16 << 20  # bytes of an answer


def number(name: str) -> str | None:
    """MAJOR:MINOR of the mapper `name`; None where the kernel has none. Raises PermissionError for all but root."""
    try:
        answer = _ask(_DEV_STATUS, name, _HEAD.size)
    except OSError as error:
        if error.errno in _NOTHING:
            return None
        raise
    device = _HEAD.unpack_from(answer)[10]
    return f"{os.major(device)}:{os.minor(device)}"


def names() -> list[str]:
    """The names of all mappers. Raises PermissionError for all but root, UNAVAILABLE for too many."""
    size = _LEAST
    while size <= _MOST:
        try:
            answer = _ask(_LIST_DEVICES, "", size)
        except OSError as error:
            if error.errno in _NOTHING:
                return []
            raise
        start, flags = _HEAD.unpack_from(answer)[4], _HEAD.unpack_from(answer)[7]
        if not flags & _BUFFER_FULL:
            return _listed(bytes(answer), start)
        size *= 4
    raise unavailable("device-mapper has too many devices to list", "see dmsetup ls")


def _listed(answer: bytes, start: int) -> list[str]:
    found = []
    while True:
        device, following = _ENTRY.unpack_from(answer, start)
        if device:  # 0 where there is none at all
            found.append(answer[start + _ENTRY.size :].split(b"\0", 1)[0].decode(errors="surrogateescape"))
        if not following:
            return found
        start += following


def _ask(command: int, name: str, size: int) -> bytearray:
    # The version is that of the interface; minor ones are compatible.
    buffer = bytearray(size)
    _HEAD.pack_into(buffer, 0, 4, 0, 0, size, _HEAD.size, 0, 0, 0, 0, 0, 0, os.fsencode(name), b"", b"")
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(control, 0xC0000000 | _HEAD.size << 16 | 0xFD << 8 | command, buffer)
    finally:
        os.close(control)
    return buffer
