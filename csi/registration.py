"""Kubelet's plugin registration, for a node without the node-driver-registrar sidecar.

Kubelet watches a directory for sockets, asks each what it is, and tells it whether it was taken.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc import ServicerContext

from csi import sockets
from csi.stubs import registration_pb2, registration_pb2_grpc
from plugin.errors import precondition
from plugin.settings import Settings

log = logging.getLogger(__name__)

_TYPE = "CSIPlugin"
_VERSIONS = ("1.0.0",)  # of CSI, as kubelet compares it: its major number counts


class Registration(registration_pb2_grpc.RegistrationServicer):
    """Says where the driver serves; `refused` is called with kubelet's words when it does not take it."""

    def __init__(self, settings: Settings, refused: Callable[[str], None]) -> None:
        self._settings = settings
        self._refused = refused

    def GetInfo(self, request: registration_pb2.InfoRequest, context: ServicerContext) -> registration_pb2.PluginInfo:
        """The driver's name, and its CSI socket as kubelet sees it."""
        endpoint = self._settings.kubelet_endpoint or self._settings.endpoint
        return registration_pb2.PluginInfo(
            type=_TYPE,
            name=self._settings.driver_name,
            endpoint=str(sockets.path(endpoint)),
            supported_versions=_VERSIONS,
        )

    def NotifyRegistrationStatus(
        self, request: registration_pb2.RegistrationStatus, context: ServicerContext
    ) -> registration_pb2.RegistrationStatusResponse:
        """Kubelet's answer."""
        if request.plugin_registered:
            log.info("kubelet has registered %s", self._settings.driver_name)
        else:
            log.error("kubelet has not registered %s: %s", self._settings.driver_name, request.error)
            self._refused(request.error or "it gave no reason")
        return registration_pb2.RegistrationStatusResponse()


@contextmanager
def registered(settings: Settings, refused: Callable[[str], None]) -> Iterator[None]:
    """Be found by kubelet for as long as the block runs, if the settings name its directory.

    Raises PRECONDITION where there is no such directory, or another server has the socket.
    """
    if not settings.registration_dir:
        yield
        return
    directory = Path(settings.registration_dir)
    if not directory.is_dir():
        raise precondition(f"there is no directory {directory}", "it is kubelet's; is kubelet installed here?")
    path = sockets.path(str(directory / f"{settings.driver_name}-reg.sock"))
    server = grpc.server(ThreadPoolExecutor(2, "registration"))
    registration_pb2_grpc.add_RegistrationServicer_to_server(Registration(settings, refused), server)
    sockets.bind(server, path)
    server.start()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # first, so that kubelet does not ask one that has gone
        server.stop(None).wait()
