"""Contenders run by turns, so that what else the machine does meets all of them alike."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.result import Values

_NOISY = 1.25  # the largest over the smallest; beyond that, more rounds are run
_MOST = 2  # times as many rounds as asked for


@dataclass(frozen=True)
class Contender:
    """Someone to measure: `run` is timed, `clean`, which undoes it, is not."""

    name: str
    run: Callable[[], object]
    clean: Callable[[], object] = lambda: None


def compare(contenders: Sequence[Contender], rounds: int, *, cold: Iterable[Path] = ()) -> dict[str, Values]:
    """Seconds of each contender, by name: `rounds` of them, up to twice as many where they differ much.

    The page cache is warm: a first run, not counted, fills it. The files `cold` are thrown out of it before each run.
    """
    cold = list(cold)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    if not cold:
        for contender in contenders[:1]:
            contender.run()
            contender.clean()
    for number in range(_MOST * rounds):
        if number >= rounds and all(Values(tuple(found)).spread <= _NOISY for found in seconds.values()):
            break
        for contender in contenders:
            settle()
            for path in cold:
                forget(path)
            start = time.perf_counter()
            contender.run()
            seconds[contender.name].append(time.perf_counter() - start)
            contender.clean()
    return {name: Values(tuple(found)) for name, found in seconds.items()}


def settle() -> None:
    """Write out what others have left, so that nobody pays for it."""
    os.sync()


def forget(path: Path) -> None:
    """Throw the file out of the page cache; clean pages only, hence after `settle`."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def synced(path: Path) -> None:
    """fsync the file, as a copy that is to last needs it."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
