"""The machine's parts by themselves: loop devices, mappers, mounts, uevents."""

import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from plugin import events
from plugin.errors import EbiError, Kind
from plugin.host import blockdev, dm, dmcontrol, loop, mounts, udev

MIB = 1 << 20


def make_file(path: Path, size: int = 8 * MIB) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def linear(device: Path, size: int = 8 * MIB) -> str:
    return f"0 {size // 512} linear {blockdev.number(device)} 0"


class TestLoop:
    def test_is_freed_with_its_last_user(self, home: Path) -> None:
        file = make_file(home / "file")
        with loop.attached(file) as device:
            assert loop.is_over(device.name, file)
            assert blockdev.size(device) == 8 * MIB
        assert udev.watch().wait_until(lambda: not loop.below(home), 5)

    def test_outlives_its_maker_under_a_mapper(self, home: Path) -> None:
        file = make_file(home / "file")
        with loop.attached(file) as device:
            mapper = dm.create("ebi-vol-test", linear(device))
        assert mapper.slaves == {device.name}
        assert loop.is_over(device.name, file)
        dm.remove("ebi-vol-test")

    def test_is_not_mistaken_for_one_over_a_file_of_the_same_name(self, home: Path) -> None:
        file = make_file(home / "file")
        with loop.attached(file) as device:
            file.unlink()
            assert not loop.is_over(device.name, file)
            make_file(file)
            assert not loop.is_over(device.name, file)

    def test_read_only_refuses_writes(self, home: Path) -> None:
        with loop.attached(make_file(home / "file"), readonly=True) as device, pytest.raises(OSError):
            blockdev.zero(device, 4096)

    def test_follows_its_growing_file(self, home: Path) -> None:
        file = make_file(home / "file")
        with loop.attached(file) as device:
            os.truncate(file, 16 * MIB)
            loop.set_capacity(device.name)
            assert blockdev.size(device) == 16 * MIB

    def test_however_many_refused_discards_before_the_next_one_takes_them(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loop, "_ATTEMPTS", 2)
        with ExitStack() as stack:
            for number in range(5):
                stack.enter_context(loop.attached(make_file(home / f"file{number}"), discards=False))
        assert udev.watch().wait_until(lambda: not loop.below(home), 5)
        with loop.attached(make_file(home / "file")) as device:
            assert int(Path(f"/sys/block/{device.name}/queue/discard_max_bytes").read_text()) > 0

    def test_many_at_once_each_get_their_own(self, home: Path) -> None:
        files = [make_file(home / f"file{number}") for number in range(24)]
        together = threading.Barrier(len(files))

        def attach(file: Path) -> str:
            with loop.attached(file) as device:
                together.wait(60)
                assert loop.is_over(device.name, file)
                together.wait(60)
                return device.name

        with ThreadPoolExecutor(len(files)) as pool:
            assert len(set(pool.map(attach, files))) == len(files)


class TestMapper:
    def test_in_use_by_another_is_refused_by_name(self, home: Path) -> None:
        with loop.attached(make_file(home / "file")) as device:
            below = dm.create("ebi-cow-test", linear(device))
            dm.create("ebi-vol-test", linear(below.path))
        with pytest.raises(EbiError, match="ebi-cow-test is in use by the devices dm-") as refused:
            dm.remove("ebi-cow-test")
        assert refused.value.kind is Kind.PRECONDITION
        dm.remove("ebi-vol-test")
        dm.remove("ebi-cow-test")

    def test_absent_is_removed_already(self) -> None:
        dm.remove("ebi-vol-absent")
        assert dm.find("ebi-vol-absent") is None

    def test_every_one_is_listed_though_the_kernel_has_to_be_asked_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dmcontrol, "_LEAST", 400)
        names = [f"ebi-vol-test{number}" for number in range(4)]
        for name in names:
            dm.create(name, "0 8 zero")
        assert [mapper.name for mapper in dm.every("ebi-vol-test")] == names
        assert dm.find("ebi-vol-test") is None
        for name in names:
            found = dm.find(name)
            assert found is not None
            assert found.number == blockdev.number(found.path)
            dm.remove(name)
        assert not list(dm.every("ebi-vol-test"))

    def test_that_vanishes_by_another_hand_is_told_as_lost(self, home: Path) -> None:
        heard: list[events.DeviceEvent] = []
        stop = events.subscribe(lambda event: heard.append(event) if isinstance(event, events.DeviceEvent) else None)
        try:
            with loop.attached(make_file(home / "file")) as device:
                dm.create("ebi-vol-ours", linear(device))
                dm.create("ebi-vol-lost", linear(device))
            dm.remove("ebi-vol-ours")
            subprocess.run(["dmsetup", "remove", "--retry", "ebi-vol-lost"], check=True)
            removed = {"ebi-vol-ours": False, "ebi-vol-lost": True}
            assert udev.watch().wait_until(
                lambda: {event.name: event.lost for event in heard if event.action == "remove"} == removed, 10
            ), heard
        finally:
            stop()


