"""How many operations on images run at once on this machine: two share its cores and disk, more wait for their turn."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

COUNT = 2
_POLL_SECONDS = 0.2


@contextmanager
def slot(root: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold one of the slots of the data directory `root`; calls `waiting` now and then before there is one.

    A slot is flock(2) on a file: a killed process holds none.
    """
    fd = _free(root)
    while fd < 0:
        waiting()
        time.sleep(_POLL_SECONDS)
        fd = _free(root)
    try:
        yield
    finally:
        os.close(fd)


def _free(root: Path) -> int:
    for number in range(COUNT):
        fd = os.open(root / f".slot-{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            os.close(fd)
    return -1
