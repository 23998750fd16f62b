"""The paths that an orchestrator gives: checked before anything is mounted there.

What was checked is used by descriptors that follow no link on the whole way (openat2), so that a directory above which
is replaced meanwhile leads nowhere.
"""

import errno
import logging
import os
import stat
from pathlib import Path

from plugin.errors import EbiError, invalid
from plugin.host import mounts
from plugin.settings import Settings
from plugin.volumes import names

log = logging.getLogger(__name__)


def checked(path: Path, what: str, root: str = "") -> Path:
    """`path`, which `what` ("staging path") names, in the form of mountinfo.

    Raises INVALID for one that is relative, has `..`, is a symbolic link, or lies outside `root` ("" for anywhere).
    """
    if not path.is_absolute() or ".." in path.parts or path == Path("/"):
        raise _bad(path, what, "it must be absolute, without ..")
    if _is_link(path):
        raise _bad(path, what, "it is a symbolic link")
    real = path.parent.resolve() / path.name
    if root and not real.is_relative_to(Path(root).resolve()):
        raise _bad(path, what, f"it leads to {real}, outside {root}")
    return real


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except OSError:  # the root of a filesystem that has shut down; it has to be unmounted all the same
        return False


def usable(path: Path, what: str, settings: Settings) -> Path:
    """`path` checked, as one to mount at: below the settings' root, neither in the data directory nor in a volume.

    Whoever uses a volume may put links into it, and what is mounted in the data directory hides it. Raises INVALID.
    """
    real = checked(path, what, settings.target_root)
    if real.is_relative_to(settings.data_dir.resolve()):
        raise _bad(path, what, f"it lies in the data directory {settings.data_dir}")
    above = mounts.containing(real.parent)
    if above is not None and Path(above.source).name.startswith(names.TOP):
        raise _bad(path, what, f"it lies in the volume that is mounted at {above.target}")
    return real


def make_target(target: Path, *, block: bool) -> bool:
    """Have a directory, or for a raw device a file, at `target`; True if it was made. Its parent exists."""
    with mounts.opened(target.parent) as parent:
        try:
            if block:
                flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                os.close(os.open(target.name, flags, 0o600, dir_fd=parent))
            else:
                os.mkdir(target.name, mode=0o750, dir_fd=parent)
            return True
        except FileExistsError:
            if stat.S_ISDIR(os.stat(target.name, dir_fd=parent, follow_symlinks=False).st_mode) == block:
                raise invalid(
                    f"the target path {target} is {'a directory' if block else 'no directory'}",
                    "a filesystem is published at a directory, a raw device at a file",
                ) from None
            return False
        except OSError as error:
            raise invalid(f"cannot make the target path {target}: {error.strerror}", "its parent must exist") from error


def remove_target(target: Path) -> None:
    """Remove what `make_target` made, if it is there and empty: what holds anything was not made by us."""
    if not target.parent.is_dir():
        return
    with mounts.opened(target.parent) as parent:
        try:
            found = os.stat(target.name, dir_fd=parent, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                os.rmdir(target.name, dir_fd=parent)
            elif stat.S_ISREG(found.st_mode) and found.st_size == 0:
                os.unlink(target.name, dir_fd=parent)
            else:
                log.warning("%s is left as it is: no target that was made here", target)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            log.warning("%s is left as it is: it is not empty", target)


def _bad(path: Path, what: str, why: str) -> EbiError:
    return invalid(f"the {what} {path} can't be used: {why}", "give the path that the orchestrator made")
