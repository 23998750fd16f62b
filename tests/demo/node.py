"""A node under the demonstration: `ebi` as a command, `ebi serve` as a process, kubelet's calls to its socket."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from prometheus_client.parser import text_string_to_metric_families

from csi.stubs import csi_pb2, csi_pb2_grpc


class Node:
    """One data directory with its server, all in the directory `work`; `wrapper` is a command to run `ebi` under."""

    def __init__(self, work: Path, wrapper: Sequence[str] = ()) -> None:
        self._command = [*wrapper, sys.executable, "-m", "plugin.cli", "--data-dir", work / "ebi"]
        self.data_dir = work / "ebi"
        self.socket = work / "csi.sock"
        self.log = work / "server.log"
        self.staging = work / "kubelet" / "staging"
        self.metrics_port = self.pid = 0
        self.options: list[str] = []

    def ebi(self, *arguments: str | Path, fails: bool = False) -> subprocess.CompletedProcess[str]:
        """Run `ebi` with this node's data directory; what it prints is shown, indented."""
        command = [*self._command, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print("".join(f"    {line}\n" for line in (done.stdout + done.stderr).splitlines()), end="", flush=True)
        assert (done.returncode != 0) == fails, f"ebi {arguments} exited with {done.returncode}"
        return done

    def image(self, name: str) -> dict[str, Any]:
        """The backing image `name` as `ebi get` tells it."""
        command = [*self._command, "get", "backingimages", name, "-o", "json"]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)

    @contextmanager
    def server(self) -> Iterator["Kubelet"]:
        """`ebi serve` from ready to SIGTERM; yields what kubelet would call it with."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.metrics_port = free.getsockname()[1]
        command = [*self._command, *self.options, "serve"]
        command += ["--endpoint", f"unix://{self.socket}", "--metrics-address", f"127.0.0.1:{self.metrics_port}"]
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        self.pid = process.pid
        # gRPC would wait ever longer between its attempts, and a slow machine starts slowly.
        channel = grpc.insecure_channel(f"unix://{self.socket}", options=[("grpc.max_reconnect_backoff_ms", 1000)])
        try:
            deadline = time.monotonic() + 240
            identity = csi_pb2_grpc.IdentityStub(channel)
            while True:
                try:
                    identity.Probe(csi_pb2.ProbeRequest(), wait_for_ready=True, timeout=5)
                    break
                except grpc.RpcError as error:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"no answer from the server:\n{self.log.read_text()}") from error
            yield Kubelet(channel)
        finally:
            channel.close()
            if process.poll() is None:
                os.kill(process.pid, signal.SIGTERM)
            try:
                status = process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            assert status == 0, f"the server ended with {status}:\n{self.log.read_text()[-20_000:]}"

    def metrics(self) -> str:
        """The metrics endpoint's whole answer."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=60) as answer:
            return str(answer.read().decode())

    def timings(self) -> list[tuple[str, str, int, float]]:
        """What the metrics endpoint tells of time: (metric, its labels, count, seconds in all)."""
        rows: dict[tuple[str, str], dict[str, float]] = {}
        for family in text_string_to_metric_families(self.metrics()):
            for sample in family.samples:
                if family.type == "histogram" and sample.name.endswith(("_sum", "_count")):
                    name, _, part = sample.name.rpartition("_")
                    labels = " ".join(value for value in sample.labels.values())
                    rows.setdefault((name, labels), {})[part] = sample.value
        return [(name, labels, int(row["count"]), row["sum"]) for (name, labels), row in rows.items() if row["count"]]


class Kubelet:
    """The calls that kubelet and the provisioner make, with one filesystem volume in mind."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.controller = csi_pb2_grpc.ControllerStub(channel)
        self.node = csi_pb2_grpc.NodeStub(channel)
        mode = csi_pb2.VolumeCapability.AccessMode(mode=csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER)
        self.capability = csi_pb2.VolumeCapability(
            access_mode=mode, mount=csi_pb2.VolumeCapability.MountVolume(fs_type="ext4")
        )

    def create(self, name: str, size: int, parameters: dict[str, str]) -> str:
        """CreateVolume; returns the volume's id."""
        request = csi_pb2.CreateVolumeRequest(
            name=name,
            capacity_range=csi_pb2.CapacityRange(required_bytes=size),
            volume_capabilities=[self.capability],
            parameters=parameters,
        )
        while True:
            try:
                return self.controller.CreateVolume(request).volume.volume_id
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.ABORTED:
                    raise
                time.sleep(0.2)  # as the provisioner does: the image's checksum was just being written down

    def stage(self, volume: str, staging: Path, secrets: dict[str, str]) -> None:
        """NodeStageVolume, the directory made first as kubelet does."""
        staging.mkdir(parents=True, exist_ok=True)
        request = csi_pb2.NodeStageVolumeRequest(
            volume_id=volume,
            staging_target_path=str(staging),
            volume_capability=self.capability,
            secrets=secrets,
        )
        self.node.NodeStageVolume(request)

    def publish(self, volume: str, staging: Path, target: Path) -> None:
        """NodePublishVolume."""
        target.parent.mkdir(parents=True, exist_ok=True)
        request = csi_pb2.NodePublishVolumeRequest(
            volume_id=volume,
            staging_target_path=str(staging),
            target_path=str(target),
            volume_capability=self.capability,
        )
        self.node.NodePublishVolume(request)

    def unpublish(self, volume: str, target: Path) -> None:
        """NodeUnpublishVolume."""
        self.node.NodeUnpublishVolume(csi_pb2.NodeUnpublishVolumeRequest(volume_id=volume, target_path=str(target)))

    def unstage(self, volume: str, staging: Path) -> None:
        """NodeUnstageVolume."""
        self.node.NodeUnstageVolume(
            csi_pb2.NodeUnstageVolumeRequest(volume_id=volume, staging_target_path=str(staging))
        )

    def delete(self, volume: str) -> None:
        """DeleteVolume."""
        self.controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=volume))
