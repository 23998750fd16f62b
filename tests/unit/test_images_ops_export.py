"""What goes in can come out: uploads and exports."""

import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from plugin.cli import main
from plugin.errors import EbiError, Kind
from plugin.host.files import Extent, data_extents
from plugin.images import export, extents, formats, qcow2_writer
from plugin.images.disk import CipherSpec
from plugin.images.formats import Format
from plugin.images.http import Download
from plugin.images.image import BackingImage
from plugin.images.qcow2 import Qcow2
from plugin.luks import header
from plugin.settings import Settings
from tests.unit.conftest import KIB, MIB, NAMESPACE, PASSPHRASE, Store, clone, make_raw, manifest, sha512

RUNS = [(0, 4 * KIB), (540 * MIB, 200 * KIB), (541 * MIB + 68 * KIB, MIB + 512)]
SIZE = 600 * MIB + 512


@pytest.fixture(scope="module")
def first(first_store: Store) -> Store:
    first_store.download(make_raw(first_store.work / "raw", SIZE, RUNS))
    first_store.apply(clone("e", "golden", "encrypt"))
    return first_store


@pytest.fixture
def golden(first: Store, tmp_path: Path) -> Store:
    return first.copied(tmp_path)


def pieces(content: bytes, step: int) -> Iterator[bytes]:
    stream = io.BytesIO(content)
    return iter(lambda: stream.read(step), b"")


def upload(store: Store, content: bytes, checksum: str = "", *, size: int | None = None) -> BackingImage:
    return store.images.upload(manifest("up", "upload", checksum), Download(size, pieces(content, MIB)))


def out(
    store: Store, name: str, form: Format | None = None, *, dense: bool = False, decrypt: bool = False, key: bool = True
) -> Path:
    file = store.work / "out"
    secret = store.secrets.get("key", NAMESPACE) if key else None
    export.export(
        store.images, Settings(workers=2), name, file, form=form, dense=dense, decrypt=decrypt, secret=secret
    )  # fmt: skip
    assert file.stat().st_mode & 0o777 == 0o600
    return file


def same(store: Store, file: Path) -> bool:
    return subprocess.run(["cmp", file, store.work / "raw"], check=False).returncode == 0


def on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_an_upload_becomes_an_image(store: Store) -> None:
    content = os.urandom(MIB) + bytes(2 * MIB) + os.urandom(512)
    image = upload(store, content)
    assert image.ready and image.path.read_bytes() == content and image.spec.source_type == "upload"
    assert on_disk(image.path) < 2 * MIB


def test_an_upload_is_checked(store: Store) -> None:
    with pytest.raises(EbiError, match="the checksum of backing image up is"):
        upload(store, bytes(4096), "0" * 128)
    assert store.images.get("up").status.state == "failed"
    with pytest.raises(EbiError, match="has 513 bytes"):
        upload(store, bytes(513))
    raw = make_raw(store.work / "raw", MIB, [(0, MIB)])
    assert upload(store, raw.read_bytes(), sha512(raw)).status.checksum == sha512(raw)
    assert upload(store, b"is not read", sha512(raw)).ready


def test_an_upload_replaces_nothing(store: Store) -> None:
    upload(store, bytes(4096))
    for checksum in ("", "0" * 128):
        with pytest.raises(EbiError) as caught:
            upload(store, bytes(8192), checksum)
        assert caught.value.kind is Kind.EXISTS
    assert store.images.get("up").virtual_size == 4096


def test_applying_the_manifest_of_an_upload_asks_for_the_content(store: Store) -> None:
    with pytest.raises(EbiError, match="backing image up has no content yet") as caught:
        store.apply(manifest("up", "upload"))
    assert caught.value.kind is Kind.PRECONDITION
    upload(store, bytes(4096))
    assert store.apply(manifest("up", "upload")).ready


def test_an_encrypted_file_comes_back_as_an_encrypted_image(golden: Store) -> None:
    file = out(golden, "e")
    with file.open("rb") as stream:
        image = golden.images.upload(manifest("again", "upload"), Download(None, iter(lambda: stream.read(MIB), b"")))
    assert image.encrypted and image.extents() == golden.images.get("e").extents()
    assert same(golden, golden.apply(clone("d", "again", "decrypt")).path)


def test_as_it_is(golden: Store) -> None:
    file = out(golden, "golden")
    assert same(golden, file) and on_disk(file) < 2 * MIB


@pytest.mark.parametrize("form", [None, Format.RAW])
def test_decrypted(golden: Store, form: Format | None) -> None:
    file = out(golden, "e", form, decrypt=True)
    assert same(golden, file) and on_disk(file) < 2 * MIB


@pytest.mark.parametrize("name", ["golden", "e"])
def test_as_qcow2(golden: Store, name: str) -> None:
    file = out(golden, name, Format.QCOW2, decrypt=name == "e")
    assert file.stat().st_size < 3 * MIB
    with file.open("rb") as stream:
        disk = Qcow2(stream.fileno(), "it")
        assert (disk.size, sum(run.length for run in disk.extents()) < 2 * MIB) == (SIZE, True)
    subprocess.run(["qemu-img", "check", "-q", file], check=True)
    subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", file, golden.work / "raw"], check=True)


