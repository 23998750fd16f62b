"""Inline volumes that can't be had; those that can are in tests/kernel."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from csi.stubs import csi_pb2
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import Volumes
from plugin.volumes.record import RECORD
from tests.unit.csi_node import MIB, Mode, Node, code, mount, refused, running

ID = "csi-" + "0f" * 32  # as kubelet names them
ASKED = {"csi.storage.k8s.io/ephemeral": "true", "csi.storage.k8s.io/pod.name": "pod", "size": "2Mi"}
BLOCK = csi_pb2.VolumeCapability(
    block=csi_pb2.VolumeCapability.BlockVolume(), access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER)
)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with running() as found:
        yield found


def publish(node: Node, target: Path, volume: str = ID, **fields: Any) -> None:
    given = {"volume_capability": mount(), "volume_context": ASKED, "target_path": str(target), **fields}
    node.node.NodePublishVolume(csi_pb2.NodePublishVolumeRequest(volume_id=volume, **given))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"volume_context": {**ASKED, "size": "much"}}, "invalid size of an inline volume"),
        ({"volume_context": {**ASKED, "encryptd": "true"}}, "unknown StorageClass parameter 'encryptd'"),
        ({"volume_context": {**ASKED, "backingImageDataSourceType": "download"}}, "an inline volume can't have"),
        ({"volume_capability": BLOCK}, "can't be a raw device"),
        ({"volume_capability": mount(fs_type="ntfs")}, "ntfs"),
        ({"volume_capability": mount(mount_flags=["bind"])}, "mount option 'bind'"),
        ({"target_path": "relative"}, "must be absolute"),
    ],
)
def test_a_bad_one_is_refused_and_leaves_nothing(
    node: Node, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    error = refused(lambda: publish(node, tmp_path / "target", **fields))
    assert error.code().name == "INVALID_ARGUMENT"
    assert words in error.details()
    assert not (node.settings.data_dir / "volumes" / ID).exists()


def test_its_image_must_be_there(node: Node, tmp_path: Path) -> None:
    assert (
        code(lambda: publish(node, tmp_path / "target", volume_context={**ASKED, "backingImage": "a"})) == "NOT_FOUND"
    )
    assert not (node.settings.data_dir / "volumes" / ID).exists()


def test_a_volume_of_an_orchestrator_is_no_inline_one(node: Node, tmp_path: Path) -> None:
    node.create("pvc-1", 2 * MIB)
    assert code(lambda: publish(node, tmp_path / "target", "pvc-1")) == "ALREADY_EXISTS"
    assert (node.settings.data_dir / "volumes" / "pvc-1").exists()


def test_what_was_never_published_may_be_unpublished(node: Node, tmp_path: Path) -> None:
    request = csi_pb2.NodeUnpublishVolumeRequest(volume_id=ID, target_path=str(tmp_path / "target"))
    node.node.NodeUnpublishVolume(request)


def test_without_the_word_of_kubelet_a_publish_needs_a_staging_path(node: Node, tmp_path: Path) -> None:
    for context in ({}, {"csi.storage.k8s.io/ephemeral": "false"}):
        call = lambda context=context: publish(node, tmp_path / "target", "pvc-1", volume_context=context)  # noqa: E731
        assert code(call) == "FAILED_PRECONDITION"


def test_that_of_a_pod_that_is_gone_is_found_and_removed_and_another_s_is_not(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    volumes = Volumes(tmp_path / "volumes", Images(tmp_path / "images", settings), settings)
    (tmp_path / "pod").mkdir()
    volumes.create("csi-there", MIB, {}, target=str(tmp_path / "pod" / "mount"))
    volumes.create("csi-gone", MIB, {}, target=str(tmp_path / "other" / "mount"))
    volumes.create("pvc-1", MIB, {})
    found = [finding for finding in volumes.examine() if finding.kind == "forgotten"]
    assert [(finding.subject, finding.safe) for finding in found] == [("inline volume csi-gone", True)]
    volumes.recover()
    assert [volume.id for volume in volumes.list()] == ["csi-there", "pvc-1"]


def test_a_damaged_record_keeps_nobody_from_unpublishing(node: Node, tmp_path: Path) -> None:
    node.create("pvc-damaged", MIB)
    (node.settings.data_dir / "volumes" / "pvc-damaged" / RECORD).write_text("{")
    request = csi_pb2.NodeUnpublishVolumeRequest(volume_id="pvc-damaged", target_path=str(tmp_path / "target"))
    node.node.NodeUnpublishVolume(request)
