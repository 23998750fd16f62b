"""CSI's Node service: volumes are staged, published, measured and grown on this node."""

from grpc import ServicerContext

from csi import convert
from csi.controller import topology
from csi.stubs import csi_pb2, csi_pb2_grpc
from plugin.settings import Settings
from plugin.volumes import Volumes, ephemeral

_Rpc = csi_pb2.NodeServiceCapability.RPC
_CAPABILITIES = (
    _Rpc.STAGE_UNSTAGE_VOLUME,
    _Rpc.GET_VOLUME_STATS,
    _Rpc.EXPAND_VOLUME,
    _Rpc.VOLUME_CONDITION,
    _Rpc.SINGLE_NODE_MULTI_WRITER,
    _Rpc.VOLUME_MOUNT_GROUP,
)
_Usage = csi_pb2.VolumeUsage


class Node(csi_pb2_grpc.NodeServicer):
    """Hands calls to `volumes`."""

    def __init__(self, volumes: Volumes, settings: Settings) -> None:
        self._volumes = volumes
        self._settings = settings

    def NodeGetCapabilities(
        self, request: csi_pb2.NodeGetCapabilitiesRequest, context: ServicerContext
    ) -> csi_pb2.NodeGetCapabilitiesResponse:
        """What this service can do."""
        return csi_pb2.NodeGetCapabilitiesResponse(
            capabilities=[csi_pb2.NodeServiceCapability(rpc=_Rpc(type=one)) for one in _CAPABILITIES]
        )

    def NodeGetInfo(self, request: csi_pb2.NodeGetInfoRequest, context: ServicerContext) -> csi_pb2.NodeGetInfoResponse:
        """This node's name and place."""
        return csi_pb2.NodeGetInfoResponse(node_id=self._settings.node_id, accessible_topology=topology(self._settings))

    def NodeStageVolume(
        self, request: csi_pb2.NodeStageVolumeRequest, context: ServicerContext
    ) -> csi_pb2.NodeStageVolumeResponse:
        """Open the image and the volume with the secret, map them, and mount the filesystem."""
        volume = convert.required(request.volume_id, "volume_id")
        capability = convert.capability(request.volume_capability, request.HasField("volume_capability"))
        self._volumes.stage(
            volume,
            convert.path(request.staging_target_path, "staging_target_path"),
            capability,
            dict(request.secrets),
            {**request.volume_context, **request.publish_context},
        )
        return csi_pb2.NodeStageVolumeResponse()

    def NodeUnstageVolume(
        self, request: csi_pb2.NodeUnstageVolumeRequest, context: ServicerContext
    ) -> csi_pb2.NodeUnstageVolumeResponse:
        """Undo the stage; what is not there is fine."""
        volume = convert.required(request.volume_id, "volume_id")
        self._volumes.unstage(volume, convert.path(request.staging_target_path, "staging_target_path"))
        return csi_pb2.NodeUnstageVolumeResponse()

    def NodePublishVolume(
        self, request: csi_pb2.NodePublishVolumeRequest, context: ServicerContext
    ) -> csi_pb2.NodePublishVolumeResponse:
        """Show the staged volume to a workload; an inline one is made for that."""
        volume = convert.required(request.volume_id, "volume_id")
        capability = convert.capability(request.volume_capability, request.HasField("volume_capability"))
        target = convert.path(request.target_path, "target_path")
        if ephemeral.is_asked(request.volume_context):
            self._volumes.publish_ephemeral(
                volume,
                target,
                capability,
                readonly=request.readonly,
                secrets=dict(request.secrets),
                context=dict(request.volume_context),
            )
            return csi_pb2.NodePublishVolumeResponse()
        staging = convert.staging_path(request.staging_target_path)
        self._volumes.publish(volume, staging, target, capability, request.readonly)
        return csi_pb2.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: csi_pb2.NodeUnpublishVolumeRequest, context: ServicerContext
    ) -> csi_pb2.NodeUnpublishVolumeResponse:
        """Take it away from the workload; what is not there is fine."""
        volume = convert.required(request.volume_id, "volume_id")
        self._volumes.unpublish(volume, convert.path(request.target_path, "target_path"))
        return csi_pb2.NodeUnpublishVolumeResponse()

    def NodeGetVolumeStats(
        self, request: csi_pb2.NodeGetVolumeStatsRequest, context: ServicerContext
    ) -> csi_pb2.NodeGetVolumeStatsResponse:
        """How full the volume is, and how it is."""
        volume = convert.required(request.volume_id, "volume_id")
        found = self._volumes.stats(volume, convert.path(request.volume_path, "volume_path"))
        usage = [
            _Usage(
                unit=_Usage.BYTES,
                total=found.total_bytes,
                used=found.used_bytes,
                available=found.available_bytes,
            )
        ]
        if not found.block:
            usage.append(
                _Usage(
                    unit=_Usage.INODES,
                    total=found.total_inodes,
                    used=found.used_inodes,
                    available=found.available_inodes,
                )
            )
        condition = csi_pb2.VolumeCondition(abnormal=found.condition.abnormal, message=found.condition.message)
        return csi_pb2.NodeGetVolumeStatsResponse(usage=usage, volume_condition=condition)

    def NodeExpandVolume(
        self, request: csi_pb2.NodeExpandVolumeRequest, context: ServicerContext
    ) -> csi_pb2.NodeExpandVolumeResponse:
        """Have devices and filesystem take the size that is asked for, its space reserved; needs no secret."""
        volume = convert.required(request.volume_id, "volume_id")
        where = convert.path(request.volume_path, "volume_path")
        least, most = convert.capacity(request.capacity_range)
        size = self._volumes.node_expand(volume, where, least, limit=most)
        return csi_pb2.NodeExpandVolumeResponse(capacity_bytes=size)
