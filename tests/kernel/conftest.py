"""Tests on a real kernel: root, device-mapper, loop devices. EBI_TEST_DIR names a directory for their data.

After every test nothing of ours may be left: no mapper, no loop over a file of the tests, no mount.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from plugin.host import dm, loop, mounts, udev
from tests.kernel.world import World


def base_directory() -> Path:
    """Where the tests keep their data."""
    return Path(os.environ["EBI_TEST_DIR"]).resolve()


@pytest.fixture
def home() -> Iterator[Path]:
    """An empty private directory on a filesystem that knows fallocate; afterwards the machine must be as before."""
    directory = base_directory() / f"test-{os.getpid()}-{os.urandom(4).hex()}"
    directory.mkdir(mode=0o700, parents=True)
    yield directory
    left = leftovers()
    sweep()
    shutil.rmtree(directory)
    assert not left, f"left behind: {left}"


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Backing images that all tests share: made once, read only."""
    directory = base_directory() / f"world-{os.getpid()}"
    directory.mkdir(mode=0o700, parents=True)
    yield World(directory)
    shutil.rmtree(directory)


def leftovers() -> list[str]:
    """Mappers of ours, loops over files of the tests, and mounts of either or below their directory."""
    base = base_directory()

    def found() -> list[str]:
        mapped = [f"mapper {mapper.name}" for mapper in dm.every(udev.PREFIX)]
        loops = [f"loop {name} over {path}" for name, path in loop.below(base).items()]
        mounted = [f"mount {mount.target}" for mount in mounts.table() if base in mount.target.parents]
        return mapped + loops + mounted

    # udevd may hold a loop for the instant in which it looks at it; the loop goes when udevd closes it.
    udev.watch().wait_until(lambda: not found(), 5)
    return found()


def sweep() -> None:
    """Take away what a failed test left, so that the next one starts clean."""
    for mount in reversed(mounts.table()):
        if base_directory() in mount.target.parents:
            mounts.unmount(mount.target)
    for _ in range(4):
        for mapper in list(dm.every(udev.PREFIX)):
            if mapper.suspended:
                dm.resume(mapper.name)
            if not mapper.holders:
                dm.remove(mapper.name)
