"""gRPC's own health service, for Kubernetes' grpc probes: on the CSI socket, and on a TCP port of its own if wanted."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from csi.identity import Identity
from csi.stubs import csi_pb2, health_pb2, health_pb2_grpc
from plugin.errors import EbiError, not_found, unavailable

log = logging.getLogger(__name__)

_SERVICES = ("", "csi.v1.Identity", "csi.v1.Controller", "csi.v1.Node")
_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """SERVING where `identity` finds nothing missing, and calls are taken."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """One look. NOT_FOUND for a service that is none, as the protocol wants it."""
        if request.service not in _SERVICES:
            raise not_found(f"there is no service {request.service!r}", f"ask for one of {', '.join(_SERVICES[1:])}")
        try:
            serving = self._identity.Probe(csi_pb2.ProbeRequest(), context).ready.value
        except EbiError as error:
            log.warning("%s", error)
            serving = False
        return _Status(status=_Status.SERVING if serving else _Status.NOT_SERVING)


@contextmanager
def served(health: Health, address: str, interceptor: grpc.ServerInterceptor) -> Iterator[None]:
    """Answer at the TCP `address` too, with nothing else there; "" for not at all. Raises UNAVAILABLE."""
    if not address:
        yield
        return
    server = grpc.server(ThreadPoolExecutor(2, "health"), interceptors=[interceptor])
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise unavailable(f"cannot tell the health at {address}: {error}", "is the port taken?") from error
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()
