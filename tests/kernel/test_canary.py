"""A passphrase stays in memory and pipes: hunted through everything that a whole run leaves behind."""

import base64
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import grpc
import pytest
import yaml

from csi.stubs import csi_pb2
from plugin.host import loop
from tests.demo import golden
from tests.demo.__main__ import example
from tests.demo.node import Kubelet, Node

CANARY = secrets.token_hex(18)  # every passphrase begins with it
# As it might be written down; a multiple of three bytes, so that base64 of what begins with it begins so as well.
NEEDLES = (CANARY.encode(), base64.b64encode(CANARY.encode()), CANARY.encode().hex().encode())
MIB = 1 << 20
PARAMETERS = {"encrypted": "true", "backingImage": "parrot-cloned-encrypted"}
# Every argv and environment of every program that is started, from the kernel; it stops programs at execve only,
# since every system call would take for ever.
TRACER = ["strace", "--daemonize", "--follow-forks", "--seccomp-bpf", "--trace=execve", "-v", "-s", "65536"]


# Commands, as JSON, one after the other.
MANY = """
import json, sys
from plugin import cli
for command in json.load(sys.stdin):
    print("status", cli.main(command), flush=True)
"""


@dataclass(frozen=True)
class Run:
    """A node below `work`, and what its user gives: the only files in which a passphrase may stand.

    `secret` opens images and volumes, `new` does after a change, `wrong` has the name of `secret` and opens nothing.
    """

    work: Path
    node: Node
    tracer: list[str]
    secret: Path
    new: Path
    wrong: Path
    start: float  # seconds of the epoch

    def ebi(self, *commands: tuple[str | Path, ...], refused: int) -> None:
        """Run `commands` of `ebi` in one process, since to start a traced one takes long.

        Those that are given the wrong passphrase fail, and all others succeed; it is `refused` that many times.
        """
        lists = [["--data-dir", str(self.node.data_dir), *map(str, command)] for command in commands]
        done = subprocess.run(
            [*self.tracer, sys.executable, "-c", MANY],
            input=json.dumps(lists),
            capture_output=True,
            text=True,
            check=True,
        )
        print(done.stdout, done.stderr)
        succeeded = [line == "status 0" for line in done.stdout.splitlines() if line.startswith("status ")]
        assert succeeded == [self.wrong not in command for command in commands]
        assert done.stderr.count("passphrase does not open") == refused


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """One that tells and logs as much as it can, and whose every program is traced."""
    start = time.time() - 1  # a file's times lag behind by a tick
    monkeypatch.setenv("EBI_LOG_LEVEL", "debug")
    monkeypatch.setenv("EBI_DEVICE_TEMPLATE", f"{home}/device-{{volume}}")
    tracer = [*TRACER, "--output", str(home / "execve"), "--output-append-mode"]
    node = Node(home, tracer)
    monkeypatch.setenv("CSI_ENDPOINT", f"unix://{node.socket}")
    given = home / "given"
    given.mkdir()
    return Run(
        home,
        node,
        tracer,
        secret=secret_file(given / "secret.yaml", "longhorn-crypto", "first"),
        new=secret_file(given / "new.yaml", "new", "second"),
        wrong=secret_file(given / "wrong.yaml", "longhorn-crypto", "wrong"),
        start=start,
    )


def secret_file(path: Path, name: str, ending: str) -> Path:
    """A Secret document with a cheap key derivation; its passphrase is the canary with the `ending`."""
    data = {"CRYPTO_KEY_VALUE": CANARY + ending, "CRYPTO_PBKDF": "pbkdf2", "CRYPTO_PBKDF_FORCE_ITERATIONS": "1000"}
    metadata = {"name": name, "namespace": "longhorn-system"}
    path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": data}))
    return path


def data_of(secret: Path) -> dict[str, str]:
    """What kubelet makes of a Secret."""
    return dict(yaml.safe_load(secret.read_text())["stringData"])


