"""Contenders run by turns, so that what else the machine does meets all of them alike; and runs that it disturbed are
done again.
"""

import os
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.result import Values

_NOISY = 1.25  # the largest over the smallest; beyond that, more rounds are run
_MORE = 2  # rounds at most beyond those asked for
_AGAIN = 4  # times that a disturbed run is done again
_DISTURBED = 0.15  # of all cores, taken by others; the kernel's own threads, which write for us, stay below
_QUIET = 0.1
_LOOK = 0.2  # seconds
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Contender:
    """Someone to measure: `run` is timed, `clean`, which undoes it, is not."""

    name: str
    run: Callable[[], object]
    clean: Callable[[], object] = lambda: None


@dataclass
class Clock:
    """Times contenders. It has `patience`, in seconds for all runs together, to wait for the others on the machine to
    be quiet and to do disturbed runs again; it uses it up.

    `noise` keeps, for each run that counts, the share of all cores that others took meanwhile.
    """

    rounds: int
    patience: float
    noise: list[float] = field(default_factory=list)

    def compare(
        self, contenders: Sequence[Contender], *, cold: Iterable[Path] = (), exactly: int = 0
    ) -> dict[str, Values]:
        """Seconds of each contender, by name: as many as `rounds`, two more if they differ much; or `exactly` so many.

        The page cache is warm: a first run, not counted, fills it. The files `cold` are thrown out of it before each
        run.
        """
        cold = list(cold)
        seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        if not cold:
            contenders[0].run()
            contenders[0].clean()
        for number in range(exactly or self.rounds + _MORE):
            if number >= (exactly or self.rounds) and all(
                Values(tuple(found)).spread <= _NOISY for found in seconds.values()
            ):
                break
            for contender in contenders:
                seconds[contender.name].append(self.time(contender.run, contender.clean, cold))
        return {name: Values(tuple(found)) for name, found in seconds.items()}

    def time(
        self, run: Callable[[], object], clean: Callable[[], object] = lambda: None, cold: Iterable[Path] = ()
    ) -> float:
        """Seconds of one run that nobody disturbed, or of the least disturbed of several."""
        tries: list[tuple[float, float]] = []
        for _ in range(1 + _AGAIN):
            self._settle(cold)
            busy, ours, start = _busy(), _ours(), time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            others = max(0.0, _busy() - busy - (_ours() - ours)) / (os.cpu_count() or 1) / seconds
            clean()
            tries.append((others, seconds))
            self.patience -= seconds if len(tries) > 1 else 0
            if others <= _DISTURBED or self.patience <= 0:
                break
        noise, seconds = min(tries)
        self.noise.append(noise)
        return seconds

    def _settle(self, cold: Iterable[Path]) -> None:
        os.sync()  # nobody shall pay for what others have left
        while self.patience > 0:
            busy = _busy()
            time.sleep(_LOOK)
            if (_busy() - busy) / (os.cpu_count() or 1) / _LOOK <= _QUIET:
                break
            self.patience -= _LOOK
        for path in cold:
            forget(path)


def forget(path: Path) -> None:
    """Throw the file out of the page cache; only its clean pages go."""
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


def _busy() -> float:
    """Seconds that all cores have been busy, or taken away by a hypervisor: proc_stat(5)."""
    user, nice, system, _, _, irq, softirq, steal, *_ = Path("/proc/stat").read_text().split(maxsplit=11)[1:]
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / _TICKS


def _ours() -> float:
    """Seconds of processor time that this process and its children, those that have ended, took."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(found.ru_utime + found.ru_stime for found in times)
