"""The whole of csi-sanity against `ebi serve`, for every sort of volume that a StorageClass can ask for.

The binary is found by EBI_CSI_SANITY, or where `make setup` puts it; EBI_TEST_DIR names a directory for the data.
"""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from csi.stubs import csi_pb2, csi_pb2_grpc
from plugin.host import dm, udev
from plugin.host.files import private_directory
from plugin.images.secrets import DocumentSecrets
from plugin.images.store import Images
from plugin.settings import Settings
from tests.demo import golden
from tests.demo.__main__ import example
from tests.demo.node import Node
from tests.sanity.report import Report
from tests.unit.csi_node import connected

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
BINARY = os.environ.get("EBI_CSI_SANITY", str(Path(os.environ.get("EBI_CACHE", ROOT / ".cache")) / "bin/csi-sanity"))
SECRET = {"CRYPTO_KEY_VALUE": "sanity", "CRYPTO_PBKDF": "pbkdf2", "CRYPTO_PBKDF_FORCE_ITERATIONS": "1000"}
# By whether it is encrypted: the image of deploy/examples that a volume starts from.
IMAGES = {True: "parrot-cloned-encrypted", False: "parrot"}
# csi-sanity knows no secret for NodeExpandVolume, and we need none.
CALLS = ("CreateVolume", "DeleteVolume", "NodeStageVolume", "NodePublishVolume", "ControllerExpandVolume")
SECRETS = {f"{call}Secret": SECRET for call in (*CALLS, "ControllerValidateVolumeCapabilities")}
# What the driver does not offer; a test may be skipped for want of these only.
NOT_OFFERED = ("ublish", "Snapshot", "Clon", "odify", "GroupController", "testnodevolumeattachlimit")


def write(path: Path, document: object) -> Path:
    path.write_text(yaml.safe_dump(document))
    return path


def make_images(node: Node, work: Path) -> None:
    """A small golden image, plain and encrypted, by the manifests of deploy/examples."""
    tree, raw = work / "tree", work / "golden.raw"
    tree.mkdir()
    golden.fill_tree(Path(golden.__file__).parent, tree, MIB)
    golden.make_raw(tree, raw, 16 * MIB)
    metadata = {"name": "longhorn-crypto", "namespace": "longhorn-system"}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": SECRET}
    images = Images(private_directory(node.data_dir) / "images", Settings(data_dir=node.data_dir))
    download = example("1-download.yaml", work, url=raw.as_uri(), checksum=golden.sha512(raw))
    for manifest in (download, example("3-encrypt.yaml", work)):
        images.apply(yaml.safe_load(manifest.read_text()), DocumentSecrets([secret]))


def csi_sanity(node: Node, work: Path, access: str, parameters: dict[str, str]) -> Report:
    """Run it with the `parameters` of a StorageClass; its own words go to our output."""
    report = work / "junit.xml"
    command = [
        BINARY,
        f"--csi.endpoint=unix://{node.socket}",
        f"--csi.mountdir={work / 'mount'}",
        f"--csi.stagingdir={work / 'staging'}",
        f"--csi.secrets={write(work / 'secrets.yaml', SECRETS)}",
        f"--csi.testvolumeparameters={write(work / 'parameters.yaml', parameters)}",
        f"--csi.testvolumesize={32 * MIB}",
        f"--csi.testvolumeexpandsize={48 * MIB}",
        f"--csi.testvolumeaccesstype={access}",
        f"--ginkgo.junit-report={report}",
        "--ginkgo.no-color",
        "--ginkgo.seed=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    print(done.stdout, done.stderr)
    assert report.exists(), f"csi-sanity exited with {done.returncode} and left no report"
    return Report.read(report)


@pytest.mark.parametrize("access", ["mount", "block"])
@pytest.mark.parametrize("start", ["image", "blank"])
@pytest.mark.parametrize("encrypted", [True, False], ids=["encrypted", "plain"])
def test_csi_sanity_finds_nothing_and_nothing_is_left(
    home: Path, tell: dict[str, Report], access: str, start: str, encrypted: bool
) -> None:
    node = Node(home)
    parameters = {"encrypted": str(encrypted).lower(), "numberOfReplicas": "3", "staleReplicaTimeout": "2880"}
    if start == "image":
        make_images(node, home)
        parameters["backingImage"] = IMAGES[encrypted]
    with node.server(), connected(node.socket) as channel:
        report = csi_sanity(node, home, access, parameters)
        left = csi_pb2_grpc.ControllerStub(channel).ListVolumes(csi_pb2.ListVolumesRequest()).entries
        mapped = [mapper.name for mapper in dm.every(udev.PREFIX)]
    tell[f"{'encrypted' if encrypted else 'plain'}, {start}, {access}"] = report
    assert not report.failed, node.log.read_text()[-20_000:]
    assert report.passed
    assert not [reason for reason in report.skipped if not any(word in reason for word in NOT_OFFERED)]
    assert not left, "it left volumes"
    assert not mapped, "it left devices"  # and mounts, loops: see the fixture
