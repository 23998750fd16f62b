"""What an orchestrator may ask of the controller, and what it hears for what it may not."""

from collections.abc import Iterator
from typing import Any

import pytest

from csi.stubs import csi_pb2
from plugin.host.lock import locked
from tests.unit.csi_node import MIB, Mode, Node, code, mount, refused, running

HERE = {"topology.driver.longhorn.io/node": "node-1"}


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with running() as found:
        yield found


def test_a_volume_has_the_size_that_was_asked_for_and_a_place(node: Node) -> None:
    volume = node.create("pvc-1", 3 * MIB)
    assert volume.volume_id == "pvc-1"
    assert volume.capacity_bytes == 3 * MIB
    assert [dict(one.segments) for one in volume.accessible_topology] == [HERE]
    file = node.settings.data_dir / "volumes" / "pvc-1" / "volume.img"
    assert file.stat().st_blocks * 512 >= 3 * MIB, "its space is not reserved"


def test_the_same_volume_again_is_the_same_one(node: Node) -> None:
    assert node.create("pvc-twice") == node.create("pvc-twice")


@pytest.mark.parametrize("other", [{"size": 2 * MIB}, {"parameters": {"fsType": "xfs"}}])
def test_another_volume_of_that_name_already_exists(node: Node, other: dict[str, Any]) -> None:
    node.create("pvc-other", MIB, capacity_range=csi_pb2.CapacityRange(required_bytes=MIB, limit_bytes=MIB))
    assert code(lambda: node.create("pvc-other", **other)) == "ALREADY_EXISTS"


def test_a_volume_without_a_size_gets_the_default(node: Node) -> None:
    wanted = csi_pb2.CapacityRange(limit_bytes=2 << 30)
    assert node.create("pvc-default", capacity_range=wanted).capacity_bytes == 1 << 30
    node.controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id="pvc-default"))


def test_a_name_may_have_128_bytes_and_any_letters(node: Node) -> None:
    assert node.create("X" * 128).volume_id != node.create("X" * 127 + "Y").volume_id
    assert code(lambda: node.create("x" * 129)) == "INVALID_ARGUMENT"
    assert "name holds more than 128 bytes" in refused(lambda: node.create("x" * 129)).details()


SNAPSHOT = csi_pb2.VolumeContentSource(snapshot=csi_pb2.VolumeContentSource.SnapshotSource(snapshot_id="s"))
NO_MODE = csi_pb2.VolumeCapability(mount=csi_pb2.VolumeCapability.MountVolume())
NO_KIND = csi_pb2.VolumeCapability(access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": ""}, "name is missing"),
        ({"volume_capabilities": []}, "volume_capabilities are missing"),
        ({"volume_capabilities": [NO_MODE]}, "names no access mode"),
        ({"volume_capabilities": [NO_KIND]}, "names no access type"),
        ({"volume_capabilities": [mount(Mode.MULTI_NODE_MULTI_WRITER)]}, "MULTI_NODE_MULTI_WRITER"),
        ({"volume_capabilities": [mount(fs_type="ntfs")]}, "ntfs"),
        ({"volume_capabilities": [mount(mount_flags=["bind"])]}, "mount option"),
        ({"volume_content_source": SNAPSHOT}, "volume_content_source"),
        ({"parameters": {"encrypted": "maybe"}}, "encrypted"),
        ({"parameters": {"backingImageDataSourceParameters": "x" * 4096}}, "parameters holds more than 4096 bytes"),
    ],
)
def test_a_bad_request_is_refused_and_leaves_nothing(node: Node, change: dict[str, Any], words: str) -> None:
    request = {"name": "pvc-bad", **change}
    error = refused(lambda: node.create(**request))
    assert error.code().name == "INVALID_ARGUMENT"
    assert words in error.details()
    assert not (node.settings.data_dir / "volumes" / "pvc-bad").exists()


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [
        (2 * MIB, MIB, "OUT_OF_RANGE"),
        (-1, 0, "OUT_OF_RANGE"),
        (MIB + 1, MIB + 2, "OUT_OF_RANGE"),  # there is no multiple of 4096 between them
        (1 << 50, 0, "RESOURCE_EXHAUSTED"),
    ],
)
def test_a_size_that_can_not_be_had(node: Node, least: int, most: int, expected: str) -> None:
    wanted = csi_pb2.CapacityRange(required_bytes=least, limit_bytes=most)
    assert code(lambda: node.create("pvc-size", capacity_range=wanted)) == expected
    assert not (node.settings.data_dir / "volumes" / "pvc-size").exists()


