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
    return _is_filesystem(mount, volume, _number(volume))


def _is_filesystem(mount: Mount, volume: str, number: str) -> bool:
    if mount.device == number or mount.source == str(dm.path(names.top(volume))):
        return True
    # btrfs has a device number of its own, and names its device as it found it.
    return mount.fs_type == "btrfs" and number != "" and _number_of(Path(mount.source)) == number


def _number(volume: str) -> str:
    mapper = dm.find(names.top(volume))
    return mapper.number if mapper else ""


def _raw_numbers(volume: str) -> set[str]:
    mappers = (dm.find(name) for name in (names.top(volume), names.readonly(volume)))
    return {mapper.number for mapper in mappers if mapper}


def _number_of(path: Path) -> str:
    try:
        return blockdev.number(path)
    except (EbiError, OSError):
        return ""


def is_device(mount: Mount, volume: str) -> bool:
    """Whether `mount` is a file that shows the raw device of the volume."""
    return _is_device(mount, _raw_numbers(volume))


def _is_device(mount: Mount, numbers: set[str]) -> bool:
    return mount.fs_type in _NODES and mount.root != "/" and _number_of(mount.target) in numbers


def is_readonly(mount: Mount, volume: str) -> bool:
    """Whether what the volume shows at `mount` can't be written there."""
    if _is_device(mount, _raw_numbers(volume)):
        return mount.target in {shown.target for shown in readonly_devices(volume)}
    return "ro" in mount.options


def filesystems(volume: str) -> list[Mount]:
    """Every mount of the volume's filesystem."""
    number = _number(volume)
    return [mount for mount in mounts.table() if _is_filesystem(mount, volume, number)]


def devices(volume: str) -> list[Mount]:
    """Every place where the volume's raw device is published."""
    numbers = _raw_numbers(volume)
    return [mount for mount in mounts.table() if _is_device(mount, numbers)]


def readonly_devices(volume: str) -> list[Mount]:
    """Those of `devices` that can't be written."""
    mapper = dm.find(names.readonly(volume))
    return [mount for mount in mounts.table() if mapper and _is_device(mount, {mapper.number})]


def is_stale_device(mount: Mount) -> bool:
    """Whether `mount` shows a device node that names no device any more, whosever it was."""
    return mount.fs_type in _NODES and mount.root.startswith("/dm-") and _is_gone(mount.target)


def _is_gone(node: Path) -> bool:
    number = _number_of(node)
    return number != "" and not Path("/sys/dev/block", number).exists()


def published(volume: str, staging: Path) -> set[Path]:
    """Every path at which the volume is published, which is all of its mounts but the one at `staging`."""
    where = mounts.canonical(staging)
    return {mount.target for mount in filesystems(volume) + devices(volume)} - {where}
