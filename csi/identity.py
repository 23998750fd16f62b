"""CSI's Identity service: who the driver is, and whether it can work here."""

from importlib.metadata import version
from threading import Event

from google.protobuf.wrappers_pb2 import BoolValue
from grpc import ServicerContext

from csi.stubs import csi_pb2, csi_pb2_grpc
from plugin.errors import precondition
from plugin.host import requirements
from plugin.settings import Settings

_Capability = csi_pb2.PluginCapability


class Identity(csi_pb2_grpc.IdentityServicer):
    """Answers for the driver named in `settings`; `ready` is set once it serves."""

    def __init__(self, settings: Settings, ready: Event) -> None:
        self._settings = settings
        self._ready = ready
        self._refusal = ""

    def refuse(self, words: str) -> None:
        """From now on say that kubelet does not take the driver."""
        self._refusal = words

    def GetPluginInfo(
        self, request: csi_pb2.GetPluginInfoRequest, context: ServicerContext
    ) -> csi_pb2.GetPluginInfoResponse:
        """The driver's name and version."""
        return csi_pb2.GetPluginInfoResponse(name=self._settings.driver_name, vendor_version=version("ebi"))

    def GetPluginCapabilities(
        self, request: csi_pb2.GetPluginCapabilitiesRequest, context: ServicerContext
    ) -> csi_pb2.GetPluginCapabilitiesResponse:
        """It has a controller, its volumes are tied to nodes, and they grow while in use."""
        services = (_Capability.Service.CONTROLLER_SERVICE, _Capability.Service.VOLUME_ACCESSIBILITY_CONSTRAINTS)
        return csi_pb2.GetPluginCapabilitiesResponse(
            capabilities=[
                *(_Capability(service=_Capability.Service(type=service)) for service in services),
                _Capability(volume_expansion=_Capability.VolumeExpansion(type=_Capability.VolumeExpansion.ONLINE)),
            ]
        )

    def Probe(self, request: csi_pb2.ProbeRequest, context: ServicerContext) -> csi_pb2.ProbeResponse:
        """Whether it serves; FAILED_PRECONDITION names what the node lacks."""
        if self._refusal:
            raise precondition(f"kubelet has not registered {self._settings.driver_name}: {self._refusal}")
        missing = requirements.missing()
        if missing:
            raise precondition(f"this node lacks {', '.join(missing)}", "install or load it")
        return csi_pb2.ProbeResponse(ready=BoolValue(value=self._ready.is_set()))
