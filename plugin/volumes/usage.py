"""Where a volume is in use on this node, as mountinfo and device-mapper tell."""

from pathlib import Path

from plugin.errors import EbiError
from plugin.host import blockdev, dm, mounts
from plugin.host.mounts import Mount
from plugin.volumes import names

# Where device nodes live: a published raw device is one of its files, seen through a bind mount.
_NODES = ("devtmpfs", "tmpfs")


def is_filesystem(mount: Mount, volume: str) -> bool:
    """Whether `mount` shows the filesystem of the volume; also one whose device has gone."""
    mapper = dm.find(names.top(volume))
    return _is_filesystem(mount, volume, mapper.number if mapper else "")


def _is_filesystem(mount: Mount, volume: str, number: str) -> bool:
    # btrfs has a device number of its own, so its source is looked at too.
    return mount.device == number or mount.source == str(dm.path(names.top(volume)))


def is_device(mount: Mount, volume: str) -> bool:
    """Whether `mount` is a file that shows the raw device of the volume; also one whose device has gone."""
    mapper = dm.find(names.top(volume))
    return _is_device(mount, volume, mapper.number if mapper else "")


def _is_device(mount: Mount, volume: str, number: str) -> bool:
    if mount.fs_type not in _NODES or mount.root == "/":
        return False
    if mount.root.endswith(f"/{names.top(volume)}"):  # no udevd: the node in /dev/mapper is no link
        return True
    try:
        return number != "" and blockdev.number(mount.target) == number
    except (EbiError, OSError):
        return False


def filesystems(volume: str) -> list[Mount]:
    """Every mount of the volume's filesystem."""
    mapper = dm.find(names.top(volume))
    return [mount for mount in mounts.table() if _is_filesystem(mount, volume, mapper.number if mapper else "")]


def devices(volume: str) -> list[Mount]:
    """Every place where the volume's raw device is published."""
    mapper = dm.find(names.top(volume))
    return [mount for mount in mounts.table() if _is_device(mount, volume, mapper.number if mapper else "")]


def published(volume: str, staging: Path) -> set[Path]:
    """Every path at which the volume is published, which is all of its mounts but the one at `staging`."""
    where = mounts.canonical(staging)
    return {mount.target for mount in filesystems(volume) + devices(volume)} - {where}
