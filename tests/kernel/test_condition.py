"""A volume that is not well says so in words; each of the things that can be wrong is made to happen."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from plugin.host import dm, loop, mounts
from tests.kernel.world import MIB, Machine, World, file_hash, tree_hash


@pytest.fixture
def machine(home: Path, world: World) -> Machine:
    return Machine(home, world)


def condition(machine: Machine, target: Path, volume: str = "vol") -> str:
    """What is wrong; empty for a healthy volume."""
    found = machine.volumes.stats(volume, target).condition
    return found.message if found.abnormal else ""


def dmsetup(*arguments: str, table: str = "") -> str:
    return subprocess.run(["dmsetup", *arguments], input=table, capture_output=True, text=True, check=True).stdout


@contextmanager
def broken(name: str) -> Iterator[None]:
    """Have the mapper `name` fail all I/O within the block."""
    table = dmsetup("table", "--showkeys", name)
    with held(name):
        replace(name, f"0 {table.split()[1]} error\n")
        yield
        replace(name, table)


@contextmanager
def held(name: str) -> Iterator[None]:
    """The loop devices under the mapper `name` outlive its table."""
    mapper = dm.find(name)
    assert mapper is not None
    with ExitStack() as stack:
        for slave in mapper.slaves:
            stack.enter_context(Path("/dev", slave).open("rb"))
        yield


def replace(name: str, table: str) -> None:
    readonly = ["--readonly"] if name.startswith("ebi-img-") else []
    dmsetup("suspend", "--nolockfs", name)
    dmsetup("load", name, *readonly, table=table)
    dmsetup("resume", name)


def test_missing_files_of_volume_and_image(machine: Machine, world: World) -> None:
    volume = machine.create("vol", 32 * MIB, world.encrypted)
    with machine.used("vol") as target:
        for path in (volume.path, world.encrypted.path):
            hidden = path.rename(path.with_name("hidden"))
            words = condition(machine, target)
            hidden.rename(path)
            assert f"is missing: {path}" in words
            assert "has the wrong device under it" in words
        assert condition(machine, target) == ""


def test_image_device_over_nothing_suspended_or_wrong(machine: Machine, world: World) -> None:
    machine.create("vol", 32 * MIB, world.encrypted)
    image = f"ebi-img-{world.encrypted.uuid}"
    with machine.used("vol", block=True) as target:
        with broken(image):
            assert condition(machine, target) == f"the device {image} has nothing under it"
            dm.suspend(image)
            assert f"the device {image} is suspended" in condition(machine, target)
        assert condition(machine, target) == ""
        table = dmsetup("table", "--showkeys", image)
        other = machine.home / "other"
        other.write_bytes(bytes(MIB))
        with held(image), loop.attached(other) as device:
            words = table.split()
            words[6] = subprocess.check_output(["lsblk", "-ndo", "MAJ:MIN", device], text=True).strip()
            replace(image, f"0 8 {' '.join(words[2:7])} 0\n")
            assert f"the device {image} has the wrong device under it" in condition(machine, target)
            replace(image, table)
        assert condition(machine, target) == ""


def test_a_lost_store_is_told_and_a_restage_has_all_that_was_written(machine: Machine, world: World) -> None:
    machine.create("vol", 32 * MIB, world.encrypted)
    with machine.used("vol", block=True) as target:
        with target.open("r+b", buffering=0) as device:
            device.write(os.urandom(3 * MIB))
            os.fsync(device.fileno())
        written = file_hash(target)
        with broken("ebi-cow-vol"):
            with target.open("r+b", buffering=0) as device, pytest.raises(OSError):
                device.seek(20 * MIB)
                device.write(os.urandom(MIB))
                os.fsync(device.fileno())
            assert "the store of ebi-vol-vol is invalid" in condition(machine, target)
            assert "the device ebi-cow-vol has nothing under it" in condition(machine, target)
        assert condition(machine, target) == "the store of ebi-vol-vol is invalid"
        # What the kernel writes where only some sectors fail: dm-snapshot has given the store up for good.
        with Path("/dev/mapper/ebi-cow-vol").open("r+b", buffering=0) as store:
            store.seek(4)
            store.write(bytes(4))
            os.fsync(store.fileno())
    with machine.used("vol", block=True) as target:
        assert condition(machine, target) == ""
        assert file_hash(target) == written


def test_a_filesystem_that_has_met_errors(machine: Machine, world: World) -> None:
    machine.create("vol", 32 * MIB, world.encrypted)
    with machine.used("vol") as target:
        assert condition(machine, target) == ""
        mapper = dm.find("ebi-vol-vol")
        assert mapper is not None
        Path("/sys/fs/ext4", mapper.kernel_name, "trigger_fs_error").write_text("a test")
        assert "the filesystem has met errors since it was checked" in condition(machine, target)
    with machine.used("vol") as target:  # which checks it
        assert condition(machine, target) == ""
        assert tree_hash(target).items() >= world.files.items()


def test_a_filesystem_that_went_read_only(machine: Machine) -> None:
    machine.create("vol", 32 * MIB)
    with machine.used("vol") as target:
        # What older kernels do at an error, if asked for (errors=remount-ro): the filesystem is, its mounts are not.
        subprocess.run(["mount", "-o", "remount,ro", machine.staging / "vol"], check=True)
        assert condition(machine, target) == "the filesystem went read-only"
    with machine.used("vol") as target:
        assert condition(machine, target) == ""


def test_a_filesystem_that_has_shut_down(machine: Machine) -> None:
    machine.create("vol", 320 * MIB)
    with machine.used("vol", fs_type="xfs") as target:
        subprocess.run(["xfs_io", "-x", "-c", "shutdown", target], check=True)
        assert "the filesystem does not answer: Input/output error" in condition(machine, target)
    with machine.used("vol", fs_type="xfs") as target:
        assert condition(machine, target) == ""
    assert mounts.at(target) is None
