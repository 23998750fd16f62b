"""The CSI server: a unix socket of root's, served until SIGTERM."""

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from csi import sockets
from csi.controller import Controller
from csi.health import Health, served
from csi.identity import Identity
from csi.interceptors import Calls
from csi.node import Node
from csi.registration import registered
from csi.stubs import csi_pb2_grpc, health_pb2_grpc
from plugin import metrics
from plugin.errors import invalid, precondition
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import Volumes

log = logging.getLogger(__name__)

# Calls wait for devices and key derivations much more than they compute.
_THREADS = 64
# GetPluginInfo of the specification; and what Kubernetes takes as the value of a topology's label.
_DRIVER_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")
_NODE_ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def serve(volumes: Volumes, images: Images, settings: Settings) -> None:
    """Serve at `settings.endpoint` until SIGTERM or SIGINT, then let running calls finish for the grace time.

    Calls that need longer end with the process. Raises INVALID for an endpoint that is no unix socket, a driver name
    or a node id that can't be one, PRECONDITION where another server has the socket, or kubelet does not take this one.
    """
    refusals: list[str] = []

    def refused(words: str) -> None:
        refusals.append(words)
        os.kill(os.getpid(), signal.SIGTERM)

    with (
        _signals() as arrived,
        metrics.exported(settings, images),
        serving(volumes, images, settings, refused) as calls,
    ):
        arrived.recv(1)
        log.info("stopping: %d calls are running", calls.running)
    if calls.running:
        # Their threads can't be stopped, and a process that ends in the middle of a call is provided for.
        log.warning("%d calls did not end within %s s", calls.running, settings.grace_seconds)
        logging.shutdown()
        os._exit(1 if refusals else 0)
    if refusals:
        raise precondition(
            f"kubelet has not registered {settings.driver_name}: {refusals[0]}", "is there another plugin of that name?"
        )


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
def serving(
    volumes: Volumes, images: Images, settings: Settings, refused: Callable[[str], None] = lambda _: None
) -> Iterator[Calls]:
    """Serve for as long as the block runs; within it what an earlier process left is cleaned up and calls are taken.

    `refused` is called with kubelet's words should it not take the driver.
    """
    _check(settings)
    path = sockets.path(settings.endpoint)
    ready = threading.Event()
    calls = Calls(ready)
    pool = ThreadPoolExecutor(_THREADS, "call")
    server = grpc.server(pool, interceptors=[calls])
    identity = Identity(settings, ready)
    health = Health(identity)
    csi_pb2_grpc.add_IdentityServicer_to_server(identity, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    csi_pb2_grpc.add_ControllerServicer_to_server(Controller(volumes, settings), server)
    csi_pb2_grpc.add_NodeServicer_to_server(Node(volumes, settings), server)

    def refuse(words: str) -> None:
        identity.refuse(words)
        refused(words)

    sockets.bind(server, path)
    server.start()
    try:
        with served(health, settings.health_address, calls):
            images.recover()
            volumes.recover()
            with volumes.watching():
                ready.set()
                with registered(settings, refuse):
                    log.info("serving %s at %s", settings.driver_name, path)
                    yield calls
    finally:
        stopped = server.stop(settings.grace_seconds)
        volumes.stop()
        stopped.wait()
        path.unlink(missing_ok=True)
        pool.shutdown(wait=False)


def _check(settings: Settings) -> None:
    if not _DRIVER_NAME.fullmatch(settings.driver_name):
        raise invalid(f"invalid driver name {settings.driver_name!r}", "use at most 63 letters, digits, dots, dashes")
    if not _NODE_ID.fullmatch(settings.node_id):
        raise invalid(f"invalid node id {settings.node_id!r}", "use at most 63 letters, digits, dots, dashes")
