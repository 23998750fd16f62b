"""Images made from detached volumes, read as files: the volume's own store over its image, as dm-snapshot lays it out.

`tests/kernel/test_export.py` has the kernel write the volumes.
"""

import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from plugin.errors import EbiError, Kind
from plugin.host.files import Extent
from plugin.images import integrity
from plugin.images.formats import Format
from plugin.images.image import BackingImage
from plugin.images.progress import Progress
from plugin.images.secrets import DocumentSecrets
from plugin.luks import header
from plugin.luks.parameters import SecretParameters
from plugin.luks.payload import Cipher
from plugin.settings import Settings
from plugin.volumes import Volume, Volumes
from plugin.volumes.record import Records
from tests.unit.conftest import KIB, MIB, NAMESPACE, Store, clone, make_raw, manifest, secret

CHUNK = 4 * KIB  # small, so that a few hundred of them need a second area of metadata
PER_AREA = CHUNK // 16
CAPACITY = 4 * MIB
SECRET = {"secret": "key", "secret_namespace": NAMESPACE}


def exported(name: str = "copy", volume: str = "vol", **parameters: str) -> dict[str, Any]:
    return manifest(name, "export-from-volume", volume_name=volume, **parameters)


@dataclass
class Node:
    """A store of images, and volumes that look as if the kernel had written them."""

    store: Store
    volumes: Volumes = field(init=False)

    def __post_init__(self) -> None:
        root = self.store.work / "data" / "volumes"
        self.volumes, self.records = Volumes(root, self.store.images, Settings()), Records(root)

    def export(self, document: dict[str, Any], **more: Any) -> BackingImage:
        return self.store.images.apply(document, self.store.secrets, volumes=self.volumes.disks, **more)

    def make(self, image: BackingImage | None, *, encrypted: bool, written: Mapping[int, bytes]) -> Volume:
        """The volume `vol` with these chunks written, in this order."""
        given = {"encrypted": str(encrypted).lower(), **({"backingImage": image.name} if image else {})}
        made = replace(self.volumes.create("vol", CAPACITY, given), chunk=CHUNK)
        pieces = written if image is None else _file(made, written)
        os.truncate(made.path, made.header_size)  # what is not written is never read: a hole is as good
        os.truncate(made.path, made.file_size)
        cipher = None
        if encrypted:
            parameters = self.parameters
            key = header.new_key(parameters)
            header.create(made.path, parameters, key, sector_size=4096, owner="it")
            cipher = Cipher(parameters.cipher, key, 4096)
        with made.path.open("r+b") as file:
            for number, piece in pieces.items():
                buffer = bytearray(piece)
                if cipher:
                    cipher.encrypt(buffer, number * CHUNK)
                file.seek(made.header_size + number * CHUNK)
                file.write(buffer)
        return self.records.save(made, formatted=True)

    @property
    def parameters(self) -> SecretParameters:
        return SecretParameters.from_data(self.store.secrets.get("key", NAMESPACE), "it")


def _file(volume: Volume, written: Mapping[int, bytes]) -> dict[int, bytes]:
    """The chunks of the payload of `volume` that holds `written`: in a store over its image, the others behind."""
    edge, behind = volume.covered // CHUNK, volume.store_size // CHUNK
    rest = {behind + number - edge: piece for number, piece in written.items() if number >= edge}
    return rest | _store({number: piece for number, piece in written.items() if number < edge})


def _store(written: Mapping[int, bytes], valid: int = 1) -> dict[int, bytes]:
    """The chunks of a persistent store that holds `written`."""
    chunks = {0: struct.pack("<4sIII", b"SnAp", valid, 1, CHUNK // 512).ljust(CHUNK, b"\0")}
    metadata: dict[int, bytes] = {1: b""}
    for index, (old, piece) in enumerate(written.items()):
        area, place = divmod(index, PER_AREA)
        first = 1 + area * (PER_AREA + 1)
        new = first + 1 + place
        metadata[first] = metadata.get(first, b"") + struct.pack("<QQ", old, new)
        metadata.setdefault(first + PER_AREA + 1, b"") if place == PER_AREA - 1 else None
        chunks[new] = piece
    return chunks | {at: entries.ljust(CHUNK, b"\0") for at, entries in metadata.items()}


def _shown(image: Path | None, written: Mapping[int, bytes]) -> bytes:
    disk = bytearray(CAPACITY)
    if image:
        content = image.read_bytes()
        disk[: len(content)] = content
    for number, piece in written.items():
        disk[number * CHUNK : (number + 1) * CHUNK] = piece
    return bytes(disk)


@pytest.fixture(scope="module")
def first(first_store: Store) -> Store:
    raw, qcow2 = first_store.work / "raw", first_store.work / "qcow2"
    first_store.download(make_raw(raw, 2 * MIB, [(0, 300 * KIB), (MIB, 128 * KIB)]))
    first_store.apply(clone("locked", "golden", "encrypt"))
    subprocess.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, qcow2], check=True)
    first_store.download(qcow2, "packed")
    return first_store


