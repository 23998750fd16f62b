"""The server is killed at a boundary of each call, starts again, and is asked again: nothing is lost, nothing leaks.

Each cycle kills every call once, further in than the last cycle did, until no call has a boundary left, or that of the
number EBI_KILL_BOUNDARIES (default 18) is reached. Every second boundary has its turn, by chance the even or the odd
ones; with EBI_KILL_STEP=1 all have. Calls that are about files are killed before each change of one; the others
before each program that they start and each mount, or with EBI_KILL_EVERYTHING=1 before each change of a file, too.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from plugin.host import blockdev, dm
from tests.kernel.conftest import leftovers
from tests.kernel.world import MIB, Machine, World, tree_hash
from tests.killing import EVERYTHING, PROGRAMS, killed_at

BOUNDARIES = int(os.environ.get("EBI_KILL_BOUNDARIES", "18"))
STEP = int(os.environ.get("EBI_KILL_STEP", "2"))
# In calls that start programs.
KINDS = EVERYTHING if os.environ.get("EBI_KILL_EVERYTHING") else PROGRAMS
CALLS = {
    "create", "stage", "publish", "controller expand", "node expand", "unpublish", "unstage", "stage again", "delete",
}  # fmt: skip


class Killer:
    """Calls that are killed once, before their boundary `number`, and made again as a new server would."""

    def __init__(self, machine: Machine, number: int) -> None:
        self._machine, self._number = machine, number
        self.killed: set[str] = set()

    def __call__(self, name: str, call: Callable[[], object], kinds: frozenset[str] = EVERYTHING) -> None:
        """Have `call` killed, recover, and call again."""
        if killed_at(self._number, call, kinds):
            self.killed.add(name)
        self._machine.volumes.recover()
        call()


@pytest.fixture
def machine(home: Path, world: World) -> Machine:
    return Machine(home, world)


def test_no_call_minds_being_killed(machine: Machine, world: World) -> None:
    for number in range(random.randrange(STEP), BOUNDARIES, STEP):
        killed = cycle(machine, world, number)
        assert number or killed == CALLS
        if not killed:
            break


def cycle(machine: Machine, world: World, number: int) -> set[str]:
    """A volume's life, each call of it killed before its boundary `number`; returns which had so many."""
    image, target = world.encrypted, machine.home / "vol-target"
    call = Killer(machine, number)
    call("create", lambda: machine.create("vol", 32 * MIB, image))
    assert [volume.id for volume in machine.volumes.list()] == ["vol"]
    call("stage", lambda: machine.stage("vol"), KINDS)
    call("publish", lambda: machine.publish("vol"))
    with (target / "new").open("wb") as file:
        file.write(os.urandom(2 * MIB))
        os.fsync(file.fileno())
    content = tree_hash(target)
    assert content.items() >= world.files.items(), number
    call("controller expand", lambda: machine.volumes.expand("vol", 48 * MIB))
    call("node expand", lambda: machine.volumes.node_expand("vol", target, 48 * MIB), KINDS)
    assert blockdev.size(dm.path("ebi-vol-vol")) == 48 * MIB
    with dm.path("ebi-vol-vol").open("rb") as device:  # to its very end, which the base must have reached, too
        device.seek(47 * MIB)
        assert len(device.read()) == MIB
    assert tree_hash(target) == content, number
    assert not machine.volumes.stats("vol", target).condition.abnormal
    call("unpublish", lambda: machine.unpublish("vol"))
    call("unstage", lambda: machine.unstage("vol"), KINDS)
    assert leftovers() == [], number
    call("stage again", lambda: machine.stage("vol"), KINDS)
    assert tree_hash(machine.staging / "vol") == content, number
    machine.unstage("vol")
    call("delete", lambda: machine.volumes.delete("vol"))
    assert leftovers() == [], number
    assert not any((machine.home / "volumes").iterdir()), number
    return call.killed
