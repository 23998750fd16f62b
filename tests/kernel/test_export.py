"""Images made from volumes that the kernel has written: detached, attached and in use, and with the exporter killed."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plugin.errors import EbiError, Kind
from plugin.host import dm, mounts, udev
from plugin.images.image import BackingImage
from plugin.images.secrets import DocumentSecrets
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import Capability, Volumes, disks
from tests.kernel.world import MIB, SECRET, Machine, World, file_hash, tree_hash
from tests.killing import PROGRAMS, killed_at

SECRETS = DocumentSecrets([{"kind": "Secret", "metadata": {"name": "key", "namespace": "tests"}, "stringData": SECRET}])


@pytest.fixture
def machine(home: Path, world: World) -> Machine:
    return Machine(home, world)


def export(images: Images, volumes: Volumes, name: str, **parameters: str) -> BackingImage:
    spec = {"sourceType": "export-from-volume", "sourceParameters": {"volume-name": "vol", **parameters}}
    document = {
        "apiVersion": "longhorn.io/v1beta2",
        "kind": "BackingImage",
        "metadata": {"name": name, "namespace": "tests"},
        "spec": spec,
    }
    return images.apply(document, SECRETS, volumes=volumes.disks)


def decryption(image: BackingImage) -> dict[str, Any]:
    parameters = {
        "backing-image": image.name,
        "encryption": "decrypt",
        "secret": "key",
        "secret-namespace": "tests",
    }
    return {
        "apiVersion": "longhorn.io/v1beta2",
        "kind": "BackingImage",
        "metadata": {"name": "plain", "namespace": "tests"},
        "spec": {"sourceType": "clone", "sourceParameters": parameters},
    }


def exported(machine: Machine, name: str, **parameters: str) -> BackingImage:
    return export(machine.world.images, machine.volumes, name, **parameters)


def remove(machine: Machine, *images: str) -> None:
    for name in images:
        machine.world.images.delete(name)


def scribble(device: Path) -> None:
    """Write here and there: over data, into holes, across chunks, in the last sector."""
    with device.open("r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        for at, length in ((0, 4096), (5 * MIB - 512, 70_144), (20 * MIB, MIB), (size - 512, 512)):
            file.seek(at)
            file.write(os.urandom(length))
        os.fsync(file.fileno())


def test_raw_volume_is_exported_as_its_device_shows_it(machine: Machine, world: World) -> None:
    machine.create("vol", 26 * MIB, world.plain)
    with machine.used("vol", block=True) as target:
        scribble(target)
        shown = file_hash(target)
        raw = exported(machine, "attached")
        assert not _suspended()
        scribble(target)
        assert file_hash(raw.path) == shown
        shown = file_hash(target)
    packed = exported(machine, "packed", **{"export-type": "qcow2"})
    assert packed.status.format == "qcow2" and file_hash(machine.world.images.raw("packed")) == shown
    remove(machine, "attached", "packed")


def test_encrypted_volume_in_use_is_exported_and_starts_new_volumes(machine: Machine, world: World) -> None:
    machine.create("vol", 28 * MIB, world.encrypted)
    target = machine.stage("vol")
    (target / "deep" / "new").write_bytes(os.urandom(2 * MIB))  # not synced: the freeze has it written out
    (target / "deep" / "file7").write_text("changed")
    files = tree_hash(target)
    image = exported(machine, "copy")
    assert not _suspended() and image.encrypted and image.spec.secret == "key"
    assert any("stood still" in event.message for event in image.status.events)
    (target / "deep" / "later").write_text("goes on")
    later = tree_hash(target)
    machine.unstage("vol")
    assert b"golden\n" * 100 not in image.path.read_bytes()

    for source, wanted in ((image, files), (exported(machine, "second"), later)):
        machine.create("new", 28 * MIB, source)
        assert tree_hash(machine.stage("new")) == wanted
        machine.unstage("new")
        machine.volumes.delete("new")
        remove(machine, source.name)


def test_abnormal_volume_is_not_exported(machine: Machine, world: World) -> None:
    machine.create("vol", 26 * MIB, world.plain)
    with machine.used("vol", block=True):
        dm.suspend("ebi-base-vol")
        try:
            with pytest.raises(EbiError, match="can't be exported: the device ebi-base-vol is suspended") as refused:
                exported(machine, "never")
        finally:
            dm.resume("ebi-base-vol")
        assert refused.value.kind is Kind.PRECONDITION
        remove(machine, "never")


@pytest.fixture
def sharing(home: Path) -> Iterator[Path]:
    """A directory on a filesystem that shares blocks."""
    disk, mounted = home / "xfs", home / "mounted"
    disk.touch()
    os.truncate(disk, 320 * MIB)
    mounted.mkdir()
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, mounted], check=True)
    yield mounted
    mounts.unmount(mounted)


def test_where_files_share_blocks_nothing_is_copied_aside(sharing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = Images(sharing / "images", Settings(workers=1))
    volumes = Volumes(sharing / "volumes", images, Settings())
    volumes.create("vol", 48 * MIB, {"encrypted": "true"})
    staging = sharing / "staging"
    staging.mkdir()
    volumes.stage("vol", staging, Capability(), SECRET, {})
    (staging / "file").write_bytes(os.urandom(4 * MIB))
    wanted = tree_hash(staging)
    monkeypatch.delattr(disks, "_copy")
    image = export(images, volumes, "copy", **{"secret": "key", "secret-namespace": "tests"})
    volumes.unstage("vol", staging)
    plain = images.apply(decryption(image), SECRETS)
    subprocess.run(["mount", "-o", "loop,ro,noload", plain.path, staging], check=True)
    assert tree_hash(staging) == wanted
    mounts.unmount(staging)


@pytest.mark.parametrize("children", [False, True], ids=["alone", "with its children"])
def test_a_killed_exporter_lets_the_volume_go_on(machine: Machine, world: World, *, children: bool) -> None:
    machine.create("vol", 32 * MIB, world.encrypted)
    target = machine.stage("vol")
    code = "from plugin.host import dm; import time\nwith dm.still('ebi-vol-vol'): print(1, flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        assert _suspended() == ["ebi-vol-vol"]
        if children:  # as when a container ends; nobody is left then who could resume
            left = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            assert left
            for pid in left:
                os.kill(int(pid), signal.SIGKILL)
        process.send_signal(signal.SIGKILL)
    if children:
        assert _suspended() == ["ebi-vol-vol"]
        machine.volumes.recover()
        assert not _suspended()
    assert udev.watch().wait_until(lambda: not _suspended(), 30)
    (target / "file").write_text("written")
    machine.unstage("vol")


def test_an_export_killed_at_any_step_of_the_capture_leaves_the_volume_at_work(machine: Machine, world: World) -> None:
    machine.create("vol", 32 * MIB, world.encrypted)
    target, images = machine.stage("vol"), world.images
    for number in itertools.count():
        (target / "file").write_bytes(os.urandom(70_000))
        assert killed_at(number, lambda: exported(machine, "copy"), PROGRAMS | {"os.copy_file_range"})
        assert udev.watch().wait_until(lambda: not _suspended(), 10), number
        (target / "later").write_text("goes on")
        found = [image for image in images.list() if image.name == "copy"]
        images.recover()
        assert all({entry.name for entry in image.directory.iterdir()} == {"record.json"} for image in found), number
        if any("stood still" in event.message for image in found for event in image.status.events):
            break  # from here on it has nothing to do with the volume
    assert number > 3
    assert not machine.volumes.stats("vol", target).condition.abnormal
    wanted = tree_hash(target)
    image = exported(machine, "copy")
    machine.unstage("vol")
    machine.create("new", 32 * MIB, image)
    assert tree_hash(machine.stage("new")) == wanted
    machine.unstage("new")
    machine.volumes.delete("new")
    remove(machine, "copy")


def _suspended() -> list[str]:
    return [mapper.name for mapper in dm.every("ebi-") if mapper.suspended]
