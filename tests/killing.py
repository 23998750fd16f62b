"""An operation in a child process that kills itself at a chosen boundary, before what changes something.

That is where a program is started, a file written, renamed, removed or synced, a device asked, something mounted, work
given to the workers or taken from them. It dies by SIGKILL: nothing gets the chance to clean up.
"""

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plugin.host import budget, mounts, udev
from plugin.images import engine

# sys.addaudithook(3) tells of these before they happen.
PROGRAMS = frozenset({"subprocess.Popen"})
# Of these it does not.
WRITES = frozenset({"os.copy_file_range", "os.fsync", "os.posix_fallocate", "os.pwrite"})
EVERYTHING = PROGRAMS | WRITES | {
    "fcntl.ioctl", "open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree",
}  # fmt: skip


def child(action: Callable[[], object]) -> int:
    """Run `action` in a child process, which is what a new server would be; returns its wait status.

    No process of it is left then: a service manager, too, sees to that before it starts a server again.
    """
    with warnings.catch_warnings():  # of a fork in a process with threads: the child needs none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        status = 1
        try:
            udev._the_watch.cache_clear()  # its thread stayed with our parent
            budget._the_budget.cache_clear()
            os.setsid()  # so that what it leaves can be told
            action()
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        os._exit(status)
    status = os.waitpid(pid, 0)[1]
    wait_for_session(pid)
    return status


def wait_for_session(session: int) -> None:
    """Return when no process of `session` lives any more, which must be in a moment."""
    deadline = time.monotonic() + 10
    while left := _members(session):
        assert time.monotonic() < deadline, f"processes {left} outlive their parent"
        time.sleep(0.005)


def _members(session: int) -> list[str]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


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
    left = number

    def boundary() -> None:  # in whatever thread: a header is made beside the payload
        nonlocal left
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
    for name in kinds & WRITES:
        function = name.removeprefix("os.")
        setattr(os, function, before(getattr(os, function)))
    engine.Team.give = before(engine.Team.give)  # type: ignore[method-assign]
    engine.Team.take = before(engine.Team.take)  # type: ignore[method-assign]
