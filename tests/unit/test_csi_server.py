"""The server's socket, and how it ends."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from csi import sockets
from csi.stubs import csi_pb2, csi_pb2_grpc
from plugin.errors import EbiError, Kind
from plugin.volumes.record import RECORD
from tests.unit.csi_node import connected, mount, running


def test_only_its_owner_can_reach_the_socket_and_it_goes_with_the_server() -> None:
    with running() as node:
        status = node.socket.stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert stat.S_IMODE(node.socket.parent.stat().st_mode) == 0o700
        path = node.socket
    assert not path.exists()


def test_a_socket_that_a_killed_server_left_is_replaced(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "csi.sock"
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
        with running(endpoint=f"unix://{path}") as node, connected(path) as channel:
            identity = csi_pb2_grpc.IdentityStub(channel)
            assert identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest()).name == node.settings.driver_name


def test_a_socket_at_which_somebody_listens_is_left_to_him() -> None:
    with running() as node:
        with pytest.raises(EbiError, match="another server is listening") as caught, running(endpoint=str(node.socket)):
            pass
        assert caught.value.kind is Kind.PRECONDITION
        assert node.identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest()).name


def test_a_file_at_the_socket_s_place_is_left_alone() -> None:
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "csi.sock"
        path.write_text("somebody's")
        with pytest.raises(EbiError, match="cannot listen"), running(endpoint=f"unix://{path}"):
            pass
        assert path.read_text() == "somebody's"


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:5000", "csi.sock", "unix://csi.sock", "unix:///" + "x" * 107, ""])
def test_an_endpoint_that_is_no_unix_socket_is_refused(endpoint: str) -> None:
    with pytest.raises(EbiError) as caught:
        sockets.path(endpoint)
    assert caught.value.kind is Kind.INVALID


@pytest.mark.parametrize(
    "change", [{"driver_name": "-"}, {"driver_name": "x" * 64}, {"node_id": ""}, {"node_id": "a/b"}]
)
def test_names_that_csi_could_not_carry_are_refused_at_the_start(change: dict[str, Any]) -> None:
    with pytest.raises(EbiError) as caught, running(**change):
        pass
    assert caught.value.kind is Kind.INVALID


@dataclass
class Served:
    """`ebi serve` as a process, and a call to it that waits for what this test has not yet written."""

    process: subprocess.Popen[bytes]
    channel: grpc.Channel
    pipe: int
    call: Any

    def finish(self) -> None:
        """Let the call come to its end."""
        os.write(self.pipe, b"null")
        os.close(self.pipe)


@contextmanager
def busy_process(grace: float) -> Iterator[Served]:
    """A served process in the middle of a call: it reads a record that is a pipe."""
    with tempfile.TemporaryDirectory(prefix="ebi-") as directory:
        home = Path(directory)
        path = home / "csi.sock"
        command = [sys.executable, "-m", "plugin.cli", "--data-dir", home / "ebi", "serve"]
        command += ["--endpoint", f"unix://{path}", "--grace-seconds", str(grace), "--node-id", "node-1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            try:
                with connected(path) as channel:
                    info = csi_pb2.GetPluginInfoRequest()
                    csi_pb2_grpc.IdentityStub(channel).GetPluginInfo(info, wait_for_ready=True, timeout=60)
                    controller = csi_pb2_grpc.ControllerStub(channel)
                    deadline = time.monotonic() + 60
                    while _code(controller.ListVolumes.future(csi_pb2.ListVolumesRequest())) is not grpc.StatusCode.OK:
                        assert time.monotonic() < deadline, "it never came up"
                    record = home / "ebi" / "volumes" / "slow" / RECORD
                    record.parent.mkdir(parents=True)
                    os.mkfifo(record)
                    call = controller.ValidateVolumeCapabilities.future(
                        csi_pb2.ValidateVolumeCapabilitiesRequest(volume_id="slow", volume_capabilities=[mount()])
                    )
                    yield Served(process, channel, _end_for_writing(record), call)
            finally:
                process.kill()


def _code(call: Future[Any]) -> grpc.StatusCode:
    error = call.exception()
    return error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.OK


def _end_for_writing(pipe: Path) -> int:
    """The writing end of `pipe`, which can be had as soon as somebody reads."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            assert error.errno == errno.ENXIO
            assert time.monotonic() < deadline, "nobody reads"
            time.sleep(0.02)


def test_a_stop_lets_the_running_call_finish_takes_no_other_and_exits_with_0() -> None:
    with busy_process(grace=60) as served:
        served.process.send_signal(signal.SIGTERM)
        node = csi_pb2_grpc.NodeStub(served.channel)
        deadline = time.monotonic() + 60
        while _code(node.NodeGetInfo.future(csi_pb2.NodeGetInfoRequest())) is grpc.StatusCode.OK:
            assert time.monotonic() < deadline, "it still takes calls"
        assert served.process.poll() is None
        assert not served.call.done()
        served.finish()
        assert _code(served.call) is grpc.StatusCode.NOT_FOUND, "the call did not come to its own end"
        assert served.process.wait(30) == 0


def test_a_call_that_does_not_end_within_the_grace_time_ends_with_the_process() -> None:
    with busy_process(grace=0.5) as served:
        start = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0
        assert time.monotonic() - start >= 0.5
        assert b"did not end within" in served.process.stdout.read()  # type: ignore[union-attr]


def test_a_signal_that_the_kernel_gives_to_another_thread_ends_it_too() -> None:
    with busy_process(grace=60) as served:
        served.finish()
        main = served.process.pid
        others = [int(entry.name) for entry in Path(f"/proc/{main}/task").iterdir() if int(entry.name) != main]
        os.kill(others[0], signal.SIGTERM)
        assert served.process.wait(30) == 0
