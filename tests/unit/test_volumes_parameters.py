"""What a StorageClass and a capability may say."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugin.errors import EbiError, Kind
from plugin.host import blockdev, mounts
from plugin.settings import Settings
from plugin.volumes import Capability, filesystem, names, parameters, paths

SEED = {
    "numberOfReplicas": "3",
    "staleReplicaTimeout": "2880",
    "fromBackup": "",
    "encrypted": "true",
    "backingImage": "parrot-cloned-encrypted",
    "backingImageDataSourceType": "clone",
    "csi.storage.k8s.io/node-stage-secret-name": "longhorn-crypto",
}


class TestParameters:
    def test_the_seed_storage_class_is_read(self) -> None:
        found = parameters.parse(SEED)
        assert (found.encrypted, found.image, found.image_source_type) == (True, "parrot-cloned-encrypted", "clone")
        assert found.ignored == ("numberOfReplicas", "staleReplicaTimeout")

    def test_nothing_given_is_a_plain_blank_volume(self) -> None:
        found = parameters.parse({})
        assert (found.encrypted, found.image, found.fs_type) == (False, "", "")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("encrypted", "yes"),
            ("encrypted", "1"),
            ("fsType", "ntfs"),
            ("backingImageChecksum", "12ab"),
            ("backingImageDataSourceParameters", "not JSON"),
            ("backingImageDataSourceParameters", '{"url": 5}'),
            ("mkfsParams", "-b 4096 /dev/sda"),
            ("mkfsParams", "-L 'open"),
            ("encryptd", "true"),
            ("discard", "yes"),
            ("cryptNoReadWorkqueue", "true"),  # of a volume that is not encrypted
            ("cryptNoWriteWorkqueue", "true"),
            ("fromBackup", "s3://backups@here/?volume=pvc-1&backup=b"),
        ],
    )
    def test_a_wrong_one_is_named(self, name: str, value: str) -> None:
        with pytest.raises(EbiError, match=name) as refused:
            parameters.parse({name: value})
        assert refused.value.kind is Kind.INVALID

    def test_flags_of_dm_crypt_are_read(self) -> None:
        given = {"encrypted": "true", "cryptNoReadWorkqueue": "true", "discard": "true"}
        flags = parameters.parse(given).flags
        assert flags.names == {"no-read-workqueue", "allow-discards"}
        assert flags.arguments() == ["--allow-discards", "--perf-no_read_workqueue", "--persistent"]
        assert flags.arguments(["no-read-workqueue", "allow-discards"]) == [
            "--allow-discards",
            "--perf-no_read_workqueue",
        ]
        assert parameters.parse({"encrypted": "true"}).flags.arguments() == []

    def test_discards_do_not_go_with_an_image(self) -> None:
        with pytest.raises(EbiError, match="discard is for volumes that start from no backing image"):
            parameters.parse({"discard": "true", "backingImage": "golden"})

    @pytest.mark.parametrize(
        "text",
        [
            "-d /etc",
            "-d .",  # copies the server's own directory
            "-d etc",
            "-Fd .",
            "-qd.",
            "-z undo",  # writes a file
            "-J device=LABEL=other",
            "-l badblocks",
            "-l logdev=sda",
            "-d name=sda",
            "-r sda",
            "-p protofile",
            "-c options=file",
            "--rootdir .",
            "--rootdir=.",
            "--root .",
            "-S",
            "-L",
            "sda",
            "-b 4096 sda",
            "-F sda",
            "--",
        ],
    )
    def test_mkfs_options_that_reach_files_or_other_devices_are_refused(self, text: str) -> None:
        with pytest.raises(EbiError, match="mkfsParams") as refused:
            parameters.parse({"mkfsParams": text})
        assert refused.value.kind is Kind.INVALID

    @pytest.mark.parametrize(
        "text",
        [
            "-b 4096 -N 4096 -i 8192 -O ^has_journal -E lazy_itable_init=1,nodiscard -J size=64 -m 1",
            "-f -m reflink=0,crc=1 -d agcount=4 -l size=64m -n size=8k -K",
            "-d single -m dup --csum xxhash --nodesize=16384 --mixed -L label",
            "",
        ],
    )
    def test_usual_mkfs_options_pass(self, text: str) -> None:
        assert parameters.parse({"mkfsParams": text}).mkfs_options == tuple(text.split())

    def test_mkfs_options_are_split_as_a_shell_would(self) -> None:
        assert parameters.parse({"mkfsParams": "-b 4096 -L 'a label'"}).mkfs_options == ("-b", "4096", "-L", "a label")


class TestVolumeId:
    @pytest.mark.parametrize("name", ["pvc-1", "a", "a.b", "csi-" + "0" * 64])
    def test_a_plain_name_is_its_own_id(self, name: str) -> None:
        assert names.volume_id(name) == name

    @given(st.text(min_size=1, max_size=128))
    def test_every_name_gets_a_safe_one(self, name: str) -> None:
        found = names.volume_id(name)
        assert names.is_volume_id(found)
        assert len(names.base(found).encode()) <= 127
        assert "/" not in found

    def test_different_names_get_different_ones(self) -> None:
        assert names.volume_id("A b") != names.volume_id("a B")

    @pytest.mark.parametrize("text", ["", ".", "..", "../x", "a/b", "-a", "a-", "A", "a\n", "x" * 69, "a\0", "ä"])
    def test_what_could_be_a_path_is_none(self, text: str) -> None:
        assert not names.is_volume_id(text)


class TestCapability:
    @pytest.mark.parametrize(
        "flag",
        [
            "bind",
            "remount",
            "loop=/dev/loop0",
            "noatime,suid",
            "X-mount.mkdir",
            "dev",
            " loop",
            "LOOP",
            "noatime,,bind",
            "verity.hashdevice=a",
            "errors=panic",
            "fatal_errors=panic",
            "logdev=/dev/sda",
        ],
    )
    def test_a_dangerous_mount_option_is_refused(self, flag: str) -> None:
        with pytest.raises(EbiError, match=r"mount option .* is not allowed") as refused:
            Capability(mount_flags=(flag,)).check()
        assert refused.value.kind is Kind.INVALID

    def test_usual_mount_options_pass(self) -> None:
        capability = Capability(fs_type="xfs", mount_flags=("noatime,nodiratime", "ro", "discard"))
        capability.check()
        assert capability.options == ("noatime", "nodiratime", "ro", "discard")
        label = 'context="system_u:object_r:container_file_t:s0:c1,c2"'  # kubelet's own, where it mounts with SELinux
        Capability(mount_flags=(label, "errors=remount-ro")).check()

    def test_an_unknown_filesystem_is_refused(self) -> None:
        with pytest.raises(EbiError, match="unsupported filesystem 'ntfs'"):
            Capability(fs_type="ntfs").check()


class TestPaths:
    @pytest.mark.parametrize("path", ["relative", "/", "/a/../b", ".", "a/b"])
    def test_relative_and_climbing_ones_are_refused(self, path: str) -> None:
        with pytest.raises(EbiError) as refused:
            paths.checked(Path(path), "target path")
        assert refused.value.kind is Kind.INVALID

    def test_symbolic_links_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("/etc")
        with pytest.raises(EbiError, match="symbolic link"):
            paths.checked(tmp_path / "link", "target path")

    def test_the_data_directory_is_no_place_to_mount_at(self, tmp_path: Path) -> None:
        settings = Settings(data_dir=tmp_path / "ebi")
        (tmp_path / "link").symlink_to(tmp_path / "ebi")
        (tmp_path / "ebi" / "images").mkdir(parents=True)
        for path in ("ebi/images", "ebi/images/x", "ebi", "link/images"):
            with pytest.raises(EbiError, match="in the data directory"):
                paths.usable(tmp_path / path, "target path", settings)
        assert paths.usable(tmp_path / "ebi-targets", "target path", settings) == tmp_path / "ebi-targets"

    def test_a_directory_that_was_replaced_by_a_link_leads_nowhere(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "target").touch()
        (tmp_path / "parent").mkdir()
        target = paths.checked(tmp_path / "parent" / "target", "target path")
        (tmp_path / "parent").rmdir()
        (tmp_path / "parent").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(EbiError), mounts.opened(target):
            pass
        for block in (False, True):
            with pytest.raises(EbiError):
                paths.make_target(tmp_path / "parent" / "new", block=block)
        assert [entry.name for entry in (tmp_path / "elsewhere").iterdir()] == ["target"]

    def test_what_leads_out_of_the_root_is_refused(self, tmp_path: Path) -> None:
        root = tmp_path / "root"
        root.mkdir()
        (root / "out").symlink_to(tmp_path)
        assert paths.checked(root / "in", "target path", str(root)) == root / "in"
        with pytest.raises(EbiError, match="outside"):
            paths.checked(root / "out" / "x", "target path", str(root))
        with pytest.raises(EbiError, match="outside"):
            paths.checked(tmp_path / "rooted", "target path", str(root))

    def test_the_target_is_made_and_removed(self, tmp_path: Path) -> None:
        for block in (False, True):
            target = tmp_path / f"target-{block}"
            assert paths.make_target(target, block=block)
            assert not paths.make_target(target, block=block)
            assert target.is_dir() != block
            with pytest.raises(EbiError, match="target path"):
                paths.make_target(target, block=not block)
            paths.remove_target(target)
            paths.remove_target(target)
            assert not target.exists()

    def test_what_holds_anything_is_no_target_of_ours(self, tmp_path: Path) -> None:
        file, directory, link = tmp_path / "file", tmp_path / "directory", tmp_path / "link"
        file.write_text("somebody's")
        directory.mkdir()
        (directory / "inside").touch()
        link.symlink_to(file)
        for target in (file, directory, link):
            paths.remove_target(target)
        assert (file.read_text(), link.is_symlink(), (directory / "inside").exists()) == ("somebody's", True, True)


@pytest.mark.parametrize(("behaviour", "expected"), [("panic", True), ("continue", False), ("remount-ro", False)])
def test_a_filesystem_that_would_take_the_node_down_is_known(tmp_path: Path, behaviour: str, expected: bool) -> None:
    file = tmp_path / "file"
    subprocess.run(["mkfs.ext4", "-q", "-e", behaviour, file, "4M"], check=True, capture_output=True)
    assert blockdev.ext_panics(file) is expected


def test_a_partition_table_is_not_mounted_and_what_to_do_is_said(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    first = bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little") + (2048).to_bytes(4, "little")
    with disk.open("wb") as file:
        file.write(bytes(446) + first + bytes(48) + b"\x55\xaa")
        file.truncate(4 << 20)
    words = r"volume pvc-1 holds a partition table \(dos\), .* \(use it as a raw block device .*attach --block"
    with pytest.raises(EbiError, match=words) as caught:
        filesystem.find(disk, "", "volume pvc-1")
    assert caught.value.kind is Kind.PRECONDITION