@pytest.fixture
def node(first: Store, tmp_path: Path) -> Node:
    return Node(first.copied(tmp_path))


@pytest.fixture
def written() -> dict[int, bytes]:
    """Some 500 chunks, most behind one another, the others anywhere, the last of the image and of the volume, too."""
    numbers = [*range(800, 1024), 3, 70, 511, 512, 2, *range(100, 400)]
    return {number: os.urandom(CHUNK) for number in numbers}


class TestDetached:
    @pytest.mark.parametrize("form", [Format.RAW, Format.QCOW2])
    def test_plain_volume_is_what_its_device_shows(self, node: Node, written: dict[int, bytes], form: Format) -> None:
        node.make(node.store.images.get("golden"), encrypted=False, written=written)
        image = node.export(exported(export_type=str(form)))
        assert (image.status.format, image.encrypted, image.virtual_size) == (form, False, CAPACITY)
        raw = node.store.images.raw("copy")
        assert raw.read_bytes() == _shown(node.store.work / "raw", written)
        integrity.verify(node.store.images, Settings(workers=1), "copy")

    def test_encrypted_volume_becomes_an_encrypted_image(self, node: Node, written: dict[int, bytes]) -> None:
        volume = node.make(node.store.images.get("locked"), encrypted=True, written=written)
        image = node.export(exported())
        assert image.encrypted and (image.spec.secret, image.spec.secret_namespace) == ("key", NAMESPACE)
        keys = {header.volume_key(path, node.parameters.passphrase, "it") for path in (image.path, volume.path)}
        assert len(keys) == 2
        node.store.apply(clone("back", "copy", "decrypt"))
        assert node.store.images.get("back").path.read_bytes() == _shown(node.store.work / "raw", written)

    def test_what_neither_wrote_is_a_hole(self, node: Node) -> None:
        node.make(node.store.images.get("locked"), encrypted=True, written={1000: os.urandom(CHUNK)})
        expected = [Extent(0, 320 * KIB), Extent(MIB, 128 * KIB), Extent(1000 * CHUNK, CHUNK)]
        assert node.export(exported()).extents() == expected

    @pytest.mark.parametrize("encrypted", [True, False])
    def test_volume_without_an_image(self, node: Node, written: dict[int, bytes], encrypted: bool) -> None:
        node.make(None, encrypted=encrypted, written=written)
        image = node.export(exported(**(SECRET if encrypted else {})))
        if encrypted:
            image = node.store.apply(clone("back", "copy", "decrypt"))
        assert image.path.read_bytes() == _shown(None, written)

    def test_nothing_is_left_beside_the_image_and_nobody_deletes_the_volume_meanwhile(
        self, node: Node, written: dict[int, bytes]
    ) -> None:
        volume, refused = node.make(node.store.images.get("golden"), encrypted=False, written=written), []

        def meanwhile(progress: Progress) -> None:
            if progress.state == "in-progress" and not refused:
                with pytest.raises(EbiError) as caught:
                    node.volumes.delete("vol")
                refused.append(caught.value.kind)

        image = node.export(exported(), progress=meanwhile)
        assert refused == [Kind.BUSY] and volume.path.exists()
        assert {path.name for path in image.directory.iterdir()} == {"image", "extents.json", "record.json"}

    def test_applying_it_again_changes_nothing(self, node: Node, written: dict[int, bytes]) -> None:
        node.make(node.store.images.get("locked"), encrypted=True, written=written)
        first = node.export(exported())
        assert node.export(exported()) == node.export(exported(export_type="raw")) == first
        with pytest.raises(EbiError, match="differs in sourceParameters") as caught:
            node.export(exported(volume="other"))
        assert caught.value.kind is Kind.EXISTS

    def test_volume_over_a_qcow2_image(self, node: Node, written: dict[int, bytes]) -> None:
        node.make(node.store.images.get("packed"), encrypted=False, written=written)
        assert node.export(exported()).path.read_bytes() == _shown(node.store.work / "raw", written)

    def test_a_storage_class_has_it_exported_on_demand(self, node: Node, written: dict[int, bytes]) -> None:
        node.make(node.store.images.get("golden"), encrypted=False, written=written)
        given = {"backingImage": "copy", "backingImageDataSourceType": "export-from-volume"}
        given["backingImageDataSourceParameters"] = '{"volume-name": "vol", "export-type": "raw"}'
        assert _when_ready(lambda: node.volumes.create("second", CAPACITY, given)).image == "copy"
        assert node.store.images.get("copy").path.read_bytes() == _shown(node.store.work / "raw", written)
        given["backingImageDataSourceParameters"] = (
            '{"volume-name": " vol ", "sparse": "true"}'  # the same, left to defaults
        )
        assert node.volumes.create("third", CAPACITY, given).image == "copy"
        given["backingImageDataSourceParameters"] = '{"volume-name": "vol", "sparse": "false"}'
        with pytest.raises(EbiError, match="data source is different"):
            node.volumes.create("fourth", CAPACITY, given)