@contextmanager
def refused() -> Iterator[None]:
    """The block is refused over CSI, and its words are printed, where they are hunted."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    print(caught.value)


def make_images(run: Run) -> None:
    """Download, encrypt, decrypt, re-encrypt."""
    work, raw = run.work, run.work / "golden.raw"
    (work / "tree").mkdir()
    golden.fill_tree(Path(golden.__file__).parent, work / "tree", MIB)
    golden.make_raw(work / "tree", raw, 16 * MIB)
    download = example("1-download.yaml", work, url=raw.as_uri(), checksum=golden.sha512(raw))
    encrypt = example("3-encrypt.yaml", work)
    source = {"backing_image": "parrot-cloned-encrypted", "source_secret": "longhorn-crypto"}
    source["source_secret_namespace"] = "longhorn-system"
    reencrypt = example("3-encrypt.yaml", work, name="reencrypted", encryption="reencrypt", secret="new", **source)
    clones = ("-f", run.new, "-f", example("4-decrypt.yaml", work), "-f", reencrypt)
    run.ebi(
        ("apply", "-f", run.secret, "-f", download, "-f", encrypt),
        ("apply", "-f", run.wrong, *clones),
        ("apply", "-f", run.secret, *clones),
        refused=2,
    )


def change_an_image(run: Run) -> None:
    """Its passphrase, its header; from here on the new passphrase opens it as well."""
    name, header = "parrot-cloned-encrypted", run.work / "header"
    run.ebi(
        ("image", "rekey", name, "--old", run.wrong, "--new", run.new),
        ("image", "rekey", name, "--old", run.secret, "--new", run.new, "--keep-old"),
        ("image", "header", "backup", name, header),
        ("image", "header", "restore", name, header),
        ("image", "verify", name),
        refused=1,
    )


def export_an_image(run: Run) -> None:
    """Decrypted, and dense."""
    export = ("image", "export", "parrot-cloned-encrypted")
    run.ebi(
        (*export, run.work / "refused", "--decrypt", "-f", run.wrong),
        (*export, run.work / "decrypted", "--decrypt", "-f", run.secret),
        (*export, run.work / "dense", "--dense", "-f", run.secret),
        refused=1,
    )


def use_a_volume(run: Run, kubelet: Kubelet) -> None:
    """Stage, publish, expand, rekey, attach by hand; exported while it is in use and when it is not."""
    node, given = run.node, data_of(run.secret)
    volume = kubelet.create("canary", 32 * MIB, PARAMETERS)
    staging, target = node.staging / volume, run.work / "target"
    for bad in (data_of(run.wrong), {**given, "CRYPTO_KEY_PROVIDER": "vault"}):
        with refused():
            kubelet.stage(volume, staging, bad)
    kubelet.stage(volume, staging, given)
    kubelet.publish(volume, staging, target)
    grown = csi_pb2.CapacityRange(required_bytes=48 * MIB)
    kubelet.controller.ControllerExpandVolume(
        csi_pb2.ControllerExpandVolumeRequest(volume_id=volume, capacity_range=grown, secrets=given)
    )
    kubelet.node.NodeExpandVolume(
        csi_pb2.NodeExpandVolumeRequest(volume_id=volume, volume_path=str(target), capacity_range=grown, secrets=given)
    )
    export = example("6-export.yaml", run.work, name="exported-in-use", volume_name=volume)
    run.ebi(
        ("apply", "-f", run.wrong, "-f", export),
        ("apply", "-f", run.secret, "-f", export),
        ("volume", "rekey", volume, "--secret", run.wrong, "--new-secret", run.new),
        ("volume", "rekey", volume, "--secret", run.secret, "--new-secret", run.new),
        refused=2,
    )
    kubelet.unpublish(volume, target)
    kubelet.unstage(volume, staging)
    export = example("6-export.yaml", run.work, name="exported", volume_name=volume, secret="new")
    run.ebi(
        ("volume", "attach", volume, target, "-f", run.wrong),
        ("volume", "attach", volume, target, "-f", run.new),
        ("volume", "detach", volume),
        ("apply", "-f", run.new, "-f", export),
        refused=1,
    )


def use_an_inline_volume(run: Run, kubelet: Kubelet) -> None:
    """It is made, staged and published by one call, and goes with its unpublish."""
    target = run.work / "pod" / "mount"
    target.parent.mkdir()

    def publish(secret: Path) -> None:
        kubelet.node.NodePublishVolume(
            csi_pb2.NodePublishVolumeRequest(
                volume_id="csi-" + "0f" * 32,
                target_path=str(target),
                volume_capability=kubelet.capability,
                secrets=data_of(secret),
                volume_context={"csi.storage.k8s.io/ephemeral": "true", "size": "32Mi", **PARAMETERS},
            )
        )

    with refused():
        publish(run.wrong)
    publish(run.secret)
    kubelet.unpublish("csi-" + "0f" * 32, target)


def use_an_attached_device(run: Run, kubelet: Kubelet) -> None:
    """It is formatted, then opened."""
    staging, device = run.node.staging / "pvc-1", run.work / "disk"
    staging.mkdir(parents=True)
    device.write_bytes(bytes(32 * MIB))

    def stage(secret: Path) -> None:
        kubelet.node.NodeStageVolume(
            csi_pb2.NodeStageVolumeRequest(
                volume_id="pvc-1",
                staging_target_path=str(staging),
                volume_capability=kubelet.capability,
                secrets=data_of(secret),
                volume_context={"encrypted": "true", "ebi/formatted": "false"},
            )
        )

    with loop.attached(device) as attached:
        (run.work / "device-pvc-1").symlink_to(attached)
        stage(run.secret)
        kubelet.unstage("pvc-1", staging)
        with refused():
            stage(run.wrong)
        stage(run.secret)
        kubelet.unstage("pvc-1", staging)


def changed(folder: Path, since: float) -> Iterator[tuple[Path, bytes]]:
    """The regular files below `folder` that were written after `since`, seconds of the epoch, and what is in them."""
    with tempfile.TemporaryFile(dir=folder) as new:
        # In the virtual machine the host's files, which others use, have another one.
        device = os.fstat(new.fileno()).st_dev
    # As fast as it gets, for /tmp may hold much.
    command = ["find", folder, "-type", "f", "-newerct", f"@{since}", "-printf", "%D %p\\n"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout  # files may vanish under it
    for line in listed.splitlines():
        found, _, file = line.partition(" ")
        if int(found) == device:
            with suppress(FileNotFoundError):
                yield Path(file), Path(file).read_bytes()


def test_no_passphrase_is_found_anywhere_after_a_full_run(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    make_images(run)
    change_an_image(run)
    export_an_image(run)
    with run.node.server() as kubelet:
        use_a_volume(run, kubelet)
        use_an_inline_volume(run, kubelet)
        use_an_attached_device(run, kubelet)
        run.node.ebi("doctor")
        print(run.node.metrics())
    said = "".join(capfd.readouterr()).encode()
    assert (run.work / "execve").read_bytes().count(b"cryptsetup") > 20, "the trace saw nothing"

    seen, found = set(), set()
    folders = [run.work, *(Path(name) for name in ("/run", "/tmp", "/var/log", "/dev/shm"))]
    for where, text in chain([("what was said", said)], *(changed(folder, run.start) for folder in folders)):
        seen.add(where)
        if any(needle in text for needle in NEEDLES):
            found.add(where)
    assert found == {run.secret, run.new, run.wrong}, "they are found elsewhere, or the hunt is blind"
    assert {run.node.log, run.work / "execve"} <= seen, "the hunt is blind"
