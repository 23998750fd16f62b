"""Who the driver says it is."""

from collections.abc import Iterator
from importlib.metadata import version

import pytest

from csi.stubs import csi_pb2
from plugin.host import requirements
from tests.unit.csi_node import Node, refused, running


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with running(driver_name="ebi.example.com") as found:
        yield found


def test_the_driver_has_the_name_of_the_settings_and_the_version_of_the_package(node: Node) -> None:
    answer = node.identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest())
    assert (answer.name, answer.vendor_version) == ("ebi.example.com", version("ebi"))


def test_it_has_a_controller_ties_volumes_to_nodes_and_grows_them_online(node: Node) -> None:
    capability = csi_pb2.PluginCapability
    answer = node.identity.GetPluginCapabilities(csi_pb2.GetPluginCapabilitiesRequest())
    services = {one.service.type for one in answer.capabilities if one.HasField("service")}
    growth = {one.volume_expansion.type for one in answer.capabilities if one.HasField("volume_expansion")}
    assert services == {capability.Service.CONTROLLER_SERVICE, capability.Service.VOLUME_ACCESSIBILITY_CONSTRAINTS}
    assert growth == {capability.VolumeExpansion.ONLINE}


def test_a_probe_tells_what_this_machine_lacks(node: Node) -> None:
    missing = requirements.missing()
    if not missing:
        assert node.identity.Probe(csi_pb2.ProbeRequest()).ready.value
        return
    error = refused(lambda: node.identity.Probe(csi_pb2.ProbeRequest()))
    assert error.code().name == "FAILED_PRECONDITION"
    assert all(name in error.details() for name in missing)


def test_the_node_is_named_after_the_driver_and_the_settings(node: Node) -> None:
    answer = node.node.NodeGetInfo(csi_pb2.NodeGetInfoRequest())
    assert answer.node_id == "node-1"
    assert dict(answer.accessible_topology.segments) == {"topology.ebi.example.com/node": "node-1"}
