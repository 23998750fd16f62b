"""Mounts: what is mounted, read from /proc/self/mountinfo (proc_pid_mountinfo(5)); mounting and unmounting.

A filesystem is mounted by mount(8), which knows each one's options. Bind mounts use the kernel's mount API of file
descriptors: a read-only bind appears read-only at once, and no symbolic link put in its way is followed.
"""

import ctypes
import errno
import os
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from plugin.errors import EbiError, invalid, precondition, unsupported
from plugin.host.run import run

_LIBC = ctypes.CDLL(None, use_errno=True)
# System calls without a wrapper in older C libraries; these numbers are the same on every architecture that we know.
_OPEN_TREE, _MOVE_MOUNT, _OPENAT2, _MOUNT_SETATTR = 428, 429, 437, 442
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS = 0x2, 0x4
# struct open_how: flags, mode, resolve.
_OPEN_HOW = struct.Struct("=3Q")
_OPEN_TREE_CLONE = 1
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_MOVE_FROM_EMPTY, _MOVE_TO_EMPTY = 0x4, 0x40
_ATTR_RDONLY = 1
_UMOUNT_NOFOLLOW = 8
# struct mount_attr: attr_set, attr_clr, propagation, userns_fd.
_MOUNT_ATTR = struct.Struct("=4Q")


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo: `device` is MAJOR:MINOR, `root` the part of the filesystem that is seen at `target`."""

    device: str
    root: str
    target: Path
    options: frozenset[str]
    fs_type: str
    source: str
    super_options: frozenset[str]

    @property
    def readonly(self) -> bool:
        """Whether nothing can be written through it."""
        return "ro" in self.options or "ro" in self.super_options


def table(text: str | None = None) -> list[Mount]:
    """Every mount that this process sees, a later one over an earlier one; or those in the mountinfo `text`."""
    lines = (Path("/proc/self/mountinfo").read_text(errors="surrogateescape") if text is None else text).split("\n")
    return [_parse(line) for line in lines if line]


def _parse(line: str) -> Mount:
    left, _, right = line.partition(" - ")
    _, _, device, root, target, options, *_ = left.split(" ")
    fs_type, source, super_options = right.split(" ")[:3]
    return Mount(
        device=device,
        root=_unescape(root),
        target=Path(_unescape(target)),
        options=frozenset(options.split(",")),
        fs_type=fs_type,
        source=_unescape(source),
        super_options=frozenset(super_options.split(",")),
    )


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def canonical(target: Path) -> Path:
    """`target` as mountinfo would name it: links in the directories above it resolved, itself left alone."""
    return target.parent.resolve() / target.name


def at(target: Path) -> Mount | None:
    """The uppermost mount at exactly `target`; None where nothing is mounted."""
    where = canonical(target)
    return next((mount for mount in reversed(table()) if mount.target == where), None)


def containing(path: Path) -> Mount | None:
    """The mount that shows what is at `path`, which is in the form of mountinfo and need not exist."""
    above = [mount for mount in table() if path.is_relative_to(mount.target)]
    return max(reversed(above), key=lambda mount: len(mount.target.parts), default=None)


def mount(device: Path, target: Path, fs_type: str, options: Iterable[str] = ()) -> None:
    """Mount the filesystem on `device` at the directory `target`. Raises `CommandError`, INVALID."""
    joined = ",".join(options)
    argv = ["mount", "--no-canonicalize", "--types", fs_type, *(["--options", joined] if joined else [])]
    with opened(target) as end:
        run([*argv, "--", str(device), f"/proc/self/fd/{end}"], fds=(end,))


def bind(source: Path, target: Path, *, readonly: bool = False) -> None:
    """Let `target` (a directory, or a file for a file) show what is at `source`. Raises EbiError."""
    what = f"bind {source} at {target}"
    with opened(source) as start, opened(target) as end:
        tree = _call(what, _OPEN_TREE, start, b"", _AT_EMPTY_PATH | _OPEN_TREE_CLONE | os.O_CLOEXEC)
        try:
            if readonly:
                attributes = _MOUNT_ATTR.pack(_ATTR_RDONLY, 0, 0, 0)
                _call(what, _MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, attributes, len(attributes))
            _call(what, _MOVE_MOUNT, tree, b"", end, b"", _MOVE_FROM_EMPTY | _MOVE_TO_EMPTY)
        finally:
            os.close(tree)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor (O_PATH) of `path`, in the form of mountinfo: no symbolic link is followed on the whole way.

    Raises INVALID where there is none.
    """
    how = _OPEN_HOW.pack(os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0, _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS)
    try:
        fd = _call(f"open {path}", _OPENAT2, _AT_FDCWD, os.fsencode(path), how, len(how))
    except EbiError as error:
        raise invalid(f"cannot use the path {path}: {error.message}", "give a path whose parent exists") from error
    try:
        yield fd
    finally:
        os.close(fd)


def unmount(target: Path) -> bool:
    """Unmount what is mounted at `target`, all of it; False if nothing was. Raises PRECONDITION while it is in use."""
    done = False
    where = canonical(target)
    while (found := at(where)) is not None:
        if _LIBC.umount2(bytes(where), _UMOUNT_NOFOLLOW) != 0:
            code = ctypes.get_errno()
            if code == errno.EBUSY:
                raise precondition(f"{target} is in use", "end the processes that have files open there; see fuser -vm")
            if code not in (errno.EINVAL, errno.ENOENT):
                raise EbiError(f"cannot unmount {target}: {os.strerror(code)}")
            if at(where) == found:  # else somebody has just unmounted it
                raise precondition(f"{target} is hidden by another mount", "unmount what is mounted over it first")
        done = True
    return done


def _call(what: str, number: int, *arguments: int | bytes) -> int:
    converted = [ctypes.c_long(item) if isinstance(item, int) else ctypes.c_char_p(item) for item in arguments]
    result = int(_LIBC.syscall(ctypes.c_long(number), *converted))
    if result < 0:
        code = ctypes.get_errno()
        if code == errno.ENOSYS:
            raise unsupported(f"cannot {what}: this kernel is too old", "Linux 5.12 or later is needed")
        raise EbiError(f"cannot {what}: {os.strerror(code)}")
    return result
