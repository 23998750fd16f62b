"""One operation at a time on one object, across threads and processes.

The lock is flock(2) on the object's own directory: it needs no file of its own, and a killed process holds nothing.
The programs that it started do, for as long as they live: one that goes on alone, deriving a key for a header, must
not write that when somebody else has made another one.
"""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plugin.errors import busy
from plugin.host.files import room

_held = threading.local()


def held() -> list[int]:
    """The descriptors of the locks that this thread holds, for the programs that it starts."""
    found: list[int] = _held.__dict__.setdefault("fds", [])
    return found


@contextmanager
def locked(directory: Path, what: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the only operation on the object `what`, kept in `directory`, which is made if absent.

    `shared`: hold it together with other shared holders, who use the object and do not change it. Raises BUSY when
    another operation is under way. The only holder may remove the directory.
    """
    while True:
        try:
            with room(what):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, FileExistsError):  # its holder removes it in this instant
            if directory.exists() and not directory.is_dir():
                raise
            continue
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            # The holder before us may have removed the directory: then this is the lock of nothing.
            current = directory.stat() if directory.exists() else None
            if current is None or current.st_ino != os.fstat(fd).st_ino:
                os.close(fd)
                continue
        except BlockingIOError as error:
            os.close(fd)
            raise busy(f"another operation on {what} is under way", "try again when it has ended") from error
        except BaseException:
            os.close(fd)
            raise
        ours = held()
        ours.append(fd)
        try:
            yield
        finally:
            ours.remove(fd)
            os.close(fd)
        return


def is_locked(directory: Path) -> bool:
    """Whether an operation on the object in `directory` is under way."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
