"""What a StorageClass and a capability may say."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugin.errors import EbiError, Kind
from plugin.volumes import Capability, names, parameters, paths

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
            ("mkfsParams", "-d /etc"),
            ("mkfsParams", "sda"),
            ("mkfsParams", "-L 'open"),
            ("encryptd", "true"),
        ],
    )
    def test_a_wrong_one_is_named(self, name: str, value: str) -> None:
        with pytest.raises(EbiError, match=name) as refused:
            parameters.parse({name: value})
        assert refused.value.kind is Kind.INVALID

    def test_mkfs_options_are_split_as_a_shell_would(self) -> None:
        assert parameters.parse({"mkfsParams": "-b 4096 -L 'a label'"}).mkfs_options == ("-b", "4096", "-L", "a label")


class TestVolumeId:
    @pytest.mark.parametrize("name", ["pvc-1", "a", "a.b", "x" * 63])
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

    @pytest.mark.parametrize("text", ["", ".", "..", "../x", "a/b", "-a", "a-", "A", "a\n", "x" * 64, "a\0"])
    def test_what_could_be_a_path_is_none(self, text: str) -> None:
        assert not names.is_volume_id(text)


class TestCapability:
    @pytest.mark.parametrize("flag", ["bind", "remount", "loop=/dev/loop0", "noatime,suid", "X-mount.mkdir", "dev"])
    def test_a_dangerous_mount_option_is_refused(self, flag: str) -> None:
        with pytest.raises(EbiError, match=r"mount option .* is not allowed") as refused:
            Capability(mount_flags=(flag,)).check()
        assert refused.value.kind is Kind.INVALID

    def test_usual_mount_options_pass(self) -> None:
        capability = Capability(fs_type="xfs", mount_flags=("noatime,nodiratime", "ro", "discard"))
        capability.check()
        assert capability.options == ("noatime", "nodiratime", "ro", "discard")

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
