"""What the node service says to requests that it can't serve; those it can are in tests/kernel and tests/sanity."""

from collections.abc import Iterator
from typing import Any

import pytest

from csi.stubs import csi_pb2
from tests.unit.csi_node import MIB, Mode, Node, code, mount, refused, running


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with running() as found:
        found.create("pvc-1")
        yield found


def call(node: Node, method: str, **fields: Any) -> Any:
    return getattr(node.node, method)(getattr(csi_pb2, f"{method}Request")(**fields))


COMPLETE: dict[str, dict[str, Any]] = {
    "NodeStageVolume": {"staging_target_path": "/ebi-test/staging", "volume_capability": mount()},
    "NodeUnstageVolume": {"staging_target_path": "/ebi-test/staging"},
    "NodePublishVolume": {
        "staging_target_path": "/ebi-test/staging",
        "target_path": "/ebi-test/target",
        "volume_capability": mount(),
    },
    "NodeUnpublishVolume": {"target_path": "/ebi-test/target"},
    "NodeGetVolumeStats": {"volume_path": "/ebi-test/target"},
    "NodeExpandVolume": {"volume_path": "/ebi-test/target"},
}
FIELDS = [
    (method, field) for method, fields in COMPLETE.items() for field in fields if field != "staging_target_path"
] + [("NodeStageVolume", "staging_target_path"), ("NodeUnstageVolume", "staging_target_path")]


@pytest.mark.parametrize("method", COMPLETE)
def test_a_volume_id_must_be_there(node: Node, method: str) -> None:
    error = refused(lambda: call(node, method, **COMPLETE[method]))
    assert error.code().name == "INVALID_ARGUMENT"
    assert "volume_id is missing" in error.details()


@pytest.mark.parametrize(("method", "field"), FIELDS)
def test_every_field_that_is_needed_must_be_there(node: Node, method: str, field: str) -> None:
    fields = {key: value for key, value in COMPLETE[method].items() if key != field}
    error = refused(lambda: call(node, method, volume_id="pvc-1", **fields))
    assert error.code().name == "INVALID_ARGUMENT"
    assert f"{field} is missing" in error.details()


@pytest.mark.parametrize("method", ["NodeStageVolume", "NodePublishVolume", "NodeGetVolumeStats", "NodeExpandVolume"])
@pytest.mark.parametrize("volume", ["nowhere", "../pvc-1", "/etc", "PVC-1", "a/b", ".", "..", "pvcé", "x" * 69, "a\nb"])
def test_a_volume_that_can_not_be_is_not_found(node: Node, method: str, volume: str) -> None:
    assert code(lambda: call(node, method, volume_id=volume, **COMPLETE[method])) == "NOT_FOUND"


@pytest.mark.parametrize(
    ("method", "field"),
    [
        ("NodeStageVolume", "staging_target_path"),
        ("NodeUnstageVolume", "staging_target_path"),
        ("NodePublishVolume", "target_path"),
        ("NodeUnpublishVolume", "target_path"),
    ],
)
@pytest.mark.parametrize("path", ["relative/path", "/ebi-test/../etc", "/", "/nul\0byte", "/" + "x" * 5000])
def test_a_path_that_could_lead_anywhere_is_refused(node: Node, method: str, field: str, path: str) -> None:
    fields = {**COMPLETE[method], field: path}
    assert code(lambda: call(node, method, volume_id="pvc-1", **fields)) == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        (csi_pb2.VolumeCapability(mount=csi_pb2.VolumeCapability.MountVolume()), "names no access mode"),
        (csi_pb2.VolumeCapability(access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER)), "names no access type"),
        (mount(fs_type="ntfs"), "ntfs"),
        (mount(mount_flags=["loop=/dev/sda"]), "mount option 'loop'"),
        (mount(volume_mount_group="users"), "invalid volume_mount_group 'users'"),
        (mount(mount_flags=["x" * 3000, "y" * 3000]), "mount_flags holds more than 4096 bytes"),
    ],
)
def test_a_capability_that_can_not_be_had(node: Node, capability: csi_pb2.VolumeCapability, words: str) -> None:
    fields = {**COMPLETE["NodeStageVolume"], "volume_capability": capability}
    error = refused(lambda: call(node, "NodeStageVolume", volume_id="pvc-1", **fields))
    assert error.code().name == "INVALID_ARGUMENT"
    assert words in error.details()


def test_kubelet_leaves_the_group_and_several_paths_to_the_driver(node: Node) -> None:
    answer = node.node.NodeGetCapabilities(csi_pb2.NodeGetCapabilitiesRequest())
    rpc = csi_pb2.NodeServiceCapability.RPC
    assert {rpc.VOLUME_MOUNT_GROUP, rpc.SINGLE_NODE_MULTI_WRITER} <= {one.rpc.type for one in answer.capabilities}


def test_a_publish_needs_the_volume_staged(node: Node) -> None:
    fields = COMPLETE["NodePublishVolume"]
    assert code(lambda: call(node, "NodePublishVolume", volume_id="pvc-1", **fields)) == "FAILED_PRECONDITION"
    without = {key: value for key, value in fields.items() if key != "staging_target_path"}
    assert code(lambda: call(node, "NodePublishVolume", volume_id="pvc-1", **without)) == "FAILED_PRECONDITION"


def test_what_was_never_staged_or_published_may_be_taken_down(node: Node) -> None:
    call(node, "NodeUnpublishVolume", volume_id="pvc-1", target_path="/ebi-test/target")
    call(node, "NodeUnstageVolume", volume_id="pvc-1", staging_target_path="/ebi-test/staging")


@pytest.mark.parametrize("volume", ["../pvc-1", "a/b", "..", "pvcé", "x" * 69])
def test_taking_down_a_volume_by_an_id_that_is_a_path_does_nothing(node: Node, volume: str) -> None:
    for one in ("NodeUnpublishVolume", "NodeUnstageVolume"):
        assert code(lambda one=one: call(node, one, volume_id=volume, **COMPLETE[one])) == "NOT_FOUND"


@pytest.mark.parametrize(
    ("method", "field"), [("NodeStageVolume", "staging_target_path"), ("NodePublishVolume", "target_path")]
)
def test_nothing_is_mounted_over_the_driver_s_own_files(node: Node, method: str, field: str) -> None:
    path = str(node.settings.data_dir / "volumes" / "pvc-1" / "volume.img")
    error = refused(lambda: call(node, method, volume_id="pvc-1", **{**COMPLETE[method], field: path}))
    assert error.code().name == "INVALID_ARGUMENT"
    assert "in the data directory" in error.details()


@pytest.mark.parametrize("method", ["NodeGetVolumeStats", "NodeExpandVolume"])
def test_a_volume_is_not_found_where_it_is_not(node: Node, method: str) -> None:
    for path in ("some/path", "/ebi-test/target"):
        assert code(lambda path=path: call(node, method, volume_id="pvc-1", volume_path=path)) == "NOT_FOUND"


def test_a_node_without_the_devices_says_so_and_the_volume_stays(node: Node, tmp_path: Any) -> None:
    range_ = csi_pb2.CapacityRange(required_bytes=64 * MIB)
    fields = {"volume_path": str(tmp_path), "capacity_range": range_}
    assert code(lambda: call(node, "NodeExpandVolume", volume_id="pvc-1", **fields)) == "NOT_FOUND"
    listed = node.controller.ListVolumes(csi_pb2.ListVolumesRequest()).entries
    assert [entry.volume.capacity_bytes for entry in listed] == [MIB]
