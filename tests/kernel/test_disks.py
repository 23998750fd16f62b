"""Disks that fail, lose their power, or are full, under images and volumes."""

import os
import shutil
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

from plugin.errors import EbiError, Kind
from plugin.host import loop, mounts
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import Volumes
from tests.kernel.disk import Disk, disk, dmsetup, replay, unmount
from tests.kernel.world import MIB, Machine, World, tree_hash

SIZE = 256 * MIB
NAME = "golden-encrypted"


def forget() -> None:
    """Have the next reads ask the disk."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def write(path: Path, size: int = MIB) -> bytes:
    """A new file with random content, synced."""
    content = os.urandom(size)
    with path.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    return content


def on(place: Path, home: Path) -> Machine:
    """A node whose images and volumes are on the disk that is mounted at `place`; it mounts below `home`."""
    images = Images(place / "images", Settings())
    images.recover()
    machine = Machine(home, SimpleNamespace(images=images, encrypted=images.get(NAME)))  # type: ignore[arg-type]
    machine.volumes = Volumes(place / "volumes", images, machine.settings)
    machine.volumes.recover()
    return machine


def copied(world: World, place: Disk, home: Path) -> Machine:
    """The same with a copy of the world's image, which is another one."""
    directory = place.path / "images" / NAME
    shutil.copytree(world.encrypted.directory, directory)
    record = directory / "record.json"
    record.write_text(record.read_text().replace(world.encrypted.uuid, str(uuid.uuid4())))
    os.sync()  # as one that was made here would be
    return on(place.path, home)


class TestBadSectors:
    def test_are_told_to_those_concerned_only_and_healing_and_a_restage_is_enough(
        self, home: Path, world: World
    ) -> None:
        (home / "good").mkdir()
        other = Machine(home / "good", world)
        other.create("other", 32 * MIB, world.encrypted)
        with disk(home, "broken", SIZE) as broken:
            machine = copied(world, broken, home)
            volume = machine.create("vol", 32 * MIB, machine.world.encrypted)
            machine.stage("vol")
            target = machine.publish("vol")
            kept = write(target / "kept")
            with other.used("other") as fine:
                forget()
                broken.fail(machine.world.encrypted.path)
                with pytest.raises(OSError):
                    tree_hash(target)
                condition = machine.volumes.stats("vol", target).condition
                assert condition.abnormal
                assert (
                    "the file of backing image golden-encrypted can't be read: Input/output error" in condition.message
                )
                assert tree_hash(fine).items() >= world.files.items()
                broken.heal()
                assert tree_hash(target).items() >= world.files.items(), "the image comes back by itself"

                forget()
                broken.fail(volume.path)
                with pytest.raises(OSError):
                    write(target / "lost", 4 * MIB)
                    forget()
                    (target / "kept").read_bytes()
                condition = machine.volumes.stats("vol", target).condition
                assert condition.abnormal
                assert "the file of encrypted volume vol can't be read: Input/output error" in condition.message
                write(fine / "new")
                assert not other.volumes.stats("other", fine).condition.abnormal
                broken.heal()
            machine.unpublish("vol")
            machine.unstage("vol")
            with machine.used("vol") as again:
                assert not machine.volumes.stats("vol", again).condition.abnormal
                assert (again / "kept").read_bytes() == kept
                assert tree_hash(again).items() >= world.files.items()


class TestPowerCut:
    def test_no_synced_file_is_lost(self, home: Path, world: World) -> None:
        written: dict[str, bytes] = {}
        with disk(home, "power", SIZE, log=True) as power:
            machine = copied(world, power, home)
            machine.create("vol", 32 * MIB, machine.world.encrypted)
            dmsetup("message", "power", "0", "mark", "made")
            machine.stage("vol")
            target = machine.publish("vol")
            for number in range(12):
                (target / f"unsynced{number}").write_bytes(os.urandom(200_000))
                written[f"file{number}"] = write(target / f"file{number}", 300_000)
                dmsetup("message", "power", "0", "mark", f"file{number}")
            machine.unpublish("vol")
            machine.unstage("vol")
        for number in (0, 7, 11):
            after = home / "after"
            with after.open("wb") as file:
                file.truncate(SIZE)
            replay(home / "power.log", after, f"file{number}")
            (home / "seen").mkdir()
            with loop.attached(after) as device:
                mounts.mount(device, home / "seen", "ext4")
            with on(home / "seen", home).used("vol") as target:
                found = tree_hash(target)
                assert found.items() >= world.files.items()
                for name in [f"file{earlier}" for earlier in range(number + 1)]:
                    assert (target / name).read_bytes() == written[name], (name, number)
            unmount(home / "seen")
            (home / "seen").rmdir()


class TestFullDisk:
    def test_staged_volumes_go_on_and_new_ones_are_refused(self, home: Path, world: World) -> None:
        with disk(home, "full", SIZE) as full:
            machine = copied(world, full, home)
            machine.create("vol", 64 * MIB, machine.world.encrypted)
            machine.stage("vol")
            target = machine.publish("vol")
            with (full.path / "others").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
                while file.write(os.urandom(MIB)):
                    os.fsync(file.fileno())
            space = os.statvfs(full.path)
            assert space.f_bavail * space.f_bsize < MIB
            content = write(target / "new", 24 * MIB)
            forget()
            assert (target / "new").read_bytes() == content
            assert tree_hash(target).items() >= world.files.items()
            assert not machine.volumes.stats("vol", target).condition.abnormal
            for refused in (
                lambda: machine.create("another", 32 * MIB, machine.world.encrypted),
                lambda: machine.volumes.expand("vol", 128 * MIB),
            ):
                with pytest.raises(EbiError, check=lambda error: error.kind is Kind.EXHAUSTED):
                    refused()
            assert machine.volumes.get("vol").capacity == 64 * MIB
            machine.unpublish("vol")
            machine.unstage("vol")
            with machine.used("vol") as again:
                assert (again / "new").read_bytes() == content
