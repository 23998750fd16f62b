"""Mountinfo, as the kernel writes it."""

from pathlib import Path

from plugin.host import blockdev, mounts

TEXT = r"""
22 1 0:21 / /sys rw,nosuid shared:2 - sysfs sysfs rw
36 22 253:3 / /var/lib/a\040b\011c rw,noatime shared:5 master:2 - ext4 /dev/mapper/ebi-vol-x rw,discard
40 22 0:5 /dm-3 /pods/vol rw,relatime - devtmpfs udev ro,size=1k
41 22 0:40 /sub /mnt/back\134slash ro - btrfs /dev/mapper/ebi-vol-y rw
"""


def test_a_line_is_read_whole() -> None:
    mount = mounts.table(TEXT)[1]
    assert mount.target == Path("/var/lib/a b\tc")
    assert (mount.device, mount.root, mount.fs_type) == ("253:3", "/", "ext4")
    assert mount.source == "/dev/mapper/ebi-vol-x"
    assert mount.options == {"rw", "noatime"}
    assert not mount.readonly


def test_read_only_by_mount_or_by_superblock() -> None:
    assert [mount.readonly for mount in mounts.table(TEXT)] == [False, False, True, True]
    assert mounts.table(TEXT)[3].target == Path("/mnt/back\\slash")


def test_this_process_sees_a_root() -> None:
    assert mounts.at(Path("/")) is not None
    assert mounts.at(Path("/proc")) is not None
    assert mounts.at(Path("/absent/path")) is None


def test_filesystem_sizes_of_what_is_none(tmp_path: Path) -> None:
    for content in (b"", bytes(100), bytes(1 << 20)):
        path = tmp_path / "file"
        path.write_bytes(content)
        assert blockdev.filesystem_size(path) is None
        assert blockdev.is_blank(path)
