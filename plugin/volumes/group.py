"""The group that a volume's files shall belong to: a pod's fsGroup, by CSI's volume_mount_group.

As kubelet does it with fsGroupChangePolicy OnRootMismatch: where the root of the filesystem has the group and its bits
already, nothing else is looked at. The root is changed last, so that what was cut short is done again.
"""

import os
import stat
from pathlib import Path

from plugin import events

_READ_WRITE = stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IWGRP
_ENTER = stat.S_IXUSR | stat.S_IXGRP | stat.S_ISGID


def give(root: Path, group: int | None) -> None:
    """Have all files below the directory `root` belong to `group`, which may read, write and enter, as may the owner.

    Files made later inherit it (setgid). None for a group: they stay as they are.
    """
    if group is None:
        return
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(top)
        if found.st_gid == group and found.st_mode & _wanted(found.st_mode) == _wanted(found.st_mode):
            return
        with events.step("group"):
            # By descriptors, so that a link which somebody puts in the way leads nowhere.
            for _, directories, files, parent in os.fwalk(".", dir_fd=top, follow_symlinks=False):
                for name in (*directories, *files):
                    _give(name, parent, group)
            _give(".", top, group)
    finally:
        os.close(top)


def _wanted(mode: int) -> int:
    return _READ_WRITE | (_ENTER if stat.S_ISDIR(mode) else 0)


def _give(name: str, parent: int, group: int) -> None:
    try:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except FileNotFoundError:  # somebody has just removed it
        return
    try:
        mode, itself = os.fstat(fd).st_mode, f"/proc/self/fd/{fd}"
        os.chown(itself, -1, group)
        if not stat.S_ISLNK(mode):
            os.chmod(itself, stat.S_IMODE(mode) | _wanted(mode))  # noqa: PTH101
    finally:
        os.close(fd)