class TestMount:
    def test_bind_of_a_directory_can_be_read_only(self, home: Path) -> None:
        source, writable, readonly = home / "source", home / "writable", home / "readonly"
        for directory in (source, writable, readonly):
            directory.mkdir()
        mounts.bind(source, writable)
        mounts.bind(source, readonly, readonly=True)
        (writable / "file").write_text("text")
        assert (readonly / "file").read_text() == "text"
        with pytest.raises(OSError, match="Read-only"):
            (readonly / "file").write_text("other")
        seen = mounts.at(readonly)
        assert seen is not None
        assert seen.readonly
        assert mounts.unmount(readonly)
        assert mounts.unmount(writable)
        assert not mounts.unmount(writable)

    def test_bind_of_a_device_on_a_file(self, home: Path) -> None:
        target = home / "target"
        target.touch()
        with loop.attached(make_file(home / "file")) as device:
            mounts.bind(device, target)
            assert blockdev.number(target) == blockdev.number(device)
            mounts.unmount(target)

    def test_no_symbolic_link_is_followed(self, home: Path) -> None:
        (home / "source").mkdir()
        (home / "elsewhere").mkdir()
        (home / "link").symlink_to(home / "elsewhere")
        with pytest.raises(EbiError):
            mounts.bind(home / "source", home / "link")
        assert mounts.at(home / "elsewhere") is None

    def test_names_with_spaces(self, home: Path) -> None:
        target = home / "a b\tc"
        target.mkdir()
        mounts.bind(target, target)
        assert mounts.at(target) is not None
        mounts.unmount(target)

    def test_in_use_is_a_precondition(self, home: Path) -> None:
        target = home / "target"
        target.mkdir()
        mounts.bind(target, target)
        with (target / "open").open("w"), pytest.raises(EbiError) as refused:
            mounts.unmount(target)
        assert refused.value.kind is Kind.PRECONDITION
        mounts.unmount(target)


class TestBlockDevice:
    @pytest.mark.parametrize("fs_type", ["ext4", "xfs", "btrfs"])
    def test_filesystem_size_is_what_mkfs_was_told(self, home: Path, fs_type: str) -> None:
        file = make_file(home / "file", 512 * MIB)
        assert blockdev.probe(file) is None
        assert blockdev.is_blank(file)
        subprocess.run([f"mkfs.{fs_type}", file], check=True, capture_output=True)
        signature = blockdev.probe(file)
        assert signature is not None
        assert (signature.type, signature.is_filesystem) == (fs_type, True)
        assert blockdev.filesystem_size(file) == 512 * MIB
        assert not blockdev.is_blank(file)

    def test_contradicting_signatures_are_refused(self, home: Path) -> None:
        file = make_file(home / "file", 512 * MIB)
        subprocess.run(["mkfs.xfs", file], check=True, capture_output=True)
        magic = b"\x53\xef"
        with file.open("r+b") as image:
            subprocess.run(["mkfs.ext4", "-q", home / "other", "64M"], check=True, capture_output=True)
            superblock = (home / "other").read_bytes()[1024:2048]
            assert superblock[56:58] == magic
            image.seek(1024)
            image.write(superblock)
        with pytest.raises(EbiError, match="several kinds") as refused:
            blockdev.probe(file)
        assert refused.value.kind is Kind.PRECONDITION


def test_a_mount_that_another_one_hides_is_not_waited_for(home: Path) -> None:
    hidden = home / "above" / "hidden"
    hidden.mkdir(parents=True)
    for target in (hidden, hidden.parent):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", target], check=True)
    try:
        with pytest.raises(EbiError, match="hidden by another mount"):
            mounts.unmount(hidden)
    finally:
        mounts.unmount(hidden.parent)
        mounts.unmount(hidden)


def test_a_mount_of_any_name_is_read(home: Path) -> None:
    target = Path(os.fsdecode(bytes(home) + b"/\xff"))
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", target], check=True)
    try:
        assert mounts.at(target) is not None
    finally:
        assert mounts.unmount(target)
