"""The kernel's uevents of block devices: who waits for a device to appear or go wakes by them.

An event only wakes; what is true is read from sysfs. So a lost event costs nothing but the wait: after the socket
has overflowed (ENOBUFS) everybody looks again.
"""

import errno
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pyudev

from plugin import events

log = logging.getLogger(__name__)

PREFIX = "ebi-"
_SYSFS = Path("/sys/block")
# Should an event come before what it tells can be seen, the waiter looks again after this many seconds.
_LOOK_AGAIN = 1.0
_RECEIVE_BUFFER = 8 << 20  # bytes; a hundred volumes starting at once make some thousand events


class Watch:
    """One thread that hears every event of block devices, and the threads that wait for a change."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._expected: Counter[str] = Counter()
        # A udevd sends the event on when its rules have run and the nodes are there; without one, the kernel's own.
        source = "udev" if Path("/run/udev/control").exists() else "kernel"
        self._monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source)
        self._monitor.filter_by("block")
        try:
            self._monitor.set_receive_buffer_size(_RECEIVE_BUFFER)
        except OSError as error:  # an ordinary user may not; the kernel's default remains
            log.debug("the receive buffer of the udev monitor stays as it is: %s", error)
        self._monitor.start()
        self._mappers = _mappers()
        threading.Thread(target=self._listen, name="udev", daemon=True).start()

    def wait_until(self, happened: Callable[[], bool], seconds: float) -> bool:
        """Wait until `happened()` is true, asking after every event; False if it is not within `seconds`."""
        end = time.monotonic() + seconds
        with self._changed:
            while not happened():
                left = end - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, _LOOK_AGAIN))
        return True

    def expect_removal(self, name: str, times: int = 1) -> None:
        """Say that the mapper `name` is about to be removed by us (`times` -1: that it was not, after all)."""
        with self._changed:
            self._expected[name] += times

    def _listen(self) -> None:
        while True:
            try:
                device = self._monitor.poll()
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    log.exception("the udev monitor has failed; devices are seen again after a restart")
                    return
                log.warning("uevents were lost; reading sysfs again")
                self._look_again()
                continue
            if device is not None:
                self._handle(str(device.action), device.sys_name, device.properties.get("DM_NAME"))

    def _handle(self, action: str, kernel_name: str, mapper: str | None) -> None:
        if kernel_name.startswith("dm-"):
            # The kernel's own events carry no mapper name: keep it from when the device could still be asked.
            mapper = mapper or self._mappers.get(kernel_name) or _mapper_of(kernel_name)
            if action == "remove":
                self._mappers.pop(kernel_name, None)
            elif mapper:
                self._mappers[kernel_name] = mapper
            if mapper and mapper.startswith(PREFIX):
                self._tell(action, mapper)
        with self._changed:
            self._changed.notify_all()

    def _look_again(self) -> None:
        before, self._mappers = self._mappers, _mappers()
        gone = set(before.values()) - set(self._mappers.values())
        for mapper in sorted(gone):
            if mapper.startswith(PREFIX):
                self._tell("remove", mapper)
        with self._changed:
            self._expected.clear()
            self._changed.notify_all()

    def _tell(self, action: str, mapper: str) -> None:
        lost = False
        if action == "remove":
            with self._changed:
                expected = self._expected[mapper] > 0
                self._expected[mapper] -= 1
                if self._expected[mapper] <= 0:
                    del self._expected[mapper]
            lost = not expected and mapper not in self._mappers.values()
            if lost:
                log.error("the device %s has vanished, and not by us", mapper)
        events.publish(events.DeviceEvent(action, mapper, lost))


def _mapper_of(kernel_name: str) -> str | None:
    try:
        return (_SYSFS / kernel_name / "dm/name").read_text().strip() or None
    except OSError:
        return None


def _mappers() -> dict[str, str]:
    found = ((path.name, _mapper_of(path.name)) for path in _SYSFS.glob("dm-*"))
    return {kernel_name: mapper for kernel_name, mapper in found if mapper}


_starting = threading.Lock()


@cache
def _the_watch() -> Watch:
    return Watch()


def watch() -> Watch:
    """The process's one watch, started by the first call."""
    with _starting:
        return _the_watch()
