"""The memory that key derivations may take together.

Argon2 is made to need memory: fifty volumes that unlock at once would run a container out of it. So each holds what it
needs while it derives, and waits its turn, first come first served, while others hold too much.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from plugin import events

# The files that hold a cgroup's limit, by the controllers that /proc/self/cgroup names (v2 names none) and the places
# that systemd gives the hierarchies: cgroups(7), Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
_HIERARCHIES = (("", "sys/fs/cgroup", "memory.max"), ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes"))


class Budget:
    """`limit` bytes, shared by the threads of one process. It may be set anew while nothing is held."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = 0
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Hold `amount` bytes while the block runs, after waiting for those who came first; 0 waits for nobody.

        More than the whole budget takes all of it, and so runs alone. The wait is the step `unlock_wait` of
        `plugin.events`. The block must not hold again: it could wait for itself.
        """
        if not amount:
            yield
            return
        share = min(amount, self.limit)
        with events.step("unlock_wait"):
            self._take(share)
        try:
            yield
        finally:
            self._give_back(share)

    def _take(self, share: int) -> None:
        turn = object()
        with self._changed:
            self._queue.append(turn)
            try:
                self._changed.wait_for(lambda: self._queue[0] is turn and self._held + share <= self.limit)
                self._held += share
            finally:  # also where a signal ends the wait
                self._queue.remove(turn)
                self._changed.notify_all()

    def _give_back(self, share: int) -> None:
        with self._changed:
            self._held -= share
            self._changed.notify_all()


_starting = threading.Lock()


@cache
def _the_budget() -> Budget:
    return Budget(default_limit())


def shared() -> Budget:
    """This process's one budget, of `default_limit()` unless a face sets its `limit` at the start."""
    with _starting:
        return _the_budget()


def default_limit(root: Path = Path("/")) -> int:
    """Bytes: half of what this process may have, by its cgroups' limits and what the machine has to spare.

    `root` is where `proc` and `sys` are found.
    """
    return min([_available(root), *_cgroup_limits(root)]) // 2


def _available(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10  # it says kB, and means KiB: proc(5)
    raise AssertionError("the kernel has said MemAvailable since 3.14")


def _cgroup_limits(root: Path) -> Iterator[int]:
    """The limits of this process's cgroup and of all above it; each of them binds."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller, mounted, file in _HIERARCHIES:
            if controller not in controllers.split(","):
                continue
            # In a container the path may be the host's, and only the mount's own top be there to be read.
            cgroup = Path(path.lstrip("/"))
            for level in (cgroup, *cgroup.parents):
                try:
                    text = (root / mounted / level / file).read_text().strip()
                except OSError:
                    continue
                if text != "max":
                    yield int(text)
