"""A CSI server in this process, on a real unix socket, over real images and volumes in a temporary directory."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from csi import server
from csi.stubs import csi_pb2, csi_pb2_grpc
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import Volumes

MIB = 1 << 20
Mode = csi_pb2.VolumeCapability.AccessMode


@dataclass(frozen=True)
class Node:
    """What a test sees of it."""

    settings: Settings
    socket: Path
    channel: grpc.Channel
    identity: csi_pb2_grpc.IdentityStub
    controller: csi_pb2_grpc.ControllerStub
    node: csi_pb2_grpc.NodeStub

    def create(self, name: str, size: int = MIB, **fields: Any) -> csi_pb2.Volume:
        """CreateVolume with one capability, of which `fields` may say more or otherwise."""
        given = {"capacity_range": csi_pb2.CapacityRange(required_bytes=size), "volume_capabilities": [mount()]}
        return self.controller.CreateVolume(csi_pb2.CreateVolumeRequest(name=name, **{**given, **fields})).volume


@contextmanager
def running(**changes: Any) -> Iterator[Node]:
    """A server with a data directory of its own."""
    # pytest's own directories have names too long for a socket.
    with tempfile.TemporaryDirectory(prefix="ebi-") as directory:
        home = Path(directory)
        path = home / "run" / "csi.sock"
        settings = Settings(**{"data_dir": home / "ebi", "endpoint": f"unix://{path}", "node_id": "node-1", **changes})
        settings.data_dir.mkdir(exist_ok=True)
        images = Images(settings.data_dir / "images", settings)
        volumes = Volumes(settings.data_dir / "volumes", images, settings)
        with server.serving(volumes, images, settings), connected(path) as channel:
            yield Node(
                settings,
                path,
                channel,
                csi_pb2_grpc.IdentityStub(channel),
                csi_pb2_grpc.ControllerStub(channel),
                csi_pb2_grpc.NodeStub(channel),
            )


@contextmanager
def connected(path: Path) -> Iterator[grpc.Channel]:
    """A channel to the socket `path`, of its own (gRPC would share one between tests), and soon there."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 1000)]
    with grpc.insecure_channel(f"unix:{path}", options=options) as channel:
        yield channel


def mount(mode: int = Mode.SINGLE_NODE_WRITER, **fields: Any) -> csi_pb2.VolumeCapability:
    """The capability of a filesystem."""
    return csi_pb2.VolumeCapability(mount=csi_pb2.VolumeCapability.MountVolume(**fields), access_mode=Mode(mode=mode))


def refused(call: Callable[[], object]) -> grpc.RpcError:
    """The error that `call` ends with; it says nothing outside its code and its words."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert "grpc-status-details-bin" not in dict(caught.value.trailing_metadata())
    return caught.value


def code(call: Callable[[], object]) -> str:
    """The name of the status that `call` is refused with."""
    return refused(call).code().name
