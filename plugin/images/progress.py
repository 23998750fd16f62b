"""How far an operation is: told to whoever waits, and to the image's record now and then."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from plugin.errors import EbiError, Kind
from plugin.images.catalog import Catalog
from plugin.images.image import BackingImage, State

log = logging.getLogger(__name__)

_RECORD_EVERY = 0.5  # seconds
_TELL_EVERY = 0.1
_LOG_EVERY = 10.0


@dataclass(frozen=True)
class Progress:
    """Bytes `done` of `total` (0: not known) after `seconds` of work."""

    state: State
    done: int = 0
    total: int = 0
    seconds: float = 0.0

    @property
    def percent(self) -> int:
        """0 to 100; 100 only when it is done."""
        return min(100 * self.done // self.total, 99 if self.state is not State.READY else 100) if self.total else 0

    @property
    def bytes_per_second(self) -> float:
        """The mean speed so far."""
        return self.done / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At the mean speed; None where that can't be told."""
        speed = self.bytes_per_second
        return (self.total - self.done) / speed if self.total and speed else None

    @property
    def text(self) -> str:
        """Speed and time left, for people."""
        left = f", {self.seconds_left:.0f} s left" if self.seconds_left is not None else ""
        return f"{self.bytes_per_second / (1 << 20):.0f} MiB/s{left}"


def logged(what: str) -> Callable[[Progress], None]:
    """Who has the log tell now and then how far `what` is."""
    told = time.monotonic()

    def heard(progress: Progress) -> None:
        nonlocal told
        if time.monotonic() - told >= _LOG_EVERY:
            told = time.monotonic()
            log.info("%s: %d %%, %s", what, progress.percent, progress.text)

    return heard


class Reporter:
    """Follows one operation on `image`: it calls `state` and `advance`, `heard` hears of it, `catalog` keeps it."""

    def __init__(self, image: BackingImage, catalog: Catalog | None, heard: Callable[[Progress], None] | None) -> None:
        self.image = image
        self.total = 0
        self.done = 0
        self._catalog = catalog
        self._heard = heard or (lambda _: None)
        self._start = self._recorded = self._told = time.monotonic()

    def state(self, state: State, *, durable: bool = True, **changes: object) -> None:
        """The image is now in `state`; `changes` are further ones of its status."""
        self.image = self.image.changed(state=state, **changes)
        self._save(durable=durable)
        self._heard(self._progress())

    def note(self, message: str) -> None:
        """Have `message` among the image's events."""
        self.image = self.image.noted(message)

    def expect(self, total: int) -> None:
        """`total` bytes are to be moved, 0 if that is not known: it begins."""
        self.total = total
        self._start = time.monotonic()  # whatever was waited for before
        self.state(State.IN_PROGRESS, durable=False)

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""
        self.done += count
        self.tick()

    def tick(self) -> None:
        """Still at work: tell of it where it is time to. Raises CANCELLED when the image is being deleted."""
        now = time.monotonic()
        if now - self._told >= _TELL_EVERY:
            self._told = now
            if self._catalog is not None and self.image.cancel_path.exists():
                raise EbiError(f"the work on {self.image.described} was cancelled", kind=Kind.CANCELLED)
            self._heard(self._progress())
        if now - self._recorded >= _RECORD_EVERY:
            self._recorded = now
            so_far = self._progress()
            if self.image.status.state is State.IN_PROGRESS:
                self.image = self.image.changed(progress=so_far.percent, message=so_far.text)
            self._save(durable=False)

    def _save(self, *, durable: bool) -> None:
        if self._catalog is not None:
            self._catalog.save(self.image, durable=durable)

    def _progress(self) -> Progress:
        return Progress(self.image.status.state, self.done, self.total, time.monotonic() - self._start)
