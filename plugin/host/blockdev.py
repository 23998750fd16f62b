"""What is on a block device: its size, its signature, the size of its filesystem, whether it is blank."""

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from plugin.errors import not_found, precondition
from plugin.host.files import write_exactly
from plugin.host.run import CommandError, run

MIB = 1 << 20
# blkid(8) --probe: what its exit status says.
_BLKID_NOTHING, _BLKID_AMBIGUOUS = 2, 8


@dataclass(frozen=True)
class Signature:
    """What blkid recognised: `type` such as ext4, crypto_LUKS, or the kind of the partition table (dos, gpt)."""

    type: str
    usage: str
    uuid: str = ""

    @property
    def is_filesystem(self) -> bool:
        """Whether it can be mounted."""
        return self.usage == "filesystem"


@contextmanager
def _opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def number(path: Path) -> str:
    """MAJOR:MINOR of the block device `path`. Raises NOT_FOUND where there is no block device."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise not_found(f"there is no device {path}", "is it attached to this node?") from error
    if not stat.S_ISBLK(status.st_mode):
        raise not_found(f"{path} is not a block device", "is it attached to this node?")
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def kernel_name(device_number: str) -> str:
    """The kernel's name, such as sda1 or dm-3, of the device MAJOR:MINOR."""
    return (Path("/sys/dev/block") / device_number).resolve().name


def size(path: Path) -> int:
    """Bytes of the device or file `path`."""
    with _opened(path) as fd:
        return os.lseek(fd, 0, os.SEEK_END)


def probe(path: Path) -> Signature | None:
    """What `path` holds, by its signatures; None if it bears none.

    Raises PRECONDITION when the signatures contradict each other: then nobody should touch it.
    """
    done = run(["blkid", "--probe", "--output", "export", "--", str(path)], ok=(0, _BLKID_NOTHING, _BLKID_AMBIGUOUS))
    if done.returncode == _BLKID_AMBIGUOUS:
        raise precondition(
            f"{path} bears signatures of several kinds", "see wipefs(8); erase the one that is not meant to be there"
        )
    if done.returncode == _BLKID_NOTHING:
        return None
    found = dict(line.split("=", 1) for line in done.stdout.decode(errors="replace").splitlines() if "=" in line)
    if "TYPE" in found:
        return Signature(found["TYPE"], found.get("USAGE", ""), found.get("UUID", ""))
    if "PTTYPE" in found:
        return Signature(found["PTTYPE"], "partitions", found.get("PTUUID", ""))
    raise CommandError(["blkid", str(path)], done.returncode, "neither TYPE nor PTTYPE in its answer")


def is_blank(path: Path) -> bool:
    """Whether the first and the last MiB read as zeros. That alone does not prove that nothing was ever written."""
    with _opened(path) as fd:
        end = os.lseek(fd, 0, os.SEEK_END)
        blocks = (os.pread(fd, MIB, 0), os.pread(fd, MIB, max(0, end - MIB)))
    return not any(any(block) for block in blocks)


def zero(path: Path, length: int) -> None:
    """Overwrite the first `length` bytes (or all there are) with zeros, on the disk when this returns."""
    with _opened(path, os.O_WRONLY) as fd:
        length = min(length, os.lseek(fd, 0, os.SEEK_END))
        for offset in range(0, length, MIB):
            write_exactly(fd, bytes(min(MIB, length - offset)), offset)
        os.fsync(fd)


def read_words(path: Path, count: int) -> tuple[int, ...]:
    """The first `count` little-endian numbers of 32 bits of the device `path`."""
    with _opened(path) as fd:
        return struct.unpack(f"<{count}I", os.pread(fd, 4 * count, 0))


def write(path: Path, offset: int, data: bytes) -> None:
    """Write `data` at `offset` of the device `path`; it is on the disk when this returns."""
    with _opened(path, os.O_WRONLY) as fd:
        write_exactly(fd, data, offset)
        os.fsync(fd)


def flush(path: Path) -> None:
    """Have everything written to the device `path` on the disk."""
    with _opened(path) as fd:
        os.fsync(fd)


def filesystem_size(path: Path) -> int | None:
    """Bytes that the filesystem on `path` takes, by its superblock (ext2-4, XFS, btrfs); None for any other.

    Offsets: ext4's documentation in the kernel ("Super Block"), XFS's xfs_dsb, btrfs's on-disk format.
    """
    with _opened(path) as fd:
        block = os.pread(fd, 4096, 0)
        if block[:4] == b"XFSB":
            block_size, count = struct.unpack_from(">IQ", block, 4)
            return int(block_size * count)
        if block[1080:1082] == b"\x53\xef":
            low, shift, features, high = (
                struct.unpack_from("<I", block, 1024 + offset)[0] for offset in (4, 24, 0x60, 0x150)
            )
            wide = bool(features & 0x80)  # INCOMPAT_64BIT
            return int((low | (high << 32 if wide else 0)) << (10 + shift))
        block = os.pread(fd, 4096, 64 << 10)
        if block[0x40:0x48] == b"_BHRfS_M":
            return int(struct.unpack_from("<Q", block, 0xC9 + 8)[0])  # dev_item.total_bytes
    return None


def ext_panics(path: Path) -> bool:
    """Whether the ext2, 3 or 4 on `path` has the kernel panic on an error ("Super Block", s_errors)."""
    with _opened(path) as fd:
        magic, errors = (struct.unpack("<H", os.pread(fd, 2, 1024 + offset))[0] for offset in (0x38, 0x3C))
    return bool(magic == 0xEF53 and errors == 3)