def test_an_image_that_is_not_there_is_not_found(node: Node) -> None:
    assert code(lambda: node.create("pvc-image", parameters={"backingImage": "nowhere"})) == "NOT_FOUND"


def test_a_volume_wanted_elsewhere_is_refused(node: Node) -> None:
    def wanted(segments: dict[str, str]) -> csi_pb2.TopologyRequirement:
        return csi_pb2.TopologyRequirement(requisite=[csi_pb2.Topology(segments=segments)])

    elsewhere = wanted({**HERE, "topology.driver.longhorn.io/node": "node-2"})
    assert code(lambda: node.create("pvc-far", accessibility_requirements=elsewhere)) == "RESOURCE_EXHAUSTED"
    assert node.create("pvc-near", accessibility_requirements=wanted(HERE)).volume_id == "pvc-near"


def test_pages_go_on_where_the_last_one_ended_even_if_its_volumes_are_gone() -> None:
    with running() as node:
        names = [node.create(f"pvc-{number}").volume_id for number in range(5)]
        listed = node.controller.ListVolumes(csi_pb2.ListVolumesRequest())
        assert [entry.volume.volume_id for entry in listed.entries] == names
        assert listed.next_token == ""
        first = node.controller.ListVolumes(csi_pb2.ListVolumesRequest(max_entries=2))
        assert [entry.volume.volume_id for entry in first.entries] == names[:2]
        for name in names[:2]:
            node.controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=name))
        rest = csi_pb2.ListVolumesRequest(max_entries=3, starting_token=first.next_token)
        second = node.controller.ListVolumes(rest)
        assert [entry.volume.volume_id for entry in second.entries] == names[2:]
        assert second.next_token == ""


def test_a_page_that_nobody_gave_is_refused(node: Node) -> None:
    bad = csi_pb2.ListVolumesRequest(starting_token="invalid-token")
    assert code(lambda: node.controller.ListVolumes(bad)) == "ABORTED"
    less = csi_pb2.ListVolumesRequest(max_entries=-1)
    assert code(lambda: node.controller.ListVolumes(less)) == "INVALID_ARGUMENT"


def test_capacity_is_what_the_disk_has_and_none_elsewhere(node: Node) -> None:
    asked = csi_pb2.GetCapacityRequest(accessible_topology=csi_pb2.Topology(segments=HERE))
    answer = node.controller.GetCapacity(asked)
    assert answer.available_capacity > 0
    assert answer.maximum_volume_size.value == answer.available_capacity
    elsewhere = csi_pb2.GetCapacityRequest(accessible_topology=csi_pb2.Topology(segments={"zone": "b"}))
    assert node.controller.GetCapacity(elsewhere).available_capacity == 0


def expand(node: Node, volume: str, least: int, most: int = 0) -> csi_pb2.ControllerExpandVolumeResponse:
    wanted = csi_pb2.CapacityRange(required_bytes=least, limit_bytes=most)
    request = csi_pb2.ControllerExpandVolumeRequest(volume_id=volume, capacity_range=wanted)
    return node.controller.ControllerExpandVolume(request)


def test_a_volume_grows_and_never_shrinks(node: Node) -> None:
    node.create("pvc-grow", 2 * MIB)
    answer = expand(node, "pvc-grow", 4 * MIB)
    assert (answer.capacity_bytes, answer.node_expansion_required) == (4 * MIB, True)
    assert expand(node, "pvc-grow", MIB).capacity_bytes == 4 * MIB
    assert code(lambda: expand(node, "pvc-grow", MIB, 2 * MIB)) == "OUT_OF_RANGE"
    assert code(lambda: expand(node, "pvc-grow", 1 << 50)) == "RESOURCE_EXHAUSTED"
    listed = node.controller.ListVolumes(csi_pb2.ListVolumesRequest()).entries
    assert [one.volume.capacity_bytes for one in listed if one.volume.volume_id == "pvc-grow"] == [4 * MIB]


