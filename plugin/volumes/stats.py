"""How full a volume is, and how it is."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from plugin.errors import EbiError, not_found
from plugin.host import blockdev, dm, mounts
from plugin.volumes import names, usage
from plugin.volumes.node import Node


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
        condition = examine(node, volume)
        space = os.statvfs(path)
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
    raise not_found(f"volume {volume} is not at {path}", "stage and publish it first")


def examine(node: Node, volume: str) -> Condition:
    """The condition of a volume that is staged."""
    problems = list(_problems(node, volume))
    return Condition(bool(problems), "; ".join(problems) or "the volume is healthy")


def _problems(node: Node, volume: str) -> Iterator[str]:
    try:
        stack = node.stack(volume)
    except EbiError as error:
        yield error.message
        return
    for layer in stack.layers:
        mapper = dm.find(layer.name)
        if mapper is None:
            yield f"the device {layer.name} is gone"
        elif mapper.suspended:
            yield f"the device {layer.name} is suspended"
        elif not layer.fits(mapper):
            yield f"the device {layer.name} has the wrong device under it, or none"
    record = node.records.find(volume)
    if record is not None and record.image and dm.find(stack.top) is not None:
        words = dm.status(stack.top).split()
        # dm-snapshot tells used/total sectors, or a word in their place.
        if len(words) > 3 and "/" not in words[3]:
            yield f"the store of {stack.top} is {words[3].lower()}"
    if any("ro" in mount.super_options and "ro" not in mount.options for mount in usage.filesystems(volume)):
        yield "the filesystem went read-only"
