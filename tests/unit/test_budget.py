"""Key derivations share the memory: nobody waits for ever, and together they never take more than there is."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from plugin import events
from plugin.host.budget import Budget, default_limit

MIB, GIB = 1 << 20, 1 << 30
LONG = 10.0  # seconds; by then whatever is to happen has


class Holder(threading.Thread):
    """Holds `amount` of a budget from when it may until it is told to leave."""

    def __init__(self, budget: Budget, amount: int) -> None:
        super().__init__(daemon=True)
        self._budget = budget
        self._amount = amount
        self._leave = threading.Event()
        self.entered = threading.Event()
        self.start()

    def run(self) -> None:
        with self._budget.hold(self._amount):
            self.entered.set()
            assert self._leave.wait(LONG)

    def leave(self) -> None:
        self._leave.set()
        self.join(LONG)
        assert not self.is_alive()


def waiting(budget: Budget, count: int) -> None:
    """Return when `count` threads stand in the queue."""
    end = time.monotonic() + LONG
    while len(budget._queue) != count:
        assert time.monotonic() < end
        time.sleep(0.001)


@contextmanager
def recorded() -> Iterator[list[events.Step]]:
    steps: list[events.Step] = []
    unsubscribe = events.subscribe(lambda event: steps.append(event) if isinstance(event, events.Step) else None)
    try:
        yield steps
    finally:
        unsubscribe()


class TestHold:
    def test_fifty_at_once_all_come_through_and_never_take_more_than_the_limit(self) -> None:
        budget, lock = Budget(3 * GIB // 2), threading.Lock()
        held, most, done = 0, 0, 0

        def unlock() -> None:
            nonlocal held, most, done
            with budget.hold(GIB // 2):
                with lock:
                    held += GIB // 2
                    most = max(most, held)
                time.sleep(0.002)
                with lock:
                    held -= GIB // 2
                    done += 1

        threads = [threading.Thread(target=unlock) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
        assert (done, held) == (50, 0)
        assert most == 3 * GIB // 2, "three fit, so three ran together"

    def test_small_ones_that_come_later_do_not_overtake_a_large_one(self) -> None:
        budget = Budget(100)
        first = Holder(budget, 60)
        assert first.entered.wait(LONG)
        large = Holder(budget, 80)
        waiting(budget, 1)
        small = Holder(budget, 10)  # would fit beside the first
        waiting(budget, 2)
        assert not small.entered.is_set()
        first.leave()
        assert large.entered.wait(LONG)
        assert small.entered.wait(LONG)
        large.leave()
        small.leave()

    def test_more_than_the_whole_budget_runs_alone(self) -> None:
        budget = Budget(100)
        small = Holder(budget, 1)
        assert small.entered.wait(LONG)
        huge = Holder(budget, 1000)
        waiting(budget, 1)
        assert not huge.entered.is_set()
        small.leave()
        assert huge.entered.wait(LONG)
        after = Holder(budget, 1)
        waiting(budget, 1)
        assert not after.entered.is_set()
        huge.leave()
        assert after.entered.wait(LONG)
        after.leave()

    def test_nothing_waits_for_nobody(self) -> None:
        budget = Budget(100)
        full = Holder(budget, 100)
        assert full.entered.wait(LONG)
        with recorded() as steps, budget.hold(0):  # pbkdf2 needs no memory
            pass
        assert steps == []
        full.leave()

    def test_a_failure_gives_its_share_back(self) -> None:
        budget = Budget(100)
        for _ in range(3):
            with pytest.raises(ValueError, match="cryptsetup"), budget.hold(100):
                raise ValueError("cryptsetup")
        last = Holder(budget, 100)
        assert last.entered.wait(LONG)
        last.leave()

    def test_the_wait_is_told_as_a_step(self) -> None:
        budget = Budget(100)
        first = Holder(budget, 100)
        assert first.entered.wait(LONG)
        with recorded() as steps:
            second = Holder(budget, 100)
            waiting(budget, 1)
            time.sleep(0.05)
            assert steps == []
            first.leave()
            assert second.entered.wait(LONG)
            second.leave()
        (step,) = steps
        assert (step.name, step.ok) == ("unlock_wait", True)
        assert 0.05 <= step.seconds < LONG


class TestDefaultLimit:
    def machine(self, root: Path, cgroup: str, files: dict[str, str], available_kib: int = 8 << 20) -> Path:
        """The parts of proc and sys that say how much memory there is."""
        texts = {"proc/self/cgroup": cgroup, "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:    {available_kib} kB\n"}
        for name, text in {**texts, **files}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return root

    def test_is_half_of_what_the_container_may_have(self, tmp_path: Path) -> None:
        root = self.machine(tmp_path, "0::/\n", {"sys/fs/cgroup/memory.max": f"{3 * GIB}\n"})
        assert default_limit(root) == 3 * GIB // 2

    def test_a_limit_above_the_own_cgroup_binds_too(self, tmp_path: Path) -> None:
        top = "sys/fs/cgroup/kubepods.slice"
        files = {f"{top}/pod.slice/ebi.scope/memory.max": "max\n", f"{top}/memory.max": f"{GIB}\n"}
        root = self.machine(tmp_path, "0::/kubepods.slice/pod.slice/ebi.scope\n", files)
        assert default_limit(root) == GIB // 2

    def test_version_1_counts(self, tmp_path: Path) -> None:
        cgroup = "5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n"
        own = "sys/fs/cgroup/memory/memory.limit_in_bytes"  # all that a container sees of /docker/abc
        assert default_limit(self.machine(tmp_path, cgroup, {own: f"{2 * GIB}\n"})) == GIB

    def test_without_a_limit_it_is_half_of_what_the_machine_has_to_spare(self, tmp_path: Path) -> None:
        unlimited = {
            "sys/fs/cgroup/memory.max": "max\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        }
        root = self.machine(tmp_path, "4:memory:/\n0::/\n", unlimited, available_kib=10 << 10)
        assert default_limit(root) == 5 * MIB

    def test_of_this_machine_is_something(self) -> None:
        assert default_limit() > MIB
