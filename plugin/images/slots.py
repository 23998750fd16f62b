"""How many operations on images run at once on this machine: two share its cores and disk, more wait for their turn."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from plugin.errors import EbiError, Kind
from plugin.host.lock import locked

COUNT = 2
_POLL_SECONDS = 0.2


@contextmanager
def slot(root: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold one of the slots of the data directory `root`; calls `waiting` now and then before there is one.

    A slot is the lock of a directory, there while it is held: a killed process holds none.
    """
    with ExitStack() as held:
        while not any(_taken(root / f".slot-{number}", held) for number in range(COUNT)):
            waiting()
            time.sleep(_POLL_SECONDS)
        yield


def _taken(directory: Path, held: ExitStack) -> bool:
    try:
        held.enter_context(locked(directory, "an image"))
    except EbiError as error:
        if error.kind is not Kind.BUSY:
            raise
        return False
    held.callback(directory.rmdir)
    return True
