"""CSI's Controller service: volumes come, grow and go. The controller is on the volume's own node."""

from google.protobuf.wrappers_pb2 import Int64Value
from grpc import ServicerContext

from csi import convert
from csi.stubs import csi_pb2, csi_pb2_grpc
from plugin.errors import EbiError, Kind, exhausted, invalid
from plugin.settings import Settings
from plugin.volumes import Volume, Volumes

_Rpc = csi_pb2.ControllerServiceCapability.RPC
_CAPABILITIES = (
    _Rpc.CREATE_DELETE_VOLUME,
    _Rpc.GET_CAPACITY,
    _Rpc.LIST_VOLUMES,
    _Rpc.EXPAND_VOLUME,
    _Rpc.SINGLE_NODE_MULTI_WRITER,
)
_AFTER = "after:"  # a page's token names the last volume before it, so that it outlives that volume


def topology(settings: Settings) -> csi_pb2.Topology:
    """Where this node's volumes can be reached from: here."""
    return csi_pb2.Topology(segments={f"topology.{settings.driver_name}/node": settings.node_id})


class Controller(csi_pb2_grpc.ControllerServicer):
    """Hands calls to `volumes`."""

    def __init__(self, volumes: Volumes, settings: Settings) -> None:
        self._volumes = volumes
        self._settings = settings

    def ControllerGetCapabilities(
        self, request: csi_pb2.ControllerGetCapabilitiesRequest, context: ServicerContext
    ) -> csi_pb2.ControllerGetCapabilitiesResponse:
        """What this service can do."""
        offered = [one for one in _CAPABILITIES if one != _Rpc.EXPAND_VOLUME or self._settings.controller_expand]
        return csi_pb2.ControllerGetCapabilitiesResponse(
            capabilities=[csi_pb2.ControllerServiceCapability(rpc=_Rpc(type=one)) for one in offered]
        )

    def CreateVolume(
        self, request: csi_pb2.CreateVolumeRequest, context: ServicerContext
    ) -> csi_pb2.CreateVolumeResponse:
        """Make a volume with its space reserved."""
        name = convert.required(request.name, "name")
        wanted = convert.capabilities(request.volume_capabilities)
        for one in wanted:
            one.check()
        if reason := convert.why_impossible(wanted):
            raise invalid(reason, "use SINGLE_NODE_WRITER or another mode of a single node")
        if request.HasField("volume_content_source"):
            raise invalid(
                "volume_content_source is not supported", "start from a backing image: parameter backingImage"
            )
        if not self._is_here(request.accessibility_requirements):
            raise exhausted(
                f"volume {name} is not wanted on node {self._settings.node_id}", "ask the node that it is wanted on"
            )
        least, most = convert.capacity(request.capacity_range)
        volume = self._volumes.create(
            name,
            least,
            dict(request.parameters),
            limit=most,
            block=all(one.block for one in wanted),
            fs_type=next((one.fs_type for one in wanted if one.fs_type), ""),
        )
        return csi_pb2.CreateVolumeResponse(volume=self._wire(volume))

    def DeleteVolume(
        self, request: csi_pb2.DeleteVolumeRequest, context: ServicerContext
    ) -> csi_pb2.DeleteVolumeResponse:
        """Destroy a volume; an absent one is fine."""
        self._volumes.delete(convert.required(request.volume_id, "volume_id"))
        return csi_pb2.DeleteVolumeResponse()

    def ValidateVolumeCapabilities(
        self, request: csi_pb2.ValidateVolumeCapabilitiesRequest, context: ServicerContext
    ) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
        """Confirm the capabilities, all or none of them."""
        volume = convert.required(request.volume_id, "volume_id")
        wanted = convert.capabilities(request.volume_capabilities)
        found = self._volumes.get(volume)
        reason = convert.why_impossible(wanted)
        if request.parameters and dict(request.parameters) != dict(found.parameters):
            reason = f"volume {volume} was made with other parameters"
        try:
            for one in wanted:
                one.check()
        except EbiError as error:
            reason = str(error)
        if reason:
            return csi_pb2.ValidateVolumeCapabilitiesResponse(message=reason)
        confirmed = csi_pb2.ValidateVolumeCapabilitiesResponse.Confirmed(
            volume_context=request.volume_context,
            volume_capabilities=request.volume_capabilities,
            parameters=request.parameters,
        )
        return csi_pb2.ValidateVolumeCapabilitiesResponse(confirmed=confirmed)

    def ListVolumes(self, request: csi_pb2.ListVolumesRequest, context: ServicerContext) -> csi_pb2.ListVolumesResponse:
        """All volumes by id, a page of `max_entries` at a time."""
        token = request.starting_token
        if token and not token.startswith(_AFTER):
            raise EbiError(f"invalid starting_token {token!r}", kind=Kind.BUSY, hint="start again without one")
        if request.max_entries < 0:
            raise invalid(f"max_entries is {request.max_entries}", "give 0 for all, or a number above")
        after = token.removeprefix(_AFTER)
        # Inline volumes are kubelet's alone.
        left = [volume for volume in self._volumes.list() if volume.id > after and not volume.ephemeral]
        page = left[: request.max_entries or None]
        return csi_pb2.ListVolumesResponse(
            entries=[csi_pb2.ListVolumesResponse.Entry(volume=self._wire(volume)) for volume in page],
            next_token=f"{_AFTER}{page[-1].id}" if len(page) < len(left) else "",
        )

    def GetCapacity(self, request: csi_pb2.GetCapacityRequest, context: ServicerContext) -> csi_pb2.GetCapacityResponse:
        """The space for new volumes on this node."""
        here = not request.HasField("accessible_topology") or self._matches(request.accessible_topology)
        free = self._volumes.free_bytes() if here else 0
        return csi_pb2.GetCapacityResponse(available_capacity=free, maximum_volume_size=Int64Value(value=free))

    def ControllerExpandVolume(
        self, request: csi_pb2.ControllerExpandVolumeRequest, context: ServicerContext
    ) -> csi_pb2.ControllerExpandVolumeResponse:
        """Reserve more space; the node then has the devices take it."""
        volume = convert.required(request.volume_id, "volume_id")
        if not request.HasField("capacity_range"):
            raise invalid("capacity_range is missing", "say how large the volume shall be")
        least, most = convert.capacity(request.capacity_range)
        size = self._volumes.expand(volume, least, limit=most)
        return csi_pb2.ControllerExpandVolumeResponse(capacity_bytes=size, node_expansion_required=True)

    def _is_here(self, wanted: csi_pb2.TopologyRequirement) -> bool:
        places = wanted.requisite or wanted.preferred
        return not places or any(self._matches(one) for one in places)

    def _matches(self, wanted: csi_pb2.Topology) -> bool:
        return dict(wanted.segments) == dict(topology(self._settings).segments)

    def _wire(self, volume: Volume) -> csi_pb2.Volume:
        return csi_pb2.Volume(
            volume_id=volume.id,
            capacity_bytes=volume.capacity,
            volume_context=dict(volume.parameters),
            accessible_topology=[topology(self._settings)],
        )