def test_a_qcow2_comes_out_as_it_went_in_or_raw(golden: Store) -> None:
    file = out(golden, "golden", Format.QCOW2)
    content = file.read_bytes()
    image = upload(golden, content)
    assert (image.status.format, image.virtual_size) == (Format.QCOW2, SIZE)
    for form, expected in ((Format.RAW, golden.work / "raw"), (None, image.path), (Format.QCOW2, image.path)):
        file.unlink()
        out(golden, "up", form)
        assert subprocess.run(["cmp", file, expected], check=False).returncode == 0


@pytest.fixture
def small(store: Store) -> Store:
    store.download(make_raw(store.work / "raw", 8 * MIB, [(0, 4 * KIB), (3 * MIB + 4 * KIB, 100 * KIB)]))
    store.apply(clone("e", "golden", "encrypt"))
    return store


@pytest.mark.parametrize("name", ["golden", "e"])
@pytest.mark.parametrize("form", [Format.RAW, Format.QCOW2])
def test_dense(small: Store, name: str, form: Format) -> None:
    file = out(small, name, form, dense=True, decrypt=name == "e")
    assert on_disk(file) >= 8 * MIB
    subprocess.run(["qemu-img", "compare", "-q", "-F", "raw", file, small.work / "raw"], check=True)


def test_a_dense_encrypted_file_reads_right_everywhere(small: Store) -> None:
    """As for any other tool, every sector is deciphered, and the holes have become encrypted zeros."""
    file = out(small, "e", dense=True)
    with file.open("rb") as stream:
        assert list(data_extents(stream.fileno())) == [Extent(0, 24 * MIB)]
    found = header.read(file)
    payload = bytearray(file.read_bytes()[found.payload_offset :])
    spec = CipherSpec(found.cipher, header.volume_key(file, PASSPHRASE, "it"), found.sector_size)
    spec.make().decrypt(payload, 0)
    assert payload == (small.work / "raw").read_bytes()


@pytest.mark.parametrize("encryption", ["decrypt", "reencrypt"])
def test_a_dense_clone_of_a_sparse_image_has_the_same_content(small: Store, encryption: str) -> None:
    more = {"source_secret": "key", "source_secret_namespace": NAMESPACE} if encryption == "reencrypt" else {}
    image = small.apply(clone("x", "e", encryption, sparse="false", **more))
    if encryption == "reencrypt":
        image = small.apply(clone("y", "x", "decrypt"))
    assert same(small, image.path)


@pytest.mark.parametrize(
    ("name", "form", "dense", "decrypt", "key", "message"),
    [
        ("e", Format.RAW, False, False, True, "is encrypted, so it is no raw file"),
        ("e", None, True, False, False, "its key is needed"),
        ("e", None, False, True, False, "decrypted with its secret only"),
        ("golden", None, False, True, True, "is not encrypted"),
        ("golden", Format.LUKS, False, False, False, "can't be exported as luks"),
        ("nobody", None, False, False, False, "not found"),
    ],
)
def test_what_is_refused_leaves_no_file(
    small: Store, name: str, form: Format | None, dense: bool, decrypt: bool, key: bool, message: str
) -> None:
    before = sorted(small.work.iterdir())
    with pytest.raises(EbiError, match=message):
        out(small, name, form, dense=dense, decrypt=decrypt, key=key)
    assert sorted(small.work.iterdir()) == before


def test_nothing_is_overwritten(small: Store) -> None:
    (small.work / "out").write_text("mine")
    with pytest.raises(EbiError, match="exists") as caught:
        out(small, "golden")
    assert caught.value.kind is Kind.EXISTS and (small.work / "out").read_text() == "mine"


@pytest.mark.parametrize("size", [512, 64 * KIB, 512 * MIB, 512 * MIB + 512, 9000 * MIB])
def test_a_qcow2_of_any_size_is_taken_by_qemu(tmp_path: Path, size: int) -> None:
    runs = [Extent(0, min(size, 4096)), Extent(size - 512, 512)] if size > 4096 else [Extent(0, size)]
    layout = qcow2_writer.layout(runs, size)
    with (tmp_path / "disk").open("w+b") as file:
        qcow2_writer.write_tables(file.fileno(), layout)
    subprocess.run(["qemu-img", "check", "-q", tmp_path / "disk"], check=True)
    with formats.opened(tmp_path / "disk", Format.QCOW2) as source:
        assert source.size == size
        assert [run.start for run in source.extents()] == [place[0] for place in layout.places]


def test_the_command_line(small: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--data-dir", str(small.work / "data"), "image"]
    (small.work / "data").chmod(0o700)
    assert main([*base, "upload", "copy", str(small.work / "raw"), "--checksum", sha512(small.work / "raw")]) == 0
    assert main([*base, "export", "copy", str(small.work / "o.qcow2"), "--format", "qcow2"]) == 0
    assert main([*base, "export", "e", str(small.work / "o.raw"), "--decrypt"]) == Kind.INVALID.value
    assert main([*base, "upload", "gone", str(small.work / "nothing")]) == Kind.INVALID.value
    said = capsys.readouterr()
    assert "backingimage/copy ready\n" in said.out and "o.qcow2 as qcow2" in said.out
    assert "give its Secret with -f" in said.err and "No such file" in said.err


def test_made_is_told(small: Store) -> None:
    file = small.work / "told"
    made = export.export(small.images, Settings(workers=1), "golden", file)
    assert (made.format, made.virtual_size, made.runs) == (Format.RAW, 8 * MIB, None)
    assert made.sums == extents.load_sums(small.images.get("golden").map_path)
