"""The server is killed at a boundary of each call, starts again, and is asked again: nothing is lost, nothing leaks.

Each cycle kills every call once, each further in than the last cycle did. EBI_KILL_CYCLES sets how many (40 reach every
boundary), EBI_KILL_SEED repeats a run, EBI_KILL_EVERYTHING=1 counts each file that is written, too.
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

CYCLES = int(os.environ.get("EBI_KILL_CYCLES", "3"))
SEED = int(os.environ.get("EBI_KILL_SEED", str(random.SystemRandom().randrange(1 << 32))))
KINDS = EVERYTHING if os.environ.get("EBI_KILL_EVERYTHING") else PROGRAMS
# A stage has about that many more boundaries than other calls.
STEP = 1 if CYCLES > 9 else 3


class Killer:
    """Calls that are killed once, and made again as a new server would."""

    def __init__(self, machine: Machine, number: int) -> None:
        self._machine, self._number = machine, number
        self.killed: set[str] = set()

    def __call__(self, name: str, call: Callable[[], object], *, step: int = 1) -> None:
        """Have `call` killed before its boundary `number` times `step`, recover, and call again."""
        if killed_at(self._number * step, call, KINDS):
            self.killed.add(name)
        self._machine.volumes.recover()
        call()


@pytest.fixture
def machine(home: Path, world: World) -> Machine:
    return Machine(home, world)


def test_no_call_minds_being_killed(machine: Machine, world: World) -> None:
    chance = random.Random(SEED)
    killed: set[str] = set()
    target = machine.home / "vol-target"
    for number in range(CYCLES):
        machine.create("vol", 32 * MIB, world.encrypted)
        call = Killer(machine, number if CYCLES > 9 else number + chance.randrange(2) * (number > 0))
        call("stage", lambda: machine.stage("vol"), step=STEP)
        call("publish", lambda: machine.publish("vol"))
        with (target / "new").open("wb") as file:
            file.write(os.urandom(2 * MIB))
            os.fsync(file.fileno())
        content = tree_hash(target)
        assert content.items() >= world.files.items(), (SEED, number)
        call("controller expand", lambda: machine.volumes.expand("vol", 48 * MIB))
        call("node expand", lambda: machine.volumes.node_expand("vol", target, 48 * MIB))
        assert blockdev.size(dm.path("ebi-vol-vol")) == 48 * MIB
        with dm.path("ebi-vol-vol").open("rb") as device:  # to its very end, which the base must have reached, too
            device.seek(47 * MIB)
            assert len(device.read()) == MIB
        assert tree_hash(target) == content, (SEED, number)
        assert not machine.volumes.stats("vol", target).condition.abnormal
        call("unpublish", lambda: machine.unpublish("vol"))
        call("unstage", lambda: machine.unstage("vol"))
        assert leftovers() == [], (SEED, number)
        call("stage again", lambda: machine.stage("vol"), step=STEP)
        assert tree_hash(machine.staging / "vol") == content, (SEED, number)
        machine.unstage("vol")
        call("delete", lambda: machine.volumes.delete("vol"))
        assert leftovers() == [], (SEED, number)
        assert not any((machine.home / "volumes").iterdir())
        killed |= call.killed
    assert {"stage", "node expand", "unstage", "stage again"} <= killed, "the kills came too late"
