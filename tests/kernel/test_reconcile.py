"""What kubelet, a crash or another hand leaves on a node: found by `ebi doctor`, and put right."""

import json
import logging
import subprocess
import threading
from pathlib import Path

import pytest

from plugin.cli import main
from plugin.errors import EbiError, Kind
from plugin.host import blockdev, dm, loop, mounts, udev
from plugin.host.lock import locked
from tests.kernel.conftest import leftovers
from tests.kernel.world import MIB, Machine, World, tree_hash


@pytest.fixture
def machine(home: Path, world: World) -> Machine:
    return Machine(home, world)


@pytest.fixture
def doctor(machine: Machine, capsys: pytest.CaptureFixture[str]) -> "Doctor":
    return Doctor(machine, capsys)


class Doctor:
    """`ebi doctor` over the machine's volumes; the images are the world's."""

    def __init__(self, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
        machine.home.chmod(0o700)
        (machine.home / "images").symlink_to(machine.world.images.root)
        self._home, self._capsys = machine.home, capsys

    def __call__(self, *arguments: str) -> tuple[int, set[tuple[str, str, str]]]:
        """Its exit status, and (kind, subject, state) of what it found."""
        self._capsys.readouterr()
        root = logging.getLogger()
        level, handlers = root.level, list(root.handlers)
        status = main(["--data-dir", str(self._home), "doctor", "-o", "json", *arguments])
        root.setLevel(level)
        root.handlers[:] = handlers  # the command's own writes to what pytest closes
        items = json.loads(self._capsys.readouterr().out)["items"]
        return status, {(item["kind"], item["subject"], item["state"]) for item in items}


def break_off(machine: Machine, *names: str) -> None:
    """What a crash leaves: the volume "vol" unmounted, and its mappers `names` gone."""
    mounts.unmount(machine.staging / "vol")
    for name in names:
        dm.remove(name)


def attached_elsewhere(home: Path, file: Path) -> str:
    """A loop device over `file`, made in a mount namespace that is gone: the path that it tells is nowhere."""
    other = home / f"as the container sees {file.parent.name}"
    other.mkdir()
    script = 'mount --bind "$1" "$2" && losetup --find --show "$2/$3"'
    command = ["unshare", "--mount", "sh", "-ec", script, "sh", file.parent, other, file.name]
    device = subprocess.check_output(command, text=True).strip()
    backing = loop.backing(Path(device).name)
    assert backing and not Path(backing.path).exists()
    return device


class TestDoctor:
    def test_lists_and_removes_devices_that_carry_nothing(self, machine: Machine, world: World, doctor: Doctor) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        machine.create("used", 32 * MIB)
        with machine.used("used") as target:
            (target / "file").write_text("text")
            machine.stage("vol")
            break_off(machine, "ebi-vol-vol")
            assert doctor() == (1, {("idle", "volume vol", "wrong")})
            assert doctor("--fix") == (0, {("idle", "volume vol", "repaired")})
            assert (target / "file").read_text() == "text"
        assert doctor() == (0, set())

    def test_touches_nothing_in_use(self, machine: Machine, world: World, doctor: Doctor) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        machine.create("raw", 32 * MIB, encrypted="true")
        with machine.used("vol") as target, machine.used("raw", block=True):
            (target / "file").write_text("text")
            assert doctor("--fix", "--unstage") == (0, set())
            assert (target / "file").read_text() == "text"

    def test_finds_a_mapper_over_nothing_and_one_of_no_volume(self, machine: Machine, doctor: Doctor) -> None:
        machine.create("vol", 32 * MIB)
        machine.stage("vol", block=True)
        subprocess.run(["dmsetup", "wipe_table", "ebi-vol-vol"], check=True)
        file = machine.home / "volumes" / "file"
        file.write_bytes(bytes(MIB))
        with loop.attached(file) as device:
            number = subprocess.check_output(["lsblk", "-ndo", "MAJ:MIN", device], text=True).strip()
            dm.create("ebi-vol-absent", f"0 2048 linear {number} 0")
        assert doctor("--fix") == (
            0, {("broken", "volume vol", "repaired"), ("broken", "volume absent", "repaired")},
        )  # fmt: skip
        assert not list(dm.every("ebi-"))
        file.unlink()

    def test_leaves_the_devices_of_another_data_directory_alone(self, machine: Machine, doctor: Doctor) -> None:
        file = machine.home / "elsewhere"
        file.write_bytes(bytes(MIB))
        with loop.attached(file) as device:
            number = subprocess.check_output(["lsblk", "-ndo", "MAJ:MIN", device], text=True).strip()
            dm.create("ebi-cow-other", f"0 2048 linear {number} 0")
        assert doctor("--fix") == (0, set())
        dm.remove("ebi-cow-other")

    def test_resumes_what_is_suspended(self, machine: Machine, world: World, doctor: Doctor) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        with machine.used("vol") as target:
            dm.suspend("ebi-vol-vol")
            assert doctor("--fix") == (0, {("suspended", "volume vol", "repaired")})
            assert tree_hash(target).items() >= world.files.items()

    def test_knows_a_device_by_its_file_where_another_namespace_has_made_it(
        self, machine: Machine, doctor: Doctor
    ) -> None:
        volume = machine.create("vol", 32 * MIB)
        device = attached_elsewhere(machine.home, volume.path)
        dm.create("ebi-vol-vol", f"0 {32 * 2048} linear {blockdev.number(Path(device))} 0")
        subprocess.run(["losetup", "--detach", device], check=True)  # goes with its mapper
        dm.suspend("ebi-vol-vol")
        assert ("suspended", "volume vol", "repaired") in doctor("--fix")[1]
        dm.remove("ebi-vol-vol")

    def test_frees_a_loop_that_nothing_stands_on(self, machine: Machine, doctor: Doctor) -> None:
        volume = machine.create("vol", 32 * MIB)
        device = subprocess.check_output(["losetup", "--find", "--show", volume.path], text=True).strip()
        name = f"loop {Path(device).name}"
        assert doctor("--fix") == (0, {("loop-idle", name, "repaired")})
        assert not loop.below(machine.home)

    def test_frees_such_a_loop_that_another_namespace_has_made_where_nobody_works_on_its_volume(
        self, machine: Machine, doctor: Doctor
    ) -> None:
        volume = machine.create("vol", 32 * MIB)
        name = Path(attached_elsewhere(machine.home, volume.path)).name
        foreign = machine.home / "foreign" / "volume.img"
        foreign.parent.mkdir()
        foreign.write_bytes(bytes(MIB))
        theirs = attached_elsewhere(machine.home, foreign)
        with locked(volume.directory, "volume vol"):
            assert doctor("--fix") == (0, set())
        assert doctor("--fix") == (0, {("loop-idle", f"loop {name}", "repaired")})
        assert [name for name in loop.every() if loop.is_over(name, volume.path)] == []
        assert loop.is_over(Path(theirs).name, foreign)
        subprocess.run(["losetup", "--detach", theirs], check=True)

    def test_unmounts_a_published_device_that_is_gone(self, machine: Machine, doctor: Doctor) -> None:
        machine.create("vol", 32 * MIB)
        machine.stage("vol", block=True)
        target = machine.publish("vol", block=True)
        subprocess.run(["dmsetup", "remove", "--retry", "ebi-vol-vol"], check=True)
        condition = machine.volumes.stats("vol", target).condition
        assert (condition.abnormal, condition.message) == (True, "the device ebi-vol-vol is gone")
        assert doctor("--fix") == (0, {("stale-mount", f"mount {target}", "repaired")})
        assert not target.exists()


class TestNobodyUnstages:
    def test_a_stage_without_its_unstage_is_told_and_taken_down_when_asked_for(
        self, machine: Machine, world: World, doctor: Doctor
    ) -> None:
        """Kubelet died between unpublish and unstage; or a stage ended after its caller had given up."""
        machine.create("vol", 32 * MIB, world.encrypted)
        machine.create("raw", 32 * MIB)
        staging = machine.stage("vol")
        machine.publish("vol")
        machine.unpublish("vol")
        machine.stage("raw", block=True)
        notes = {("unused", "volume vol", "note"), ("unused", "volume raw", "note")}
        assert doctor("--fix") == (0, notes)
        machine.volumes.recover()
        assert machine.is_mounted(staging)
        with pytest.raises(EbiError, match="volume vol is staged") as refused:
            machine.volumes.delete("vol")
        assert refused.value.kind is Kind.PRECONDITION
        with machine.used("vol") as target:  # whoever comes for it gets it
            assert tree_hash(target).items() >= world.files.items()
        machine.stage("vol")
        assert doctor("--fix", "--unstage")[0] == 0
        assert leftovers() == []
        machine.volumes.delete("vol")

    def test_after_a_reboot_staging_is_all_that_is_needed(self, machine: Machine, world: World) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        machine.stage("vol")
        target = machine.publish("vol")
        (target / "file").write_text("kept")
        mounts.unmount(target)  # the directories are still there, mounts and mappers are not
        break_off(machine, "ebi-vol-vol", "ebi-cow-vol", "ebi-base-vol", f"ebi-img-{world.encrypted.uuid}")
        machine.volumes.recover()
        with machine.used("vol") as again:
            assert again == target
            assert (again / "file").read_text() == "kept"


class TestVanishedDevice:
    def test_what_it_stood_on_goes_by_itself_and_the_next_stage_works(self, machine: Machine, world: World) -> None:
        machine.create("vol", 32 * MIB, world.encrypted)
        machine.stage("vol", block=True)
        with machine.volumes.watching():
            subprocess.run(["dmsetup", "remove", "--retry", "ebi-vol-vol"], check=True)
            assert udev.watch().wait_until(lambda: not list(dm.every("ebi-")), 30)
        with machine.used("vol", block=True) as target:
            assert target.read_bytes()[: 24 * MIB] == world.plain.path.read_bytes()
        assert "reconcile" not in {thread.name for thread in threading.enumerate()}
