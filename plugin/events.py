"""What the driver tells of itself while it works: timed steps, image operations, kernel events.

The driver publishes; metrics subscribe. So they are not known below the faces. The log tells of a step that takes long
while it goes on.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import TypeAlias

from plugin import logs

log = logging.getLogger(__name__)

_TELL_AFTER = 10.0  # seconds, then twice as many, and so on


@dataclass(frozen=True)
class Call:
    """One CSI call that has ended: its method, gRPC's name of its status, `seconds` of wall time."""

    method: str
    code: str
    seconds: float


@dataclass(frozen=True)
class Step:
    """One step of a stage, publish or expand, e.g. `unlock_image`; `seconds` of wall time."""

    name: str
    seconds: float
    ok: bool


@dataclass(frozen=True)
class ImageOperation:
    """One finished operation on a backing image, e.g. `encrypt`; `size` is bytes of data moved."""

    name: str
    size: int
    seconds: float
    ok: bool


@dataclass(frozen=True)
class DeviceEvent:
    """A uevent of a device-mapper device of ours; `lost` says that a staged volume's mapper vanished."""

    action: str
    name: str
    lost: bool = False


Event: TypeAlias = Call | Step | ImageOperation | DeviceEvent
_subscribers: list[Callable[[Event], None]] = []


def subscribe(handler: Callable[[Event], None]) -> Callable[[], None]:
    """Have `handler` called with every event, in the thread that publishes it. Returns the way to end that."""
    _subscribers.append(handler)
    return lambda: _subscribers.remove(handler)


def publish(event: Event) -> None:
    """Hand `event` to every subscriber."""
    for handler in tuple(_subscribers):
        handler(event)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Time the block as the step `name`, failed if it raises."""
    start = time.monotonic()
    ok, ended = False, threading.Event()
    # In our context, so that its lines belong to our call.
    threading.Thread(target=copy_context().run, args=(_tell, name, start, ended), name="step", daemon=True).start()
    try:
        yield
        ok = True
    finally:
        ended.set()
        publish(Step(name, time.monotonic() - start, ok))


def _tell(name: str, start: float, ended: threading.Event) -> None:
    """Have the log tell now and then that the step `name` goes on, until it has `ended`."""
    wait = _TELL_AFTER
    while not ended.wait(wait):
        log.info("still at the step %s after %.0f s%s", name, time.monotonic() - start, logs.whose())
        wait *= 2