def _when_ready(create: Callable[[], Volume]) -> Volume:
    """What an orchestrator does: it asks until it has an answer."""
    while True:
        try:
            return create()
        except EbiError as error:
            if error.kind is not Kind.UNAVAILABLE:
                raise


class TestStartedFromAnImage:
    """Which volumes an image can't be started from; `tests/kernel` stages those that it can."""

    @pytest.mark.parametrize(
        ("image", "given", "capacity", "message", "kind"),
        [
            ("golden", {"encrypted": "true"}, CAPACITY, "the backing image golden is not encrypted", Kind.INVALID),
            ("locked", {}, CAPACITY, "the backing image locked is encrypted", Kind.INVALID),
            ("golden", {}, MIB, "volume size should be larger than the backing image size", Kind.OUT_OF_RANGE),
            ("failed", {}, CAPACITY, "backing image failed is not ready, but failed", Kind.PRECONDITION),
            ("absent", {}, CAPACITY, "backing image absent not found", Kind.NOT_FOUND),
            (
                "golden",
                {"backingImageDataSourceType": "upload"},
                CAPACITY,
                "existing backing image golden data source is different from the parameters",
                Kind.INVALID,
            ),
        ],
    )
    def test_mismatch(
        self, node: Node, image: str, given: dict[str, str], capacity: int, message: str, kind: Kind
    ) -> None:
        with suppress(EbiError):
            node.store.apply(manifest("failed", "download", url=(node.store.work / "nothing").as_uri()))
        with pytest.raises(EbiError, match=message) as caught:
            node.volumes.create("vol", capacity, {"backingImage": image, **given})
        assert caught.value.kind is kind
        assert node.volumes.list() == []


