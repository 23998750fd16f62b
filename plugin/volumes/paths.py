"""The paths that an orchestrator gives: checked before anything is mounted there."""

import os
import stat
from pathlib import Path

from plugin.errors import EbiError, invalid


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


def make_target(target: Path, *, block: bool) -> bool:
    """Have a directory, or for a raw device a file, at `target`; True if it was made. Its parent exists."""
    try:
        if block:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        else:
            target.mkdir(mode=0o750)
        return True
    except FileExistsError:
        if stat.S_ISDIR(target.lstat().st_mode) == block:
            raise invalid(
                f"the target path {target} is {'a directory' if block else 'no directory'}",
                "a filesystem is published at a directory, a raw device at a file",
            ) from None
        return False
    except OSError as error:
        raise invalid(f"cannot make the target path {target}: {error.strerror}", "its parent must exist") from error


def remove_target(target: Path) -> None:
    """Remove what `make_target` made, if it is there and empty."""
    try:
        if target.is_dir() and not target.is_symlink():
            target.rmdir()
        else:
            target.unlink(missing_ok=True)
    except FileNotFoundError:
        pass


def _bad(path: Path, what: str, why: str) -> EbiError:
    return invalid(f"the {what} {path} can't be used: {why}", "give the path that the orchestrator made")
