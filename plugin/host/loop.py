"""Loop devices, by ioctl(2): a file as a block device, which goes by itself when its last user goes.

Every loop is made with LO_FLAGS_AUTOCLEAR and held open by its maker until a dm device above has opened it. So no
crash can leave one behind. Made in one step by LOOP_CONFIGURE (Linux 5.8), so that no half-made one can be seen.
Numbers and structures: include/uapi/linux/loop.h.
"""

import errno
import fcntl
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from plugin.errors import EbiError, exhausted, unavailable

log = logging.getLogger(__name__)

_GET_STATUS64 = 0x4C05
_CLEAR = 0x4C01
_SET_CAPACITY = 0x4C07
_CONFIGURE = 0x4C0A
_CONTROL_REMOVE = 0x4C81
_CONTROL_GET_FREE = 0x4C82

_READ_ONLY = 1
_AUTOCLEAR = 4
_DIRECT_IO = 16

# loop_info64: device, inode, rdevice, offset, sizelimit; number, encrypt type, key size, flags; file name, rest.
_INFO = struct.Struct("=5Q4I64s112s")
# loop_config: fd, block size; loop_info64; reserved.
_CONFIG = struct.Struct(f"=II{_INFO.size}s64s")

_CONTROL = Path("/dev/loop-control")
_SYSFS = Path("/sys/block")
# Between asking for a free loop and taking it another process may have taken it; each round has a new one to try.
_ATTEMPTS = 100


@dataclass(frozen=True)
class Backing:
    """The file under a loop device, as the kernel holds it: device number and inode tell it from its namesakes."""

    device: int
    inode: int
    offset: int
    path: str
    direct_io: bool


@contextmanager
def attached(path: Path, *, readonly: bool = False, direct_io: bool = False, discards: bool = True) -> Iterator[Path]:
    """`path` as a block device for as long as the block runs, and on while something has it open.

    Without `discards` it punches no holes into the file, neither for discards nor for zeros to be written. Yields the
    device, such as /dev/loop3. Raises EXHAUSTED when there is no loop device to be had, and UNAVAILABLE when the kernel
    has none at all.
    """
    file = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
    try:
        flags = (_READ_ONLY if readonly else 0) | (_DIRECT_IO if direct_io else 0)
        number, loop = _configure(file, path, flags, discards=discards and not readonly)
    finally:
        os.close(file)  # the kernel holds its own reference
    try:
        if not discards:
            _refuse_discards(number)
        yield Path(f"/dev/loop{number}")
    finally:
        os.close(loop)


def _configure(file: int, path: Path, flags: int, *, discards: bool) -> tuple[int, int]:
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags | _AUTOCLEAR, os.fsencode(path)[:63], b"")
    config = _CONFIG.pack(file, 0, info, b"")
    attempts = 0
    while attempts < _ATTEMPTS:
        number = _free_number()
        if discards and _was_refusing(number):
            attempts += not _remove(number)  # there may be more of them than attempts, and now there is one less
            continue
        attempts += 1
        try:
            loop = os.open(f"/dev/loop{number}", (os.O_RDONLY if flags & _READ_ONLY else os.O_RDWR) | os.O_CLOEXEC)
        except (FileNotFoundError, OSError) as error:
            if error.errno in (errno.ENOENT, errno.ENXIO, errno.EBUSY):
                continue
            raise
        try:
            fcntl.ioctl(loop, _CONFIGURE, config)
        except OSError as error:
            os.close(loop)
            if error.errno == errno.EBUSY:
                continue
            raise EbiError(
                f"cannot attach {path} to a loop device: {os.strerror(error.errno or 0)}",
                hint="loop devices need Linux 5.8 or later",
            ) from error
        return number, loop
    raise exhausted(f"no loop device is to be had for {path}", "see losetup --list for what takes them")


def _refuse_discards(number: int) -> None:
    """In drivers/block/loop.c a loop that takes no discards refuses REQ_OP_WRITE_ZEROES too: zeros are written then."""
    try:
        (_SYSFS / f"loop{number}/queue/discard_max_bytes").write_text("0")
    except OSError as error:
        log.warning("loop%d may punch holes into its file: %s", number, error.strerror)


def _was_refusing(number: int) -> bool:
    """Whether a free loop had its discards taken: newer kernels keep that, and it can't be given back."""
    queue = _SYSFS / f"loop{number}/queue"
    try:
        most, now = (int((queue / f"discard_max_{name}").read_text()) for name in ("hw_bytes", "bytes"))
    except OSError:
        return False
    return most > 0 and now == 0


def _remove(number: int) -> bool:
    """Have the free loop device `number` gone; False where it stays."""
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(control, _CONTROL_REMOVE, number)
    except OSError as error:  # somebody has just taken it
        log.debug("loop%d stays: %s", number, error.strerror)
        return False
    finally:
        os.close(control)
    return True


def _free_number() -> int:
    try:
        control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise unavailable(f"cannot open {_CONTROL}: {error.strerror}", "load the module loop; run as root") from error
    try:
        return fcntl.ioctl(control, _CONTROL_GET_FREE)
    finally:
        os.close(control)


def backing(kernel_name: str) -> Backing | None:
    """The file under the loop device `kernel_name` (such as loop3); None where there is none."""
    try:
        loop = os.open(f"/dev/{kernel_name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        answer = fcntl.ioctl(loop, _GET_STATUS64, bytes(_INFO.size))
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing attached
            return None
        raise
    finally:
        os.close(loop)
    device, inode, _, offset, _, _, _, _, flags, _, _ = _INFO.unpack(answer)
    path = _told(_SYSFS / kernel_name / "loop/backing_file")
    if path is None:  # it went in between
        return None
    return Backing(device, inode, offset, path, bool(flags & _DIRECT_IO))


def _told(entry: Path) -> str | None:
    """The path in `entry`, a loop's backing_file; any bytes may be in it."""
    try:
        return entry.read_text(errors="surrogateescape").removesuffix("\n")
    except OSError:
        return None


def is_over(kernel_name: str, path: Path) -> bool:
    """Whether the device `kernel_name` is a loop over the very file that `path` names now."""
    if not kernel_name.startswith("loop"):
        return False
    under = backing(kernel_name)
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    return under is not None and (under.device, under.inode, under.offset) == (status.st_dev, status.st_ino, 0)


def every() -> list[str]:
    """The kernel names of the loop devices that have a file."""
    return [entry.parts[-3] for entry in _SYSFS.glob("loop*/loop/backing_file")]


def below(directory: Path) -> dict[str, str]:
    """Every loop device over a file (deleted ones too) that its maker saw below `directory`, with that path."""
    told = {name: _told(_SYSFS / name / "loop/backing_file") for name in every()}
    return {name: path for name, path in told.items() if path is not None and Path(path).is_relative_to(directory)}


def holders(kernel_name: str) -> frozenset[str]:
    """The kernel names of the devices that stand on the loop device `kernel_name`."""
    try:
        return frozenset(entry.name for entry in (_SYSFS / kernel_name / "holders").iterdir())
    except FileNotFoundError:
        return frozenset()


def detach(kernel_name: str) -> None:
    """Have the loop device `kernel_name` let its file go, now or with its last user."""
    loop = os.open(f"/dev/{kernel_name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(loop, _CLEAR)
    except OSError as error:
        if error.errno != errno.ENXIO:  # it has gone by itself
            raise
    finally:
        os.close(loop)


def set_capacity(kernel_name: str) -> None:
    """Have the loop device `kernel_name` take its file's present size."""
    loop = os.open(f"/dev/{kernel_name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(loop, _SET_CAPACITY)
    finally:
        os.close(loop)
