"""The part `many` of the suite `node`: volumes from one image, all staged, eight at a time, then all unstaged."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from plugin.host import dm, loop, mounts, udev
from plugin.volumes import names
from tests.bench.node import Suite
from tests.bench.result import MIB, Plot, Row, Values
from tests.demo.node import Node

_AT_ONCE = 8
_CAPACITY = 64 * MIB
_LOOKS = 10  # times that the server is looked at on the way
_STAGE = ("format_volume", "unlock_volume", "map", "fsck", "mount")
_UNSTAGE = ("unmount", "unmap")


@dataclass
class _Course:
    """How a run over all volumes went: seconds since its start, server memory and times of steps, by volumes done."""

    node: Node
    server: int
    start: float = field(default_factory=time.perf_counter)
    done: list[float] = field(default_factory=list)
    memory: dict[int, float] = field(default_factory=dict)
    steps: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    _seen: dict[str, tuple[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._seen = self._times()

    def look(self) -> None:
        """Take down the server's memory, and the mean time of each step since the last look."""
        now, count = self._times(), len(self.done)
        for step, (calls, seconds) in now.items():
            before_calls, before = self._seen.get(step, (0, 0.0))
            if calls > before_calls:
                self.steps.setdefault(step, []).append((count, (seconds - before) / (calls - before_calls)))
        self._seen = now
        self.memory[count] = _resident(self.server)

    def _times(self) -> dict[str, tuple[int, float]]:
        return {
            labels.removeprefix("ok "): (count, seconds)
            for name, labels, count, seconds in self.node.timings()
            if name == "ebi_step_duration_seconds" and labels.startswith("ok ")  # result, then step
        }


def measure(suite: Suite) -> None:
    """All of it."""
    count = suite.volumes
    with suite.golden("least") as golden, suite.node.server() as kubelet:
        volumes = [f"pvc-{number}" for number in range(count)]
        for volume in volumes:
            kubelet.create(volume, _CAPACITY, golden.parameters)
        server = suite.node.pid

        def staging(volume: str) -> Path:
            return suite.node.staging / volume

        up = _all(suite.node, server, volumes, lambda volume: kubelet.stage(volume, staging(volume), golden.secret))
        image_devices = sum(1 for _ in dm.every(names.IMAGE))
        down = _all(suite.node, server, volumes, lambda volume: kubelet.unstage(volume, staging(volume)))
        left = _left(suite.store.work)
        for volume in volumes:
            kubelet.delete(volume)
    for what, course in (("stage", up), ("unstage", down)):
        _linear(suite, f"{what} {count} volumes of one image, {_AT_ONCE} at a time", course)
    results = suite.results
    results.add(
        Row(f"dm-crypt devices for the image, {count} volumes staged", "", _one(image_devices), "", None, "1", 1)
    )
    resident = {**up.memory, **{count + done: size for done, size in down.memory.items()}}
    first = resident[min(resident)]
    memory = Row(
        f"server memory with {count} volumes staged", "MiB", _one(up.memory[count]), f"with {min(resident)}",
        _one(first), "at most 1.1 x", 1.1 * first,
    )  # fmt: skip
    results.add(memory)
    results.add(Row("devices, loops and mounts left afterwards", "", _one(left), target="0", limit=0))
    for name, title, course, steps in (
        ("staged", "The steps of staging", up, _STAGE), ("unstaged", "The steps of unstaging", down, _UNSTAGE),
    ):  # fmt: skip
        lines = {step: course.steps[step] for step in steps if step in course.steps}
        results.plots.append(Plot(name, f"{title}, {_AT_ONCE} at a time", f"volumes {name}", "s, mean", lines))


def _all(node: Node, server: int, volumes: Sequence[str], call: Callable[[str], None]) -> _Course:
    course = _Course(node, server)
    alone = threading.Lock()
    every = max(1, len(volumes) // _LOOKS)

    def one(volume: str) -> None:
        call(volume)
        with alone:
            course.done.append(time.perf_counter() - course.start)
            if len(course.done) % every == 0 or len(course.done) == len(volumes):
                course.look()

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(one, volumes))
    return course


def _linear(suite: Suite, what: str, course: _Course) -> None:
    """The second half may not take much longer than the first."""
    half = len(course.done) // 2
    first, second = course.done[half - 1], course.done[2 * half - 1] - course.done[half - 1]
    suite.results.add(
        Row(
            f"{what}: the second half", "s", _one(second), "the first half", _one(first), "at most 1.25 x", 1.25 * first
        )
    )


def _left(work: Path) -> int:
    mapped = len(list(dm.every(udev.PREFIX)))
    mounted = sum(work.resolve() in mount.target.parents for mount in mounts.table())
    return mapped + len(loop.below(work.resolve())) + mounted


def _resident(pid: int) -> float:
    """MiB in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def _one(value: float) -> Values:
    return Values((float(value),))
