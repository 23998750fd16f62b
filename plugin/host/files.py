"""Files as this project needs them: replaced whole, durable, sparse, and measured by their data."""

import ctypes
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from plugin.errors import exhausted, invalid, precondition

_FICLONE = 0x4004_9409  # linux/fs.h
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h


@dataclass(frozen=True)
class Extent:
    """A run of data in a file or device: `start` and `length` in bytes."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.length


def sync_directory(path: Path) -> None:
    """Make renames and new names in the directory `path` survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Replace `path` by `value` as JSON, whole or not at all; `durable` waits for the disk."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w") as file:
            json.dump(value, file, indent=1, sort_keys=True)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise exhausted(f"no space left to write {path}", "free space in the data directory") from error
        raise
    if durable:
        sync_directory(path.parent)


def read_json(path: Path) -> Any | None:
    """What `write_json` wrote, or None where there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def data_extents(fd: int, start: int = 0, end: int | None = None) -> Iterator[Extent]:
    """The data runs of the open file `fd` between `start` and `end`, in order, as the filesystem tells (lseek(2)).

    A filesystem that knows no holes tells one run.
    """
    end = os.fstat(fd).st_size if end is None else end
    offset = start
    while offset < end:
        try:
            data = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        if data >= end:
            return
        offset = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        yield Extent(data, offset - data)


def read_exactly(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from byte `offset` of the file `fd`. Raises INVALID where the file ends before.

    In front of what the disk can't read, a read ends short; the next one tells the error.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise invalid(f"the file ends at byte {offset + done}, in the middle of its data", "it is truncated")
        done += count


def write_exactly(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at byte `offset` of the file `fd`.

    Where the disk fills up or fails in the middle, a write ends short; the next one tells the error.
    """
    rest = memoryview(data)
    while rest:
        count = os.pwrite(fd, rest, offset)
        rest, offset = rest[count:], offset + count


def share(source: int, target: int) -> bool:
    """Have the open file `target` share the blocks of `source`; False where the filesystem can't (ioctl_ficlone(2))."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return True
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM):
            return False
        raise


@contextmanager
def room(name: str) -> Iterator[None]:
    """Raise EXHAUSTED where the block finds no space on the disk for `name`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise exhausted(f"no space left for {name}", "free space in the data directory") from error
        raise


def reserve(fd: int, run: Extent, name: str) -> bool:
    """Have disk space for `run` of the open file `fd`; it reads as before. False where the filesystem can't do that.

    Raises EXHAUSTED without space for `name`. Not posix_fallocate(3), which writes where the filesystem can't.
    """
    with room(name):
        return _fallocate(fd, _KEEP_SIZE, run)


def punch(fd: int, run: Extent) -> None:
    """Give the disk space of `run` of the open file `fd` back, where the filesystem can; it reads as zeros."""
    try:
        _fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, run)
    except OSError as error:
        # It may need some space itself. What was reserved and not written reads as zeros as it is.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def start_writing(fd: int, run: Extent) -> None:
    """Have the kernel begin to write `run` of the open file `fd` to the disk, so that a later fsync finds little left.

    posix_fadvise(2) does that before it drops pages, and drops none that are not written yet.
    """
    os.posix_fadvise(fd, run.start, run.length, os.POSIX_FADV_DONTNEED)


def _fallocate(fd: int, mode: int, run: Extent) -> bool:
    call = _libc().fallocate
    while call(fd, mode, run.start, run.length) != 0:
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return libc


def preallocate(fd: int, length: int, name: str) -> None:
    """Reserve `length` bytes of disk for the open file `fd`; it grows to that size. `name` is for the message."""
    try:
        os.posix_fallocate(fd, 0, length)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise exhausted(f"no space for {length} bytes of {name}", "free space in the data directory") from error
        raise


def private_directory(path: Path) -> Path:
    """`path` as a directory that only this user may enter: made with mode 0700, refused if it is anybody else's."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise precondition(
            f"{path} is not private: owner {status.st_uid}, mode {status.st_mode & 0o7777:04o}",
            "run this as root"
            if status.st_uid == 0 != os.geteuid()
            else f"chown it to user {os.geteuid()} and chmod it to 0700",
        )
    return path
