"""The CSI server: a unix socket of root's, served until SIGTERM."""

import logging
import os
import signal
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from csi.controller import Controller
from csi.identity import Identity
from csi.interceptors import Calls
from csi.node import Node
from csi.stubs import csi_pb2_grpc
from plugin import metrics
from plugin.errors import invalid, precondition
from plugin.images import Images
from plugin.settings import Settings
from plugin.volumes import Volumes

log = logging.getLogger(__name__)

# Calls wait for devices and key derivations much more than they compute.
_THREADS = 64
_MODE = 0o600


def serve(volumes: Volumes, images: Images, settings: Settings) -> None:
    """Serve at `settings.endpoint` until SIGTERM or SIGINT, then let running calls finish for the grace time.

    Raises INVALID for an endpoint that is no unix socket, PRECONDITION where another server has it.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    ready = threading.Event()
    calls = Calls(ready)
    path = socket_path(settings.endpoint)
    with metrics.exported(settings, images), ThreadPoolExecutor(_THREADS, "call") as pool:
        server = grpc.server(pool, interceptors=[calls])
        csi_pb2_grpc.add_IdentityServicer_to_server(Identity(settings, ready), server)
        csi_pb2_grpc.add_ControllerServicer_to_server(Controller(volumes, settings), server)
        csi_pb2_grpc.add_NodeServicer_to_server(Node(volumes, settings), server)
        _bind(server, path)
        server.start()
        images.recover()
        volumes.recover()
        ready.set()
        log.info("serving %s at %s", settings.driver_name, path)
        stop.wait()
        log.info("stopping: %d calls are running", calls.running)
        server.stop(settings.grace_seconds).wait()
        path.unlink(missing_ok=True)
        if calls.running:
            # Their threads can't be stopped, and a process that ends in the middle of a call is provided for.
            log.warning("%d calls did not end within %s s", calls.running, settings.grace_seconds)
            logging.shutdown()
            os._exit(0)


def socket_path(endpoint: str) -> Path:
    """The path of a unix endpoint: `unix:///path`, `unix:/path` or a plain path. Raises INVALID."""
    path = Path(endpoint.removeprefix("unix://").removeprefix("unix:"))
    if not path.is_absolute():
        raise invalid(f"the endpoint {endpoint!r} is no unix socket", "give one such as unix:///run/ebi/csi.sock")
    return path


def _bind(server: grpc.Server, path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
        with socket.socket(socket.AF_UNIX) as other:
            if other.connect_ex(str(path)) == 0:
                raise precondition(f"another server is listening at {path}", "stop it first, or use another endpoint")
        path.unlink()
    # No moment in which others could connect: the socket is made with its final mode.
    mask = os.umask(0o777 & ~_MODE)
    try:
        server.add_insecure_port(f"unix:{path}")
    finally:
        os.umask(mask)
