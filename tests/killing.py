"""An operation in a child process that kills itself at a chosen boundary, before what changes something.

That is where a program is started, a file written, renamed, removed or synced, a device asked, something mounted. It
dies by SIGKILL: nothing gets the chance to clean up.
"""

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from plugin.host import budget, mounts, udev

# sys.addaudithook(3) tells of these before they happen.
PROGRAMS = frozenset({"subprocess.Popen"})
EVERYTHING = PROGRAMS | {
    "fcntl.ioctl", "open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree",
}  # fmt: skip


def child(action: Callable[[], object]) -> int:
    """Run `action` in a child process, which is what a new server would be; returns its wait status."""
    with warnings.catch_warnings():  # of a fork in a process with threads: the child needs none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        status = 1
        try:
            udev._the_watch.cache_clear()  # its thread stayed with our parent
            budget._the_budget.cache_clear()
            action()
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        os._exit(status)
    return os.waitpid(pid, 0)[1]


def killed_at(number: int, action: Callable[[], object], kinds: frozenset[str] = EVERYTHING) -> bool:
    """Run `action` in a child that is killed before its boundary `number` (from 0); False if it came to its end."""

    def run() -> None:
        _arm(number, kinds)
        action()

    status = child(run)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert status == 0, "the operation failed"
    return False


def _arm(number: int, kinds: frozenset[str]) -> None:
    left, thread = number, threading.get_ident()

    def boundary() -> None:
        nonlocal left
        if threading.get_ident() != thread:
            return
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        # A file that is only read is no boundary.
        if event in kinds and not (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            boundary()

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            boundary()
            return function(*arguments)

        return call

    sys.addaudithook(hear)
    # What the interpreter tells nobody of.
    mounts._call = before(mounts._call)  # type: ignore[assignment]
    unmount = mounts._LIBC.umount2
    mounts._LIBC.umount2 = before(unmount)
    if kinds is EVERYTHING:
        os.fsync = before(os.fsync)
        os.pwrite = before(os.pwrite)
        os.posix_fallocate = before(os.posix_fallocate)
