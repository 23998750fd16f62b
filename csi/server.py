"""The CSI server: a unix socket of root's, served until SIGTERM."""

import logging
import os
import re
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc

from csi.controller import Controller
from csi.identity import Identity
from csi.interceptors import Calls
from csi.node import Node
from csi.stubs import csi_pb2_grpc
from plugin import metrics
from plugin.errors import EbiError, invalid, precondition
from plugin.images import Images
from plugin.settings import Settings
from plugin.volumes import Volumes

log = logging.getLogger(__name__)

# Calls wait for devices and key derivations much more than they compute.
_THREADS = 64
_MODE = 0o600
_LONGEST_PATH = 107  # sun_path of unix(7), without the byte that ends it
# GetPluginInfo of the specification; and what Kubernetes takes as the value of a topology's label.
_DRIVER_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")
_NODE_ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def serve(volumes: Volumes, images: Images, settings: Settings) -> None:
    """Serve at `settings.endpoint` until SIGTERM or SIGINT, then let running calls finish for the grace time.

    Calls that need longer end with the process. Raises INVALID for an endpoint that is no unix socket, a driver name
    or a node id that can't be one, PRECONDITION where another server has the socket.
    """
    with _signals() as arrived, metrics.exported(settings, images), serving(volumes, images, settings) as calls:
        arrived.recv(1)
        log.info("stopping: %d calls are running", calls.running)
    if calls.running:
        # Their threads can't be stopped, and a process that ends in the middle of a call is provided for.
        log.warning("%d calls did not end within %s s", calls.running, settings.grace_seconds)
        logging.shutdown()
        os._exit(0)


@contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket to read from when SIGTERM or SIGINT has come.

    The kernel may give a signal to any thread, and one that waits for a lock in the main thread would not notice.
    """
    receiver, sender = socket.socketpair()
    with receiver, sender:
        sender.setblocking(False)
        before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        try:
            yield receiver
        finally:
            signal.set_wakeup_fd(before)


@contextmanager
def serving(volumes: Volumes, images: Images, settings: Settings) -> Iterator[Calls]:
    """Serve for as long as the block runs; within it what an earlier process left is cleaned up and calls are taken."""
    _check(settings)
    path = socket_path(settings.endpoint)
    ready = threading.Event()
    calls = Calls(ready)
    pool = ThreadPoolExecutor(_THREADS, "call")
    server = grpc.server(pool, interceptors=[calls])
    csi_pb2_grpc.add_IdentityServicer_to_server(Identity(settings, ready), server)
    csi_pb2_grpc.add_ControllerServicer_to_server(Controller(volumes, settings), server)
    csi_pb2_grpc.add_NodeServicer_to_server(Node(volumes, settings), server)
    _bind(server, path)
    server.start()
    try:
        images.recover()
        volumes.recover()
        with volumes.watching():
            ready.set()
            log.info("serving %s at %s", settings.driver_name, path)
            yield calls
    finally:
        server.stop(settings.grace_seconds).wait()
        path.unlink(missing_ok=True)
        pool.shutdown(wait=False)


def socket_path(endpoint: str) -> Path:
    """The path of a unix endpoint: `unix:///path`, `unix:/path` or a plain path. Raises INVALID."""
    path = Path(endpoint.removeprefix("unix://").removeprefix("unix:"))
    if not path.is_absolute():
        raise invalid(f"the endpoint {endpoint!r} is no unix socket", "give one such as unix:///run/ebi/csi.sock")
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise invalid(f"the path {path} is too long for a socket", f"use one of at most {_LONGEST_PATH} bytes")
    return path


def _check(settings: Settings) -> None:
    if not _DRIVER_NAME.fullmatch(settings.driver_name):
        raise invalid(f"invalid driver name {settings.driver_name!r}", "use at most 63 letters, digits, dots, dashes")
    if not _NODE_ID.fullmatch(settings.node_id):
        raise invalid(f"invalid node id {settings.node_id!r}", "use at most 63 letters, digits, dots, dashes")


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
    except RuntimeError as error:
        raise EbiError(f"cannot listen at {path}: {error}", hint="is there another file at that path?") from error
    finally:
        os.umask(mask)
