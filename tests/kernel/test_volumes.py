"""Volumes as an orchestrator uses them, on a real kernel."""

import os
import subprocess
import threading
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from plugin.errors import EbiError, Kind
from plugin.host import blockdev, dm, loop, mounts
from plugin.luks import header
from plugin.settings import Settings
from plugin.volumes import AccessMode, Capability
from plugin.volumes.record import Records
from tests.kernel.world import CBC, MIB, SECRET, WRONG, Machine, World, file_hash, steps, tree_hash


@pytest.fixture
def machine(home: Path, world: World) -> Machine:
    return Machine(home, world)


def failure(kind: Kind, match: str = "") -> AbstractContextManager[object]:
    """The block fails with an EbiError of this kind, whose words match."""
    return pytest.raises(EbiError, match=match or None, check=lambda error: error.kind is kind)


def filled(device: Path) -> str:
    """Write all of `device`; returns the hash of what it shows then."""
    with device.open("r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        for at in range(0, size, MIB):
            file.write(os.urandom(min(MIB, size - at)))
        os.fsync(file.fileno())
    return file_hash(device)


class TestVolumeFromAnImage:
    @pytest.mark.parametrize("sort", ["encrypted", "plain"])
    def test_starts_with_the_image_and_keeps_what_is_written(self, machine: Machine, world: World, sort: str) -> None:
        image = getattr(world, sort)
        before = file_hash(image.path)
        machine.create("vol", 48 * MIB, image)
        with machine.used("vol") as target:
            found = tree_hash(target)
            assert {name: found[name] for name in world.files} == world.files
            (target / "new").write_bytes(os.urandom(10 * MIB))
            (target / "deep" / "file7").write_text("changed")
            written = tree_hash(target)
        with machine.used("vol") as target:
            assert tree_hash(target) == written
        assert file_hash(image.path) == before
        machine.volumes.delete("vol")

    def test_cipher_and_key_size_of_the_secret_are_the_volumes_too(self, machine: Machine, world: World) -> None:
        volume = machine.create("vol", 48 * MIB, world.cbc)
        for _ in range(2):
            staging = machine.stage("vol", CBC)
            assert tree_hash(staging) == world.files
            machine.unstage("vol")
        for path in (volume.path, world.cbc.path):
            found = header.read(path)
            assert (found.cipher, found.key_size) == ("aes-cbc-essiv:sha256", 256)

    def test_takes_all_of_its_size_at_the_first_stage(self, machine: Machine, world: World) -> None:
        machine.create("vol", 256 * MIB, world.encrypted)
        with machine.used("vol") as target:
            assert machine.volumes.stats("vol", target).total_bytes > 200 * MIB
            assert blockdev.size(dm.path("ebi-vol-vol")) == 256 * MIB

    def test_written_whole_does_not_overflow(self, machine: Machine, world: World) -> None:
        machine.create("vol", 40 * MIB + 4096, world.encrypted)
        with machine.used("vol", block=True) as target:
            written = filled(target)
        with machine.used("vol", block=True) as target:
            assert file_hash(target) == written
            assert not machine.volumes.stats("vol", target).condition.abnormal

    def test_raw_device_shows_the_image(self, machine: Machine, world: World) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        with machine.used("vol", block=True) as target:
            assert target.read_bytes()[: 24 * MIB] == world.plain.path.read_bytes()

    def test_what_lies_behind_the_image_is_written_as_it_is(self, machine: Machine, world: World) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        edge = 24 * MIB
        with machine.used("vol", block=True) as target:
            before = dm.status("ebi-vol-vol").splitlines()[0]
            with target.open("r+b", buffering=0) as device:
                for at in (edge, 32 * MIB - 4096):
                    device.seek(at)
                    device.write(os.urandom(4096))
                os.fsync(device.fileno())
                assert dm.status("ebi-vol-vol").splitlines()[0] == before
                device.seek(edge - 4096)
                device.write(os.urandom(8192))  # across the edge
                os.fsync(device.fileno())
            assert dm.status("ebi-vol-vol").splitlines()[0] != before
            written = file_hash(target)
        with machine.used("vol", block=True) as target:
            assert file_hash(target) == written

    def test_of_old_which_its_image_covers_whole_is_used_and_grown(self, machine: Machine, world: World) -> None:
        made = machine.create("vol", 32 * MIB, world.encrypted)
        old = replace(made, covered=made.capacity)
        old.reserve()
        Records(made.directory.parent).save(old)
        with machine.used("vol", block=True) as target:
            machine.volumes.expand("vol", 40 * MIB)
            machine.volumes.node_expand("vol", target, 40 * MIB)
            written = filled(target)
        with machine.used("vol", block=True) as target:
            assert file_hash(target) == written

    def test_two_share_the_image_and_derive_its_key_once(self, machine: Machine, world: World) -> None:
        for name in ("one", "two"):
            machine.create(name, 32 * MIB, world.encrypted)
            machine.stage(name)
            machine.unstage(name)
        with steps() as made:
            machine.stage("one")
            machine.stage("two")
        assert made.count("unlock_image") == 1
        assert made.count("unlock_volume") == 2
        assert [mapper.name for mapper in dm.every("ebi-img-")] == [f"ebi-img-{world.encrypted.uuid}"]
        machine.unstage("one")
        assert dm.find(f"ebi-img-{world.encrypted.uuid}") is not None
        assert tree_hash(machine.staging / "two").items() >= world.files.items()
        machine.unstage("two")

    def test_a_new_one_on_an_open_image_derives_one_key(self, machine: Machine, world: World) -> None:
        machine.create("one", 32 * MIB, world.encrypted)
        machine.create("two", 32 * MIB, world.encrypted)
        machine.stage("one")
        with steps() as made:
            machine.stage("two")
        assert "unlock_image" not in made
        assert made.count("format_volume") == 1
        machine.unstage("one")
        machine.unstage("two")


class TestWrongPassphrase:
    def test_does_not_open_the_image(self, machine: Machine, world: World) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        with failure(Kind.INVALID, "the passphrase does not open backing image golden-encrypted"):
            machine.stage("vol", WRONG)
        assert not list(dm.every("ebi-"))

    def test_does_not_open_the_volume(self, machine: Machine) -> None:
        machine.create("vol", 32 * MIB, encrypted="true")
        machine.stage("vol")
        machine.unstage("vol")
        with failure(Kind.INVALID, "the passphrase does not open encrypted volume vol"):
            machine.stage("vol", WRONG)
        assert not list(dm.every("ebi-"))

    def test_does_not_format_a_new_volume_on_an_open_image(self, machine: Machine, world: World) -> None:
        machine.create("one", 32 * MIB, world.encrypted)
        machine.create("two", 32 * MIB, world.encrypted)
        machine.stage("one")
        with failure(Kind.INVALID, "the passphrase does not open backing image golden-encrypted"):
            machine.stage("two", WRONG)
        assert not machine.volumes.get("two").formatted
        machine.stage("two")
        machine.unstage("two")
        machine.unstage("one")

    def test_absent_is_told(self, machine: Machine) -> None:
        machine.create("vol", 32 * MIB, encrypted="true")
        with failure(Kind.INVALID, "missing passphrase for encrypted volume vol"):
            machine.stage("vol", {})


class TestBlankVolume:
    @pytest.mark.parametrize("encrypted", ["true", "false"])
    @pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
    def test_is_formatted_once(self, machine: Machine, encrypted: str, fs_type: str) -> None:
        machine.create("vol", 320 * MIB, encrypted=encrypted)
        with steps() as made, machine.used("vol", fs_type=fs_type) as target:
            (target / "file").write_text("kept")
        assert made.count("mkfs") == 1
        with steps() as made, machine.used("vol", fs_type=fs_type) as target:
            assert (target / "file").read_text() == "kept"
        assert "mkfs" not in made
        assert "format_volume" not in made

    def test_reading_as_zeros_is_not_formatted_again(self, machine: Machine) -> None:
        volume = machine.create("vol", 32 * MIB, encrypted="false")
        machine.stage("vol")
        machine.unstage("vol")
        with volume.path.open("r+b") as file:
            file.write(bytes(volume.file_size))
        with failure(Kind.PRECONDITION, "volume vol holds no filesystem"):
            machine.stage("vol")
        assert not any(volume.path.read_bytes())

    def test_ciphertext_holds_nothing_of_the_plaintext(self, machine: Machine) -> None:
        volume = machine.create("vol", 32 * MIB, encrypted="true")
        with machine.used("vol") as target:
            (target / "file").write_text("a plaintext to look for " * 1000)
        assert b"a plaintext to look for" not in volume.path.read_bytes()

    def test_mkfs_options_are_used(self, machine: Machine) -> None:
        machine.create("vol", 64 * MIB, fsType="ext4", mkfsParams="-b 1024 -N 4096")
        with machine.used("vol") as target:
            assert os.statvfs(target).f_bsize == 1024

    def test_wrong_filesystem_type_is_refused(self, machine: Machine, world: World) -> None:
        machine.create("vol", 32 * MIB, world.plain)
        with failure(Kind.PRECONDITION, "volume vol holds ext4, not xfs"):
            machine.stage("vol", fs_type="xfs")

    def test_a_partition_table_is_for_raw_use(self, machine: Machine, world: World) -> None:
        machine.create("vol", 32 * MIB, world.partitioned)
        with failure(Kind.PRECONDITION, r"volume vol holds a partition table \(dos\), .* mounted \(use .*--block"):
            machine.stage("vol")
        with machine.used("vol", block=True) as device, device.open("rb") as file:
            assert file.read(512)[510:] == b"\x55\xaa"


class TestRepeats:
    def test_every_call_may_come_again(self, machine: Machine, world: World) -> None:
        volume = machine.create("vol", 32 * MIB, world.encrypted)
        assert machine.create("vol", 32 * MIB, world.encrypted) == volume
        for _ in range(3):
            machine.stage("vol")
        for _ in range(3):
            target = machine.publish("vol")
        assert len([mount for mount in mounts.table() if mount.target == target]) == 1
        for _ in range(3):
            machine.unpublish("vol")
        assert not target.exists()
        for _ in range(3):
            machine.unstage("vol")
        for _ in range(3):
            machine.volumes.delete("vol")
        assert not volume.directory.exists()

    def test_raw_calls_may_come_again(self, machine: Machine) -> None:
        machine.create("vol", 32 * MIB, encrypted="true")
        for _ in range(3):
            machine.stage("vol", block=True)
        for _ in range(3):
            target = machine.publish("vol", block=True)
        assert len([mount for mount in mounts.table() if mount.target == target]) == 1
        for _ in range(3):
            machine.unpublish("vol")
        for _ in range(3):
            machine.unstage("vol")

    def test_with_other_arguments_is_refused(self, machine: Machine, world: World) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        with failure(Kind.EXISTS):
            machine.create("vol", 48 * MIB, world.encrypted)
        machine.stage("vol")
        with failure(Kind.EXISTS, "staged as a filesystem"):
            machine.stage("vol", block=True)
        with failure(Kind.EXISTS, "another capability"):
            machine.stage("vol", fs_type="xfs")
        machine.publish("vol")
        with failure(Kind.EXISTS, "published at .* for writing"):
            machine.publish("vol", readonly=True)
        machine.unpublish("vol")
        machine.unstage("vol")
        machine.stage("vol", block=True)
        machine.publish("vol", block=True)
        with failure(Kind.EXISTS, "staged as a raw device"):
            machine.stage("vol")
        machine.unpublish("vol")
        machine.unstage("vol")

    def test_a_cut_short_publish_is_finished(self, machine: Machine) -> None:
        machine.create("vol", 32 * MIB)
        machine.stage("vol")
        (machine.home / "vol-target").mkdir()
        assert machine.is_mounted(machine.publish("vol"))
        machine.unpublish("vol")
        machine.unstage("vol")


class TestPublish:
    def test_read_only_refuses_writes(self, machine: Machine) -> None:
        machine.create("vol", 32 * MIB)
        machine.stage("vol")
        target = machine.publish("vol", readonly=True)
        with pytest.raises(OSError, match="Read-only"):
            (target / "file").write_text("text")
        machine.unpublish("vol")
        machine.unstage("vol")

    def test_read_only_raw_device_refuses_writes_and_grows(self, machine: Machine) -> None:
        machine.create("vol", 32 * MIB)
        machine.stage("vol", block=True)
        many = AccessMode.SINGLE_NODE_MULTI_WRITER
        for _ in range(2):
            target = machine.publish("vol", "read", readonly=True, block=True, access=many)
        with failure(Kind.EXISTS, "published at .* read-only"):
            machine.publish("vol", "read", block=True, access=many)
        with pytest.raises(OSError), target.open("r+b", buffering=0) as device:
            device.write(b"text")
        writable = machine.publish("vol", "write", block=True, access=many)
        with writable.open("r+b", buffering=0) as device:
            device.write(b"text")
            os.fsync(device.fileno())
        machine.volumes.expand("vol", 48 * MIB)
        assert machine.volumes.node_expand("vol", target, 48 * MIB) == 48 * MIB
        assert blockdev.size(target) == 48 * MIB
        machine.unpublish("vol", "write")
        machine.unpublish("vol", "read")
        assert dm.find("ebi-ro-vol") is None
        machine.unstage("vol")

    def test_before_stage_is_refused(self, machine: Machine) -> None:
        machine.create("vol", 32 * MIB)
        with failure(Kind.PRECONDITION, "volume vol is not staged"):
            machine.publish("vol")
        with failure(Kind.NOT_FOUND, "volume absent does not exist"):
            machine.publish("absent")

    def test_leaves_the_mounts_of_others_alone(self, machine: Machine) -> None:
        machine.create("vol", 32 * MIB)
        other = machine.home / "vol-target"
        other.mkdir()
        mounts.bind(other, other)
        with failure(Kind.EXISTS):
            machine.unpublish("vol")
        assert machine.is_mounted(other)
        mounts.unmount(other)


class TestMismatchAtCreation:
    def test_encryption_must_be_that_of_the_image(self, machine: Machine, world: World) -> None:
        with failure(Kind.INVALID, "the backing image golden is not encrypted"):
            machine.create("vol", 32 * MIB, world.plain, encrypted="true")
        with failure(Kind.INVALID, "the backing image golden-encrypted is encrypted"):
            machine.create("vol", 32 * MIB, world.encrypted, encrypted="false")

    def test_size_must_hold_the_image(self, machine: Machine, world: World) -> None:
        with failure(Kind.OUT_OF_RANGE, "volume size should be larger than the backing image size"):
            machine.create("vol", 16 * MIB, world.encrypted)

    def test_image_must_be_there(self, machine: Machine) -> None:
        with failure(Kind.NOT_FOUND):
            machine.volumes.create("vol", 32 * MIB, {"backingImage": "absent"})
        assert machine.volumes.list() == []
        assert not (machine.home / "volumes" / "vol").exists()

    def test_no_room_is_told_and_nothing_stays(self, machine: Machine) -> None:
        free = machine.volumes.free_bytes()
        with failure(Kind.EXHAUSTED, "no space for"):
            machine.create("vol", free + 1024 * MIB)
        assert not (machine.home / "volumes" / "vol").exists()
        assert machine.volumes.free_bytes() > free - 16 * MIB


class TestExpand:
    @pytest.mark.parametrize("sort", ["image", "encrypted", "plain"])
    @pytest.mark.parametrize("fs_type", ["ext4", "xfs"])
    def test_online_under_load_loses_nothing(self, machine: Machine, world: World, sort: str, fs_type: str) -> None:
        image = {"ext4": world.encrypted, "xfs": world.xfs}[fs_type] if sort == "image" else None
        parameters = {} if sort == "image" else {"encrypted": str(sort == "encrypted").lower()}
        machine.create("vol", 320 * MIB, image, **parameters)
        machine.stage("vol", fs_type=fs_type)
        target = machine.publish("vol", fs_type=fs_type)
        stop, written = threading.Event(), {}

        def write() -> None:
            number = 0
            while not stop.is_set():
                content = os.urandom(MIB)
                with (target / f"load{number % 40}").open("wb") as file:
                    file.write(content)
                    os.fsync(file.fileno())
                written[f"load{number % 40}"] = content
                number += 1

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for size in (416 * MIB, 512 * MIB):
                assert machine.volumes.expand("vol", size) == size
                assert machine.volumes.node_expand("vol", target, size) == size
                assert blockdev.size(dm.path("ebi-vol-vol")) == size
                # What a filesystem keeps for itself, most of all the log of XFS, is not in its total.
                assert size - machine.volumes.stats("vol", target).total_bytes < 80 * MIB
        finally:
            stop.set()
            writer.join()
        machine.unpublish("vol")
        machine.unstage("vol")
        with machine.used("vol") as target:
            assert {name: (target / name).read_bytes() for name in written} == written
            if sort == "image" and fs_type == "ext4":
                assert tree_hash(target).items() >= world.files.items()

    def test_offline_is_seen_at_the_next_stage(self, machine: Machine, world: World) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        with machine.used("vol") as target:
            (target / "file").write_text("kept")
        assert machine.volumes.expand("vol", 200 * MIB) == 200 * MIB
        with machine.used("vol") as target:
            assert machine.volumes.stats("vol", target).total_bytes > 180 * MIB
            assert machine.volumes.node_expand("vol", target, 200 * MIB) == 200 * MIB
            assert (target / "file").read_text() == "kept"

    def test_raw_device_grows(self, machine: Machine, world: World) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        with machine.used("vol", block=True) as target:
            before = target.read_bytes()
            machine.volumes.expand("vol", 48 * MIB)
            assert machine.volumes.node_expand("vol", target, 48 * MIB) == 48 * MIB
            after = target.read_bytes()
        assert len(after) == 48 * MIB
        assert after[: 32 * MIB] == before

    def test_a_grown_store_holds_all_of_the_grown_volume(self, machine: Machine, world: World) -> None:
        machine.create("vol", 24 * MIB, world.encrypted)
        with machine.used("vol", block=True) as target:
            machine.volumes.expand("vol", 48 * MIB)
            machine.volumes.node_expand("vol", target, 48 * MIB)
            written = filled(target)
        with machine.used("vol", block=True) as target:
            assert file_hash(target) == written

    @pytest.mark.parametrize("block", [False, True])
    def test_by_the_node_alone(self, machine: Machine, world: World, block: bool) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        with machine.used("vol", block=block) as target:
            for _ in range(2):
                assert machine.volumes.node_expand("vol", target, 64 * MIB) == 64 * MIB
            assert blockdev.size(dm.path("ebi-vol-vol")) == machine.volumes.get("vol").capacity == 64 * MIB
            assert machine.volumes.get("vol").is_reserved
            assert machine.volumes.stats("vol", target).total_bytes > 50 * MIB
            with failure(Kind.OUT_OF_RANGE):
                machine.volumes.node_expand("vol", target, 48 * MIB, limit=48 * MIB)
            with failure(Kind.EXHAUSTED, "no space for"):
                machine.volumes.node_expand("vol", target, 1 << 50)
            assert machine.volumes.node_expand("vol", target, 0) == 64 * MIB

    def test_is_never_a_shrink(self, machine: Machine) -> None:
        machine.create("vol", 64 * MIB)
        assert machine.volumes.expand("vol", 32 * MIB) == 64 * MIB


class TestDelete:
    def test_is_refused_while_staged(self, machine: Machine) -> None:
        machine.create("vol", 32 * MIB)
        machine.stage("vol")
        with failure(Kind.PRECONDITION, "volume vol is staged"):
            machine.volumes.delete("vol")
        machine.unstage("vol")

    def test_destroys_the_keys_first(self, machine: Machine) -> None:
        volume = machine.create("vol", 32 * MIB, encrypted="true")
        with machine.used("vol"):
            pass
        kept = machine.home / "kept"
        os.link(volume.path, kept)
        machine.volumes.delete("vol")
        with kept.open("rb") as file:
            assert not any(file.read(16 * MIB))
            assert any(file.read(MIB))


class TestWhatIsThereAlready:
    def test_a_mapper_over_another_device_is_replaced(self, machine: Machine) -> None:
        machine.create("vol", 32 * MIB)
        with machine.used("vol") as target:
            (target / "file").write_text("kept")
        other = machine.home / "other"
        other.write_bytes(bytes(32 * MIB))
        with loop.attached(other) as device:
            dm.create("ebi-vol-vol", f"0 65536 linear {blockdev.number(device)} 0")
        with machine.used("vol") as target:
            assert (target / "file").read_text() == "kept"

    def test_a_half_taken_down_stack_is_completed(self, machine: Machine, world: World) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        machine.stage("vol")
        mounts.unmount(machine.staging / "vol")
        dm.remove("ebi-vol-vol")
        assert tree_hash(machine.stage("vol")).items() >= world.files.items()
        machine.unstage("vol")

    def test_a_suspended_device_is_resumed(self, machine: Machine) -> None:
        machine.create("vol", 32 * MIB)
        machine.stage("vol", block=True)
        dm.suspend("ebi-vol-vol")
        machine.stage("vol", block=True)
        mapper = dm.find("ebi-vol-vol")
        assert mapper is not None
        assert not mapper.suspended
        machine.unstage("vol")

    def test_recover_takes_away_what_carries_nothing(self, machine: Machine, world: World) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        machine.stage("vol")
        mounts.unmount(machine.staging / "vol")
        dm.remove("ebi-vol-vol")
        (machine.home / "volumes" / "partial").mkdir()
        (machine.home / "volumes" / "partial" / "volume.img").write_bytes(bytes(4096))
        machine.volumes.recover()
        assert not list(dm.every("ebi-"))
        assert [entry.name for entry in (machine.home / "volumes").iterdir()] == ["vol"]

    def test_recover_touches_nothing_in_use(self, machine: Machine, world: World) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        with machine.used("vol") as target:
            machine.volumes.recover()
            (target / "file").write_text("text")
            assert not machine.volumes.stats("vol", target).condition.abnormal


class TestCondition:
    def test_tells_a_suspended_and_a_vanished_device(self, machine: Machine) -> None:
        machine.create("vol", 32 * MIB, encrypted="true")
        with machine.used("vol", block=True) as target:
            stats = machine.volumes.stats("vol", target)
            assert (stats.block, stats.total_bytes, stats.condition.abnormal) == (True, 32 * MIB, False)
            dm.suspend("ebi-vol-vol")
            stats = machine.volumes.stats("vol", target)
            dm.resume("ebi-vol-vol")
            assert stats.condition.abnormal
            assert "ebi-vol-vol is suspended" in stats.condition.message

    def test_tells_a_missing_file(self, machine: Machine, world: World) -> None:
        volume = machine.create("vol", 32 * MIB, world.encrypted)
        with machine.used("vol") as target:
            hidden = volume.path.rename(volume.path.with_name("hidden"))
            condition = machine.volumes.stats("vol", target).condition
            hidden.rename(volume.path)
            assert condition.abnormal
            assert "ebi-cow-vol has the wrong device under it" in condition.message
            assert not machine.volumes.stats("vol", target).condition.abnormal

    def test_absent_volume_is_not_found(self, machine: Machine) -> None:
        with failure(Kind.NOT_FOUND):
            machine.volumes.stats("absent", Path("some/relative/path"))


class TestAttachedDevice:
    """A device of another system, by the path that the settings tell."""

    @pytest.fixture
    def machine(self, home: Path, world: World) -> Machine:
        return Machine(home, world, Settings(device_template=f"{home}/device-{{volume}}"))

    def stage(self, machine: Machine, device: Path, *, encrypted: bool) -> Path:
        link = machine.home / "device-pvc-1"
        link.unlink(missing_ok=True)
        link.symlink_to(device)
        staging = machine.staging_of("pvc-1")
        context = {"encrypted": str(encrypted).lower(), "numberOfReplicas": "3"}
        machine.volumes.stage("pvc-1", staging, Capability(), SECRET, context)
        return staging

    def test_with_luks_is_opened_and_grows(self, machine: Machine) -> None:
        file = machine.home / "file"
        file.write_bytes(bytes(64 * MIB))
        key = machine.home / "key"
        key.write_text(SECRET["CRYPTO_KEY_VALUE"])
        fast = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
        with loop.attached(file) as device:
            subprocess.run(["cryptsetup", "luksFormat", "-q", *fast, device, key], check=True)
            subprocess.run(["cryptsetup", "open", "-d", key, device, "by-hand"], check=True)
            subprocess.run(["mkfs.ext4", "-q", "/dev/mapper/by-hand"], check=True)
            subprocess.run(["cryptsetup", "close", "by-hand"], check=True)
            staging = self.stage(machine, device, encrypted=True)
            (staging / "file").write_text("text")
            os.truncate(file, 128 * MIB)
            loop.set_capacity(device.name)
            with failure(Kind.UNAVAILABLE):
                machine.volumes.node_expand("pvc-1", staging, 129 * MIB)
            # All of the device: what its header takes is not to be had.
            assert machine.volumes.node_expand("pvc-1", staging, 128 * MIB) == 128 * MIB
            assert os.statvfs(staging).f_blocks * os.statvfs(staging).f_frsize > 95 * MIB
            machine.volumes.unstage("pvc-1", staging)
        assert not list((machine.home / "volumes").iterdir())

    @pytest.mark.parametrize("encrypted", [True, False])
    def test_that_reads_as_zeros_is_never_formatted(self, machine: Machine, encrypted: bool) -> None:
        file = machine.home / "file"
        file.write_bytes(bytes(64 * MIB))
        with loop.attached(file) as device, failure(Kind.PRECONDITION):
            self.stage(machine, device, encrypted=encrypted)
        assert not any(file.read_bytes())


class TestLostData:
    def test_a_store_without_its_header_is_not_begun_anew(self, machine: Machine, world: World) -> None:
        volume = machine.create("vol", 32 * MIB, world.plain)
        with machine.used("vol") as target:
            (target / "file").write_text("data")
        with volume.path.open("r+b") as file:
            file.write(bytes(4096))
        before = file_hash(volume.path)
        with failure(Kind.PRECONDITION, "lost the header of its snapshot store"):
            machine.stage("vol")
        assert file_hash(volume.path) == before

    def test_a_file_that_was_cut_short_is_not_filled_up(self, machine: Machine, world: World) -> None:
        volume = machine.create("vol", 32 * MIB, world.encrypted)
        with machine.used("vol"):
            pass
        os.truncate(volume.path, volume.file_size - MIB)
        with failure(Kind.PRECONDITION, "data is lost"):
            machine.stage("vol")
        assert volume.path.stat().st_size == volume.file_size - MIB


class TestOneOperationAtATime:
    def test_a_second_is_told_to_wait_or_gets_the_same_answer(self, machine: Machine, world: World) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        answers: list[Kind | None] = []

        def stage() -> None:
            try:
                machine.stage("vol")
                answers.append(None)
            except EbiError as error:
                answers.append(error.kind)

        threads = [threading.Thread(target=stage) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert None in answers
        assert set(answers) <= {None, Kind.BUSY}
        machine.unstage("vol")
