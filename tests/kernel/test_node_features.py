"""What single calls and parameters bring, on a real kernel."""

import os
import signal
import stat
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from plugin import events
from plugin.errors import EbiError, Kind
from plugin.host import blockdev, dm, loop, mounts, udev
from plugin.luks import header
from plugin.settings import Settings
from plugin.volumes import AccessMode, Capability
from tests.kernel.world import MIB, SECRET, WRONG, Machine, World, file_hash, steps, tree_hash

GROUP = 4711
MANY = AccessMode.SINGLE_NODE_MULTI_WRITER


@pytest.fixture
def machine(home: Path, world: World) -> Machine:
    return Machine(home, world)


def failure(kind: Kind, match: str = "") -> AbstractContextManager[object]:
    """The block fails with an EbiError of this kind, whose words match."""
    return pytest.raises(EbiError, match=match or None, check=lambda error: error.kind is kind)


def killed_after(step: str, call: Callable[[], None]) -> None:
    """`call` in a process that is killed after the first `step` of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child has none of
        child = os.fork()
    if child == 0:
        udev._the_watch.cache_clear()
        events.subscribe(
            lambda event: (
                os.kill(os.getpid(), signal.SIGKILL) if isinstance(event, events.Step) and event.name == step else None
            )
        )
        try:
            call()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"there was no {step}"


class TestGroup:
    def test_owns_the_files_of_a_volume_also_those_of_its_image(self, machine: Machine, world: World) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        with machine.used("vol", mount_group=str(GROUP)) as target:
            found = target.stat()
            assert (found.st_gid, stat.S_IMODE(found.st_mode) & 0o2070) == (GROUP, 0o2070)
            assert (target / "deep" / "file7").stat().st_gid == GROUP
            (target / "file").touch(mode=0o600)
            assert (target / "file").stat().st_gid == GROUP
        # Another pod's group at the next publish of a volume that stays staged.
        machine.stage("vol")
        target = machine.publish("vol", mount_group=str(GROUP + 1))
        assert (target / "file").stat().st_gid == GROUP + 1
        assert stat.S_IMODE((target / "file").stat().st_mode) == 0o660
        machine.unpublish("vol")
        machine.unstage("vol")

    def test_is_not_given_where_nothing_is_to_be_written(self, machine: Machine) -> None:
        machine.create("vol", 32 * MIB)
        machine.stage("vol", mount_group=str(GROUP), access=AccessMode.SINGLE_NODE_READER_ONLY)
        target = machine.publish("vol", readonly=True, mount_group=str(GROUP))
        assert target.stat().st_gid == 0
        machine.unpublish("vol")
        machine.unstage("vol")


class TestAccessModes:
    def test_readers_share_a_volume_and_none_writes(self, machine: Machine) -> None:
        machine.create("vol", 32 * MIB)
        access = AccessMode.SINGLE_NODE_READER_ONLY
        machine.stage("vol", access=access)
        for name in ("one", "two", "one"):
            with pytest.raises(OSError, match="Read-only"):
                (machine.publish("vol", name, access=access) / "file").touch()
        for name in ("one", "two"):
            machine.unpublish("vol", name)
        machine.unstage("vol")

    @pytest.mark.parametrize("block", [False, True])
    def test_a_single_writer_has_one_path_and_many_have_their_own(self, machine: Machine, block: bool) -> None:
        machine.create("vol", 32 * MIB)
        machine.stage("vol", block=block)
        for name in ("one", "two", "three", "two"):
            machine.publish("vol", name, block=block, access=MANY)
        for access in (AccessMode.SINGLE_NODE_SINGLE_WRITER, AccessMode.SINGLE_NODE_WRITER):
            with failure(Kind.PRECONDITION, f"{access.value} allows one path"):
                machine.publish("vol", "four", block=block, access=access)
        assert not (machine.home / "vol-four").exists()
        with failure(Kind.PRECONDITION, "still published at"):
            machine.unstage("vol")
        for name in ("one", "two", "three"):
            machine.unpublish("vol", name)
        machine.publish("vol", "four", block=block, access=AccessMode.SINGLE_NODE_SINGLE_WRITER)
        machine.publish("vol", "four", block=block, access=AccessMode.SINGLE_NODE_SINGLE_WRITER)
        machine.unpublish("vol", "four")
        machine.unstage("vol")

    def test_the_same_path_for_another_use_exists_already(self, machine: Machine) -> None:
        machine.create("vol", 32 * MIB)
        machine.stage("vol")
        target = machine.publish("vol", access=MANY)
        with failure(Kind.EXISTS, "published at .* as ext4, not xfs"):
            machine.publish("vol", access=MANY, fs_type="xfs")
        for other in ({"readonly": True}, {"mount_flags": ("ro",)}, {"access": AccessMode.SINGLE_NODE_READER_ONLY}):
            with failure(Kind.EXISTS, "published at .* for writing"):
                machine.publish("vol", **{"access": MANY, **other})
        with failure(Kind.EXISTS, "staged as a filesystem"):
            machine.publish("vol", access=MANY, block=True)
        machine.unpublish("vol")
        assert not target.exists()
        machine.unstage("vol")

    def test_a_volume_staged_read_only_is_published_so_again_and_again(self, machine: Machine) -> None:
        machine.create("vol", 32 * MIB)
        with machine.used("vol") as target:
            (target / "file").write_text("kept")
        machine.stage("vol", mount_flags=("ro", "noatime"))
        for _ in range(2):
            target = machine.publish("vol", mount_flags=("ro", "noatime"))
        mount = mounts.at(target)
        assert mount is not None
        assert {"ro", "noatime"} <= mount.options
        assert (target / "file").read_text() == "kept"
        assert os.statvfs(target).f_flag & os.ST_RDONLY
        machine.unpublish("vol")
        machine.unstage("vol")


class TestEphemeral:
    """Inline volumes, as kubelet asks for them."""

    ID = "csi-" + "0f" * 32

    def publish(self, machine: Machine, target: Path, secret: Mapping[str, str] = SECRET, **attributes: str) -> None:
        target.parent.mkdir(exist_ok=True)
        context = {"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.uid": "1", **attributes}
        capability = Capability(mount_group=str(GROUP))
        machine.volumes.publish_ephemeral(self.ID, target, capability, readonly=False, secrets=secret, context=context)

    def test_is_made_with_its_publish_and_goes_with_it(self, machine: Machine, world: World) -> None:
        target = machine.home / "pod" / "mount"
        attributes = {"size": "48Mi", "backingImage": world.encrypted.name, "encrypted": "true"}
        for _ in range(2):
            self.publish(machine, target, **attributes)
            (target / "new").write_text("text")
        assert tree_hash(target).items() >= world.files.items()
        assert target.stat().st_gid == GROUP
        assert machine.volumes.stats(self.ID, target).total_bytes > 40 * MIB
        with failure(Kind.EXISTS):
            self.publish(machine, target, **{**attributes, "size": "64Mi"})
        with failure(Kind.EXISTS):
            self.publish(machine, machine.home / "pod" / "other", **attributes)
        assert (target / "new").read_text() == "text"
        machine.volumes.unpublish(self.ID, machine.home / "pod" / "other")
        assert machine.is_mounted(target)
        for _ in range(2):
            machine.volumes.unpublish(self.ID, target)
        assert not target.exists()
        assert machine.volumes.list() == []

    def test_that_can_not_be_opened_leaves_nothing(self, machine: Machine, world: World) -> None:
        target = machine.home / "pod" / "mount"
        with failure(Kind.INVALID, "the passphrase does not open backing image"):
            self.publish(machine, target, WRONG, backingImage=world.encrypted.name, encrypted="true")
        assert not target.exists()
        assert machine.volumes.list() == []

    def test_killed_is_finished_by_the_next_call_or_undone(self, machine: Machine) -> None:
        target = machine.home / "pod" / "mount"

        def publish() -> None:
            self.publish(machine, target, size="16Mi", encrypted="true")

        def unpublish() -> None:
            machine.volumes.unpublish(self.ID, target)

        for step in ("mkfs", "mount"):
            killed_after(step, publish)
            publish()
            (target / "file").write_text("text")
            killed_after("unmount", unpublish)
            unpublish()
            assert machine.volumes.list() == []
        killed_after("mount", publish)
        unpublish()
        assert machine.volumes.list() == []

    def test_in_use_is_never_called_unused(self, machine: Machine) -> None:
        """Its staging may have gone with the mounts of the container that made it: then its publish is all there is."""
        target = machine.home / "pod" / "mount"
        self.publish(machine, target, size="16Mi")
        volume = machine.volumes.get(self.ID)
        mounts.unmount(volume.staging)
        assert machine.volumes.examine() == []
        record = volume.directory / "record.json"
        text = record.read_text()
        record.write_text("damaged")
        assert [finding.kind for finding in machine.volumes.examine()] == ["record-damaged"]
        record.write_text(text)
        machine.volumes.unpublish(self.ID, target)
        assert machine.volumes.list() == []

    def test_of_a_pod_that_is_gone_is_removed_at_the_start(self, machine: Machine) -> None:
        target = machine.home / "pod" / "mount"
        self.publish(machine, target, size="16Mi")
        mounts.unmount(target)
        machine.volumes.recover()
        assert machine.volumes.get(self.ID).ephemeral == str(target)
        target.rmdir()
        target.parent.rmdir()
        machine.volumes.recover()
        assert machine.volumes.list() == []


class TestReservedSpace:
    """What is reserved for a volume stays reserved, whatever is trimmed."""

    @pytest.mark.parametrize(
        ("fs_type", "encrypted"), [("ext4", "true"), ("ext4", "false"), ("xfs", "false"), ("btrfs", "false")]
    )
    def test_no_discard_reaches_the_file(self, machine: Machine, encrypted: str, fs_type: str) -> None:
        volume = machine.create("vol", 320 * MIB, encrypted=encrypted)
        with machine.used("vol", fs_type=fs_type) as target:
            machine.volumes.expand("vol", 336 * MIB)
            machine.volumes.node_expand("vol", target, 336 * MIB)
            assert trimmed(target) is None
            assert machine.volumes.get("vol").is_reserved
        assert volume.path.stat().st_blocks * 512 >= 336 * MIB

    def test_none_comes_from_a_raw_device_or_below_an_image(self, machine: Machine, world: World) -> None:
        machine.create("raw", 32 * MIB)
        with machine.used("raw", block=True) as target:
            punch = ["fallocate", "--punch-hole", "--offset", "8MiB", "--length", "8MiB", target]
            for command in (["blkdiscard", "-f", target], punch):
                assert subprocess.run(command, capture_output=True, check=False).returncode != 0
            assert machine.volumes.get("raw").is_reserved
        machine.create("vol", 32 * MIB, world.plain)
        with machine.used("vol") as target:
            assert trimmed(target) is None
        assert machine.volumes.get("vol").is_reserved

    def test_what_was_lost_all_the_same_is_taken_again(self, machine: Machine) -> None:
        volume = machine.create("vol", 32 * MIB)
        with machine.used("vol") as target:
            (target / "file").write_text("kept")
        subprocess.run(["fallocate", "--punch-hole", "-o", "16MiB", "-l", "8MiB", volume.path], check=True)
        assert not volume.is_reserved
        with machine.used("vol") as target:
            assert (target / "file").read_text() == "kept"
        assert volume.is_reserved

    @pytest.mark.parametrize("encrypted", ["true", "false"])
    def test_discards_go_through_where_the_class_says_so(self, machine: Machine, encrypted: str) -> None:
        volume = machine.create("vol", 64 * MIB, encrypted=encrypted, discard="true")
        with machine.used("vol") as target:
            assert volume.is_reserved  # until somebody trims
            (target / "file").write_bytes(os.urandom(30 * MIB))
            os.sync()
            (target / "file").unlink()
            os.sync()
            assert (trimmed(target) or 0) > 30 * MIB
            assert volume.path.stat().st_blocks * 512 < 40 * MIB
        with machine.used("vol") as target:
            assert trimmed(target) is not None


class TestFlags:
    def test_of_dm_crypt_are_in_the_header_and_in_force_from_the_first_stage(
        self, machine: Machine, world: World
    ) -> None:
        flags = {"cryptNoReadWorkqueue": "true", "cryptNoWriteWorkqueue": "true"}
        volume = machine.create("vol", 32 * MIB, world.encrypted, **flags)
        for _ in range(2):
            with machine.used("vol") as target:
                assert {"no_read_workqueue", "no_write_workqueue"} <= set(dm.table("ebi-cow-vol").split())
                machine.volumes.expand("vol", 48 * MIB)
                machine.volumes.node_expand("vol", target, 48 * MIB)
                assert {"no_read_workqueue", "no_write_workqueue"} <= set(dm.table("ebi-cow-vol").split())
        assert set(header.read(volume.path).json["config"]["flags"]) == {"no-read-workqueue", "no-write-workqueue"}


def trimmed(mounted: Path) -> int | None:
    """Bytes that fstrim gives back there; None where there are no discards."""
    done = subprocess.run(["fstrim", "-v", mounted], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return int(done.stdout.partition("(")[2].split()[0])
    assert "not supported" in done.stderr
    return None


class TestAttachedDevice:
    """A device of another system, formatted once, and only where that is known to lose nothing."""

    @pytest.fixture
    def machine(self, home: Path, world: World) -> Machine:
        return Machine(home, world, Settings(device_template=f"{home}/device-{{volume}}"))

    @pytest.fixture
    def device(self, machine: Machine) -> Iterator[Path]:
        with attached(machine, "disk") as found:
            yield found

    def stage(self, machine: Machine, *, block: bool = False, **context: str) -> Path:
        staging = machine.staging_of("pvc-1")
        machine.volumes.stage("pvc-1", staging, Capability(block=block), SECRET, context)
        return staging

    @pytest.mark.parametrize("encrypted", ["true", "false"])
    def test_that_was_never_formatted_is_formatted_once(self, machine: Machine, device: Path, encrypted: str) -> None:
        context = {"encrypted": encrypted, "ebi/formatted": "false", "numberOfReplicas": "3", "fsType": "ext4"}
        for step in ("mkfs", "format_volume") if encrypted == "true" else ("mkfs",):
            killed_after(step, lambda: self.stage(machine, **context))
        for _ in range(2):
            with steps() as made:
                staging = self.stage(machine, **context)
            (staging / "file").write_text("kept")
            machine.volumes.unstage("pvc-1", staging)
        assert "mkfs" not in made
        with device.open("r+b") as disk:  # a degraded one that reads as zeros
            disk.write(bytes(64 * MIB))
            os.fsync(disk.fileno())
        words = "this node formatted it at" if encrypted == "true" else "holds no filesystem"
        with failure(Kind.PRECONDITION, words):
            self.stage(machine, **context)
        assert not any(device.read_bytes())

    def test_that_was_formatted_elsewhere_since_is_not_formatted_again(self, machine: Machine, device: Path) -> None:
        killed_after("mkfs", lambda: self.stage(machine, **{"ebi/formatted": "false"}))
        machine.volumes.unstage("pvc-1", machine.staging_of("pvc-1"))
        by_hand = machine.home / "by-hand"
        by_hand.mkdir()
        subprocess.run(["mount", device, by_hand], check=True)
        (by_hand / "file").write_text("from another node")
        subprocess.run(["umount", by_hand], check=True)
        staging = self.stage(machine, **{"ebi/formatted": "true"})
        assert (staging / "file").read_text() == "from another node"
        machine.volumes.unstage("pvc-1", staging)

    def test_that_holds_something_is_not_formatted(self, machine: Machine, device: Path) -> None:
        def refused(what: str) -> None:
            before = file_hash(device)
            with failure(Kind.PRECONDITION, f"is said to be new, but its device .* holds {what}"):
                self.stage(machine, encrypted="true", **{"ebi/formatted": "false"})
            assert file_hash(device) == before

        for place in (MIB - 1, 64 * MIB - 1):
            for content, what in ((b"x", "data of an unknown kind"), (b"\0", "")):
                with device.open("r+b") as disk:
                    disk.seek(place)
                    disk.write(content)
                if what:
                    refused(what)
        subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
        refused("ext4")

    def test_that_was_raw_first_is_not_formatted_later(self, machine: Machine, device: Path) -> None:
        context = {"ebi/formatted": "false"}
        staging = self.stage(machine, block=True, **context)
        with device.open("r+b") as disk:
            disk.seek(32 * MIB)
            disk.write(b"data in the middle")
        machine.volumes.unstage("pvc-1", staging)
        with failure(Kind.PRECONDITION, "holds no filesystem"):
            self.stage(machine, **context)

    def test_its_flags_are_kept_in_its_header_and_discards_reach_it(self, machine: Machine, device: Path) -> None:
        context = {"encrypted": "true", "ebi/formatted": "false"}
        machine.volumes.unstage("pvc-1", self.stage(machine, **context))
        for _ in range(2):
            staging = self.stage(machine, discard="true", cryptNoReadWorkqueue="true", **context)
            assert trimmed(staging) is not None
            machine.volumes.unstage("pvc-1", staging)
        assert set(header.read(device).json["config"]["flags"]) == {"allow-discards", "no-read-workqueue"}

    def test_that_came_again_as_another_device_is_mounted_anew(self, machine: Machine, device: Path) -> None:
        subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
        staging = self.stage(machine)
        (staging / "file").write_text("on the first")
        (machine.home / "device-pvc-1").unlink()
        with failure(Kind.NOT_FOUND, "does not exist"):
            self.stage(machine)
        with attached(machine, "other") as other:
            subprocess.run(["mkfs.ext4", "-q", "-F", other], check=True)
            staging = self.stage(machine)
            assert not (staging / "file").exists()
            machine.volumes.unstage("pvc-1", staging)


@contextmanager
def attached(machine: Machine, name: str) -> Iterator[Path]:
    """64 MiB of zeros attached as the device of pvc-1."""
    file, link = machine.home / name, machine.home / "device-pvc-1"
    file.write_bytes(bytes(64 * MIB))
    with loop.attached(file) as device:
        link.symlink_to(device)
        yield device
        link.unlink(missing_ok=True)


class TestExpand:
    def test_before_the_first_stage_it_is_grown_at_that(self, machine: Machine, world: World) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        machine.volumes.expand("vol", 128 * MIB)
        with machine.used("vol") as target:
            assert blockdev.size(dm.path("ebi-vol-vol")) == 128 * MIB
            assert machine.volumes.stats("vol", target).total_bytes > 100 * MIB
            assert machine.volumes.node_expand("vol", target, 128 * MIB) == 128 * MIB
            assert tree_hash(target).items() >= world.files.items()

    def test_btrfs_grows_under_load(self, machine: Machine) -> None:
        machine.create("vol", 320 * MIB, encrypted="true")
        with machine.used("vol", fs_type="btrfs") as target:
            with subprocess.Popen(
                ["dd", "if=/dev/urandom", f"of={target}/load", "bs=1M", "count=60", "status=none"]
            ) as dd:
                machine.volumes.expand("vol", 448 * MIB)
                assert machine.volumes.node_expand("vol", target, 448 * MIB) == 448 * MIB
            assert dd.returncode == 0
            assert machine.volumes.stats("vol", target).total_bytes == 448 * MIB
            written = file_hash(target / "load")
        with machine.used("vol") as target:
            assert file_hash(target / "load") == written

    def test_is_not_done_where_the_crypt_device_did_not_grow(self, machine: Machine) -> None:
        volume = machine.create("vol", 32 * MIB, encrypted="true")
        with machine.used("vol") as target:
            machine.volumes.expand("vol", 64 * MIB)
            os.truncate(volume.path, 48 * MIB)  # so the devices can't follow
            with failure(Kind.UNAVAILABLE, "the device ebi-vol-vol has 33554432 bytes, not 67108864"):
                machine.volumes.node_expand("vol", target, 64 * MIB)
            machine.volumes.get("vol").reserve()
            assert machine.volumes.node_expand("vol", target, 64 * MIB) == 64 * MIB


class TestXfsClones:
    def test_of_one_image_have_their_own_options_group_and_readers(self, machine: Machine, world: World) -> None:
        for name in ("one", "two"):
            machine.create(name, 400 * MIB, world.xfs)
            staging = machine.stage(name, fs_type="xfs", mount_flags=("noatime",), mount_group=str(GROUP))
            assert machine.volumes.stats(name, staging).total_bytes > 320 * MIB  # less its log
        writable = machine.publish("one", mount_group=str(GROUP))
        readable = machine.publish("two", readonly=True)
        (writable / "file").write_text("one")
        assert writable.stat().st_gid == GROUP
        mount = mounts.at(writable)
        assert mount is not None
        assert {"noatime"} <= mount.options
        assert {"nouuid"} <= mount.super_options
        with pytest.raises(OSError, match="Read-only"):
            (readable / "file").touch()
        for name in ("one", "two"):
            machine.unpublish(name)
            machine.unstage(name)

    def test_mkfs_options_and_flags_of_a_blank_one_are_used(self, machine: Machine) -> None:
        machine.create("vol", 320 * MIB, encrypted="true", fsType="xfs", mkfsParams="-m reflink=0 -L label")
        with machine.used("vol", mount_flags=("noatime", "nodiratime")) as target:
            signature = blockdev.probe(dm.path("ebi-vol-vol"))
            assert signature is not None
            assert signature.type == "xfs"
            found = subprocess.run(["xfs_info", target], capture_output=True, text=True, check=True).stdout
            assert "reflink=0" in found


class TestPlaces:
    def test_inside_a_volume_nothing_is_mounted(self, machine: Machine) -> None:
        machine.create("one", 32 * MIB)
        machine.create("two", 32 * MIB)
        machine.stage("two")
        with machine.used("one") as target:
            (target / "inside").mkdir()
            for place in (target / "inside", target / "new", machine.staging / "one" / "inside"):
                with failure(Kind.INVALID, "it lies in the volume that is mounted at"):
                    machine.volumes.publish("two", machine.staging / "two", place, Capability(), readonly=False)
            with failure(Kind.INVALID, "it lies in the volume that is mounted at"):
                machine.volumes.stage("two", target / "inside", Capability(), SECRET, {})
        machine.unstage("two")

    def test_a_link_in_the_way_is_not_followed(self, machine: Machine) -> None:
        elsewhere, parent = machine.home / "elsewhere", machine.home / "parent"
        (elsewhere / "target").mkdir(parents=True)
        parent.symlink_to(elsewhere)
        source = machine.home / "source"
        source.mkdir()
        with pytest.raises(EbiError, match="cannot use the path"):
            mounts.bind(source, parent / "target")
        with pytest.raises(EbiError, match="cannot use the path"):
            mounts.mount(Path("/dev/null"), parent / "target", "ext4")
        assert mounts.at(elsewhere / "target") is None
