"""A pod's group on the files of a volume. Without root only a group of one's own can be given."""

import os
import stat
from pathlib import Path

import pytest

from plugin.errors import EbiError, Kind
from plugin.volumes import Capability, group

OURS = os.getgid()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_files_and_directories_are_opened_to_the_group_and_keep_their_other_bits(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir(mode=0o700)
    (tmp_path / "deep" / "program").touch(mode=0o755)
    (tmp_path / "deep" / "secret").touch(mode=0o600)
    os.mkfifo(tmp_path / "pipe", 0o600)
    group.give(tmp_path, OURS)
    assert mode(tmp_path) == 0o2770
    assert mode(tmp_path / "deep") == 0o2770
    assert mode(tmp_path / "deep" / "program") == 0o775
    assert mode(tmp_path / "deep" / "secret") == 0o660
    assert mode(tmp_path / "pipe") == 0o660
    (tmp_path / "deep" / "new").touch()
    assert (tmp_path / "deep" / "new").stat().st_gid == OURS


def test_a_root_that_has_the_group_already_is_all_that_is_looked_at(tmp_path: Path) -> None:
    group.give(tmp_path, OURS)
    (tmp_path / "later").touch(mode=0o600)
    group.give(tmp_path, OURS)
    assert mode(tmp_path / "later") == 0o600


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir(mode=0o700)
    (tmp_path / "outside" / "file").touch(mode=0o600)
    root = tmp_path / "root"
    root.mkdir()
    (root / "directory").symlink_to(tmp_path / "outside")
    (root / "file").symlink_to(tmp_path / "outside" / "file")
    group.give(root, OURS)
    assert mode(tmp_path / "outside") == 0o700
    assert mode(tmp_path / "outside" / "file") == 0o600


def test_without_a_group_everything_stays(tmp_path: Path) -> None:
    before = mode(tmp_path)
    group.give(tmp_path, None)
    assert mode(tmp_path) == before


@pytest.mark.parametrize(("text", "number"), [("", None), ("0", 0), ("4711", 4711), ("4294967294", 4294967294)])
def test_a_group_is_a_number(text: str, number: int | None) -> None:
    assert Capability(mount_group=text).group == number


@pytest.mark.parametrize("text", ["-1", "users", "4294967295", "1.0", "٣", " 5", "9" * 99])
def test_what_is_no_group_is_refused(text: str) -> None:
    with pytest.raises(EbiError, match="invalid volume_mount_group") as refused:
        Capability(mount_group=text).check()
    assert refused.value.kind is Kind.INVALID
