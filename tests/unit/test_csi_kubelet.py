"""What kubelet asks beside CSI: who is there, and how it is."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from csi.stubs import csi_pb2, csi_pb2_grpc, health_pb2, health_pb2_grpc, registration_pb2, registration_pb2_grpc
from plugin.errors import EbiError, Kind
from plugin.host import requirements
from tests.unit.csi_node import code, connected, running

Status = health_pb2.HealthCheckResponse
REFUSED = registration_pb2.RegistrationStatus(plugin_registered=False, error="another plugin has that name")


@pytest.fixture
def directory() -> Iterator[Path]:
    """Kubelet's registry; pytest's own directories have names too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="ebi-") as found:
        yield Path(found)


def check(channel: grpc.Channel, service: str = "") -> Any:
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service)).status


def expected() -> Any:
    """Of a driver that serves on this machine."""
    return Status.NOT_SERVING if requirements.missing() else Status.SERVING


class TestRegistration:
    def test_kubelet_finds_the_driver_and_its_socket(self, directory: Path) -> None:
        with running(registration_dir=str(directory), kubelet_endpoint="unix:///host/csi.sock") as node:
            path = directory / "driver.longhorn.io-reg.sock"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            with connected(path) as channel:
                kubelet = registration_pb2_grpc.RegistrationStub(channel)
                found = kubelet.GetInfo(registration_pb2.InfoRequest())
                assert (found.type, found.name, found.endpoint) == (
                    "CSIPlugin",
                    node.settings.driver_name,
                    "/host/csi.sock",
                )
                assert list(found.supported_versions) == ["1.0.0"]
                kubelet.NotifyRegistrationStatus(registration_pb2.RegistrationStatus(plugin_registered=True))
                assert check(node.channel) == expected()
        assert list(directory.iterdir()) == []

    def test_without_another_path_kubelet_sees_the_socket_where_it_is(self, directory: Path) -> None:
        with running(registration_dir=str(directory)) as node:
            with connected(directory / "driver.longhorn.io-reg.sock") as channel:
                kubelet = registration_pb2_grpc.RegistrationStub(channel)
                endpoint = kubelet.GetInfo(registration_pb2.InfoRequest()).endpoint
            assert Path(endpoint) == node.socket
            with connected(Path(endpoint)) as channel:
                assert csi_pb2_grpc.IdentityStub(channel).GetPluginInfo(csi_pb2.GetPluginInfoRequest()).name

    def test_a_refusal_makes_it_unhealthy(self, directory: Path) -> None:
        with running(registration_dir=str(directory)) as node:
            with connected(directory / "driver.longhorn.io-reg.sock") as channel:
                registration_pb2_grpc.RegistrationStub(channel).NotifyRegistrationStatus(REFUSED)
            assert check(node.channel) == Status.NOT_SERVING
            with pytest.raises(grpc.RpcError, match="another plugin has that name"):
                node.identity.Probe(csi_pb2.ProbeRequest())

    def test_a_refusal_ends_the_process_with_kubelet_s_words(self, directory: Path) -> None:
        command = [sys.executable, "-m", "plugin.cli", "--data-dir", directory / "ebi", "serve", "--node-id", "node-1"]
        command += ["--endpoint", directory / "csi.sock", "--registration-dir", directory]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                with connected(directory / "driver.longhorn.io-reg.sock") as channel:
                    kubelet = registration_pb2_grpc.RegistrationStub(channel)
                    kubelet.NotifyRegistrationStatus(REFUSED, wait_for_ready=True, timeout=60)
                _, said = process.communicate(timeout=60)
            finally:
                process.kill()
        assert process.returncode == Kind.PRECONDITION.value
        assert "kubelet has not registered driver.longhorn.io: another plugin has that name" in said

    def test_a_dead_server_s_socket_is_replaced_and_a_directory_that_is_not_there_is_told(
        self, directory: Path
    ) -> None:
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(directory / "driver.longhorn.io-reg.sock"))
        with running(registration_dir=str(directory)):
            pass
        with pytest.raises(EbiError, match="there is no directory") as refused, running(registration_dir="/nowhere"):
            pass
        assert refused.value.kind is Kind.PRECONDITION

    def test_is_a_sidecar_s_business_by_default(self) -> None:
        with running() as node:
            assert not node.settings.registration_dir


class TestHealth:
    @pytest.mark.parametrize("service", ["", "csi.v1.Identity", "csi.v1.Controller", "csi.v1.Node"])
    def test_is_that_of_the_whole_driver(self, service: str) -> None:
        with running() as node:
            assert check(node.channel, service) == expected()

    def test_of_a_service_that_is_none_is_not_found(self) -> None:
        with running() as node:
            assert code(lambda: check(node.channel, "csi.v2.Node")) == "NOT_FOUND"

    def test_is_told_at_a_port_where_nothing_else_is(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        with running(health_address=address), grpc.insecure_channel(address) as channel:
            assert check(channel) == expected()
            identity = csi_pb2_grpc.IdentityStub(channel)
            assert code(lambda: identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest())) == "UNIMPLEMENTED"

    def test_a_port_that_is_taken_is_told(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(EbiError, match="cannot tell the health") as refused, running(health_address=address):
                pass
        assert refused.value.kind is Kind.UNAVAILABLE


class TestRequirements:
    def test_name_a_permission(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        node = tmp_path / "control"
        node.touch(mode=0o600)
        monkeypatch.setattr(requirements, "_TOOLS", ())
        monkeypatch.setattr(requirements, "_NODES", {node: "dm-mod"})
        if os.geteuid() == 0:
            for parent in (tmp_path, *tmp_path.parents[:3]):
                parent.chmod(0o755)
            os.seteuid(65534)
        else:
            node.chmod(0)
        try:
            assert requirements.missing() == [f"the permission to open {node}"]
        finally:
            os.seteuid(os.getuid())

    def test_name_what_is_missing_by_its_kind(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        closed = tmp_path / "closed"
        closed.mkdir()
        monkeypatch.setattr(requirements, "_TOOLS", ("sh", "no-such-tool"))
        monkeypatch.setattr(requirements, "_NODES", {tmp_path / "absent": "no-such-module"})
        assert requirements.missing() == [
            "the tool no-such-tool",
            f"the module no-such-module ({tmp_path / 'absent'})",
        ]