class TestRefused:
    @pytest.mark.parametrize(
        ("document", "message", "kind"),
        [
            (exported(volume="gone"), "invalid parameter volume-name gone", Kind.INVALID),
            (exported(volume="../x"), r"invalid parameter volume-name \.\./x", Kind.INVALID),
            (exported(volume=""), "invalid parameter volume-name", Kind.INVALID),
            (exported(export_type="vmdk"), "unsupported export type vmdk", Kind.INVALID),
            (exported(export_type="qcow2"), "is a LUKS2 file and no qcow2", Kind.INVALID),
            (exported(secret="other"), "failed to get the secret other in the namespace", Kind.NOT_FOUND),
            (exported(url="http://example.org"), "invalid parameter url", Kind.INVALID),
            (manifest("copy", "export-from-volume", "0" * 128, volume_name="vol"), "can't be known", Kind.INVALID),
        ],
    )
    def test_what_a_manifest_may_not_ask_for(
        self, node: Node, document: dict[str, Any], message: str, kind: Kind
    ) -> None:
        node.make(node.store.images.get("locked"), encrypted=True, written={})
        with pytest.raises(EbiError, match=message) as caught:
            node.export(document)
        assert caught.value.kind is kind
        assert not (node.store.work / "data" / "images" / "copy").exists()

    def test_a_secret_for_a_plain_volume_or_none_for_an_encrypted_one(self, node: Node) -> None:
        node.make(None, encrypted=True, written={})
        with pytest.raises(EbiError, match="secret is not provided for the export of the encrypted volume vol"):
            node.export(exported())
        node.volumes.delete("vol")
        node.make(None, encrypted=False, written={})
        with pytest.raises(EbiError, match="volume vol is not encrypted"):
            node.export(exported(**SECRET))

    def test_a_volume_that_was_never_staged(self, node: Node) -> None:
        node.volumes.create("vol", CAPACITY, {"backingImage": "golden"})
        with pytest.raises(EbiError, match="never staged") as caught:
            node.export(exported())
        assert caught.value.kind is Kind.PRECONDITION

    @pytest.mark.parametrize("whose", ["volume", "short volume", "image"])
    def test_a_file_that_is_missing_or_short(self, node: Node, whose: str) -> None:
        image = node.store.images.get("locked")
        volume = node.make(image, encrypted=True, written={})
        if whose == "short volume":
            os.truncate(volume.path, MIB)
        else:
            (image if whose == "image" else volume).path.unlink()
        owner = "backing image locked" if whose == "image" else "encrypted volume vol"
        with pytest.raises(EbiError, match=f"the file of {owner} (is missing|has {MIB} bytes)") as caught:
            node.export(exported())
        assert caught.value.kind is Kind.PRECONDITION and caught.value.hint
        assert not (node.store.work / "data" / "images" / "copy").exists()

    def test_a_volume_whose_image_is_gone(self, node: Node) -> None:
        image = node.store.images.get("golden")
        node.make(image, encrypted=False, written={})
        shutil.rmtree(image.path.parent)
        with pytest.raises(EbiError, match="volume vol can't be read: backing image golden") as caught:
            node.export(exported())
        assert caught.value.kind is Kind.PRECONDITION and caught.value.hint
        assert not (node.store.work / "data" / "images" / "copy").exists()

    def test_a_cipher_that_only_the_kernel_knows(self, node: Node) -> None:
        volume = node.make(None, encrypted=True, written={})
        parameters = replace(node.parameters, cipher="aes-xts-plain")
        header.create(volume.path, parameters, header.new_key(parameters), sector_size=4096, owner="it")
        with pytest.raises(EbiError, match="the cipher aes-xts-plain for encrypted volume vol") as caught:
            node.export(exported(**SECRET))
        assert caught.value.kind is Kind.UNSUPPORTED
        assert not (node.store.work / "data" / "images" / "copy").exists()

    def test_another_passphrase(self, node: Node) -> None:
        node.make(node.store.images.get("locked"), encrypted=True, written={})
        node.store.secrets = DocumentSecrets([secret(passphrase=b"wrong")])
        with pytest.raises(EbiError, match="the passphrase does not open encrypted volume vol"):
            node.export(exported())
        assert node.store.images.get("copy").status.state == "failed"

    @pytest.mark.parametrize("sort", ["given up", "none", "nonsense"])
    def test_a_store_that_is_damaged(self, node: Node, sort: str) -> None:
        volume = node.make(node.store.images.get("golden"), encrypted=False, written={5: os.urandom(CHUNK)})
        chunks = {
            "given up": _store({}, valid=0),
            "none": {0: bytes(CHUNK)},
            "nonsense": {1: struct.pack("<QQ", 5, 1 << 40).ljust(CHUNK, b"\0")},
        }[sort]
        with volume.path.open("r+b") as file:
            for number, piece in chunks.items():
                file.seek(number * CHUNK)
                file.write(piece)
        with pytest.raises(EbiError, match=r"damaged|given up") as caught:
            node.export(exported())
        assert caught.value.kind is Kind.PRECONDITION

    def test_where_there_are_no_volumes(self, store: Store) -> None:
        with pytest.raises(EbiError, match="there are no volumes"):
            store.apply(exported())
