"""Tests on a real kernel: root, device-mapper, loop devices. EBI_TEST_DIR names a directory for their data.

After every test nothing of ours may be left: no mapper, no loop over a file of the test, no mount.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from plugin.host import dm, loop, mounts, udev


@pytest.fixture
def home() -> Iterator[Path]:
    """An empty private directory on a filesystem that knows fallocate; afterwards the machine must be as before."""
    base = Path(os.environ["EBI_TEST_DIR"]).resolve()
    directory = base / f"test-{os.getpid()}-{os.urandom(4).hex()}"
    directory.mkdir(mode=0o700, parents=True)
    yield directory
    left = leftovers(directory)
    sweep(directory)
    shutil.rmtree(directory)
    assert not left, f"left behind: {left}"


def leftovers(directory: Path) -> list[str]:
    """Mappers of ours, loops over files below `directory`, and mounts of either or below it."""

    def found() -> list[str]:
        mapped = [f"mapper {mapper.name}" for mapper in dm.every(udev.PREFIX)]
        loops = [f"loop {name} over {path}" for name, path in loop.below(directory).items()]
        mounted = [f"mount {mount.target}" for mount in mounts.table() if mount.target.is_relative_to(directory)]
        return mapped + loops + mounted

    # udevd may hold a loop for the instant in which it looks at it; the loop goes when udevd closes it.
    udev.watch().wait_until(lambda: not found(), 5)
    return found()


def sweep(directory: Path) -> None:
    """Take away what a failed test left, so that the next one starts clean."""
    for mount in reversed(mounts.table()):
        if mount.target.is_relative_to(directory):
            mounts.unmount(mount.target)
    for _ in range(4):
        for mapper in list(dm.every(udev.PREFIX)):
            if not mapper.holders:
                dm.remove(mapper.name)
