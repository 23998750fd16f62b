"""How full a volume is, and how it is."""

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from plugin.errors import EbiError, not_found
from plugin.host import blockdev, dm, mounts
from plugin.host.dm import Mapper
from plugin.volumes import names, usage
from plugin.volumes.layers import FileBacking
from plugin.volumes.node import Node

_PAGE = mmap.PAGESIZE
_EXT4 = Path("/sys/fs/ext4")
# What a filesystem that has given up writing says of itself; the words besides ro are of newer kernels.
_STOPPED = frozenset({"ro", "emergency_ro", "shutdown"})


@dataclass(frozen=True)
class Condition:
    """`abnormal` with a `message` that says what is wrong, or not."""

    abnormal: bool
    message: str


@dataclass(frozen=True)
class Stats:
    """Bytes and inodes of a filesystem; a raw device has only `total_bytes`."""

    block: bool
    condition: Condition
    total_bytes: int
    used_bytes: int = 0
    available_bytes: int = 0
    total_inodes: int = 0
    used_inodes: int = 0
    available_inodes: int = 0


def stats(node: Node, volume: str, path: Path) -> Stats:
    """The volume as it is at `path`, where it is staged or published. Raises NOT_FOUND where it is not."""
    found = mounts.at(path) if path.is_absolute() else None
    if found is not None and usage.is_filesystem(found, volume):
        condition = examine(node, volume, path)
        try:
            space = os.statvfs(path)
        except OSError as error:  # a filesystem that has shut down
            return Stats(block=False, condition=_abnormal(error.strerror or "it can't be measured"), total_bytes=0)
        return Stats(
            block=False,
            condition=condition,
            total_bytes=space.f_blocks * space.f_frsize,
            used_bytes=(space.f_blocks - space.f_bfree) * space.f_frsize,
            available_bytes=space.f_bavail * space.f_frsize,
            total_inodes=space.f_files,
            used_inodes=space.f_files - space.f_ffree,
            available_inodes=space.f_favail,
        )
    if found is not None and usage.is_device(found, volume):
        device = dm.path(names.top(volume))
        return Stats(block=True, condition=examine(node, volume), total_bytes=blockdev.size(device))
    if found is not None and usage.is_stale_device(found) and not dm.find(names.top(volume)):
        return Stats(block=True, condition=_abnormal(f"the device {names.top(volume)} is gone"), total_bytes=0)
    raise not_found(f"volume {volume} is not at {path}", "stage and publish it first")


def examine(node: Node, volume: str, path: Path | None = None) -> Condition:
    """The condition of a volume that is staged, and of its filesystem at `path`."""
    problems = list(_problems(node, volume))
    if path is not None:
        problems += _of_filesystem(volume, path)
    return _abnormal("; ".join(problems)) if problems else Condition(False, "the volume is healthy")


def _abnormal(message: str) -> Condition:
    return Condition(True, message)


def _problems(node: Node, volume: str) -> Iterator[str]:
    try:
        record = node.records.find(volume)
        image = node.image(record) if record is not None else None
        stack = node.stack(volume)
    except EbiError as error:
        yield error.message
        return
    if image is not None:
        yield from _of_file(image.disk, image.described)
        backing = FileBacking(image.disk, readonly=True)
        yield from _of_mapper(names.image(image.uuid), backing.is_under)
    if record is not None:
        yield from _of_file(record.path, record.described)
    for layer in stack.layers:
        yield from _of_mapper(layer.name, layer.fits)
    if image is not None and dm.find(stack.top) is not None:
        words = dm.status(stack.top).split()
        # dm-snapshot tells used/total sectors, or a word in their place.
        if len(words) > 3 and "/" not in words[3]:
            yield f"the store of {stack.top} is {words[3].lower()}"


def _of_mapper(name: str, fits: Callable[[Mapper], bool]) -> Iterator[str]:
    mapper = dm.find(name)
    if mapper is None:
        yield f"the device {name} is gone"
        return
    if mapper.suspended:
        yield f"the device {name} is suspended"
    if not fits(mapper):
        yield f"the device {name} has {'the wrong device' if mapper.slaves else 'nothing'} under it"


def _of_file(path: Path, owner: str) -> Iterator[str]:
    """Whether the file is there, and its disk answers; the page cache is not asked."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            with mmap.mmap(-1, _PAGE) as page:  # memory that is aligned as O_DIRECT wants it
                os.preadv(fd, [page], 0)
        finally:
            os.close(fd)
    except FileNotFoundError:
        yield f"the file of {owner} is missing: {path}"
    except OSError as error:
        if error.errno != errno.EINVAL:  # a filesystem without direct I/O
            yield f"the file of {owner} can't be read: {error.strerror}"


def _of_filesystem(volume: str, path: Path) -> Iterator[str]:
    shown = usage.filesystems(volume)
    if any(_STOPPED & mount.super_options and "ro" not in mount.options for mount in shown):
        yield "the filesystem went read-only"
    top = dm.find(names.top(volume))
    try:
        path.stat()
        # ext4 keeps count, also over a restart; e2fsck sets it back.
        if top and (errors := int((_EXT4 / top.kernel_name / "errors_count").read_text())):
            yield f"the filesystem has met errors since it was checked: {errors}"
    except FileNotFoundError:
        pass
    except OSError as error:
        yield f"the filesystem does not answer: {error.strerror}"