@pytest.mark.parametrize("offered", [True, False])
def test_growing_by_the_controller_is_offered_or_left_to_the_node(offered: bool) -> None:
    with running(controller_expand=offered) as node:
        found = node.controller.ControllerGetCapabilities(csi_pb2.ControllerGetCapabilitiesRequest()).capabilities
        assert (csi_pb2.ControllerServiceCapability.RPC.EXPAND_VOLUME in [one.rpc.type for one in found]) is offered
        found = node.node.NodeGetCapabilities(csi_pb2.NodeGetCapabilitiesRequest()).capabilities
        assert csi_pb2.NodeServiceCapability.RPC.EXPAND_VOLUME in [one.rpc.type for one in found]


def test_growing_needs_a_volume_and_a_size(node: Node) -> None:
    assert code(lambda: expand(node, "pvc-nowhere", MIB)) == "NOT_FOUND"
    none = csi_pb2.ControllerExpandVolumeRequest(volume_id="pvc-1")
    assert code(lambda: node.controller.ControllerExpandVolume(none)) == "INVALID_ARGUMENT"


def validate(node: Node, volume: str, **fields: Any) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
    request = csi_pb2.ValidateVolumeCapabilitiesRequest(volume_id=volume, **fields)
    return node.controller.ValidateVolumeCapabilities(request)


def test_capabilities_are_confirmed_all_or_none(node: Node) -> None:
    node.create("pvc-valid", parameters={"fsType": "ext4"})
    fine, shared = mount(), mount(Mode.MULTI_NODE_MULTI_WRITER)
    answer = validate(node, "pvc-valid", volume_capabilities=[fine], parameters={"fsType": "ext4"})
    assert list(answer.confirmed.volume_capabilities) == [fine]
    mixed = validate(node, "pvc-valid", volume_capabilities=[fine, shared])
    assert not mixed.HasField("confirmed")
    assert "MULTI_NODE_MULTI_WRITER" in mixed.message
    other = validate(node, "pvc-valid", volume_capabilities=[fine], parameters={"fsType": "xfs"})
    assert not other.HasField("confirmed")
    assert code(lambda: validate(node, "pvc-valid")) == "INVALID_ARGUMENT"
    assert code(lambda: validate(node, "pvc-nowhere", volume_capabilities=[fine])) == "NOT_FOUND"


def test_a_deleted_volume_is_gone_and_may_be_deleted_again(node: Node) -> None:
    node.create("pvc-gone")
    for _ in range(2):
        node.controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id="pvc-gone"))
    assert not (node.settings.data_dir / "volumes" / "pvc-gone").exists()
    assert code(lambda: node.controller.DeleteVolume(csi_pb2.DeleteVolumeRequest())) == "INVALID_ARGUMENT"


def test_an_id_that_is_a_path_deletes_nothing(node: Node) -> None:
    victim = node.settings.data_dir / "victim"
    victim.mkdir(exist_ok=True)
    for volume in ("../victim", str(victim), "..", "."):
        node.controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=volume))
        assert code(lambda volume=volume: expand(node, volume, MIB)) == "NOT_FOUND"
    assert victim.is_dir()


def test_a_second_operation_on_a_volume_is_aborted(node: Node) -> None:
    node.create("pvc-busy")
    with locked(node.settings.data_dir / "volumes" / "pvc-busy", "volume pvc-busy"):
        assert code(lambda: expand(node, "pvc-busy", 2 * MIB)) == "ABORTED"
        assert code(lambda: node.create("pvc-busy")) == "ABORTED"
    assert expand(node, "pvc-busy", 2 * MIB).capacity_bytes == 2 * MIB


def test_what_is_not_offered_is_unimplemented(node: Node) -> None:
    error = refused(lambda: node.controller.CreateSnapshot(csi_pb2.CreateSnapshotRequest()))
    assert error.code().name == "UNIMPLEMENTED"
    offered = node.controller.ControllerGetCapabilities(csi_pb2.ControllerGetCapabilitiesRequest()).capabilities
    rpc = csi_pb2.ControllerServiceCapability.RPC
    assert rpc.CREATE_DELETE_SNAPSHOT not in [one.rpc.type for one in offered]
