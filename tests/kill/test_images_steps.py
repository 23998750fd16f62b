"""An image operation killed before each of its steps: the source is as it was, the target absent, failed or complete.

What a step is: `tests/killing.py`. The images are small, so that each step can have its turn.
"""

import gzip
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plugin.errors import EbiError, Kind
from plugin.images import export, headers, http
from plugin.images.formats import Format
from plugin.images.image import BackingImage, State
from plugin.images.secrets import DocumentSecrets
from plugin.images.store import Images
from plugin.luks import header
from plugin.settings import Settings
from tests.demo import golden
from tests.killing import killed_at
from tests.unit.conftest import (
    MIB,
    NAMESPACE,
    PASSPHRASE,
    Store,
    clone,
    disk_hash,
    make_raw,
    manifest,
    opens,
    secret,
    sha512,
)
from tests.unit.test_volumes_export import CAPACITY, CHUNK, Node, exported

OTHER = b"another one"
OPERATIONS = [
    "download", "unpack", "upload", "clone", "encrypt", "encrypt qcow2", "decrypt", "reencrypt", "export from volume",
]  # fmt: skip
# By what comes out; the encrypted image is the source.
EXPORTS: dict[str, dict[str, Any]] = {
    "export": {}, "export dense": {"dense": True}, "export raw": {"decrypt": True},
    "export qcow2": {"decrypt": True, "form": Format.QCOW2},
}  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Sources of each kind; most of the disk is a hole."""
    work = tmp_path_factory.mktemp("first")
    store = Store(work, Images(work / "data" / "images", Settings(workers=1)))
    raw = make_raw(work / "raw", CAPACITY, [(0, MIB)])
    golden.make_qcow2(raw, work / "raw.qcow2")
    (work / "raw.gz").write_bytes(gzip.compress(raw.read_bytes(), 1))
    store.download(raw)
    store.download(work / "raw.qcow2", "qcow2")
    store.apply(clone("luks", "golden", "encrypt"))
    return store


@pytest.fixture
def it(first: Store, tmp_path: Path) -> Store:
    store = first.copied(tmp_path)
    store.secrets = DocumentSecrets([secret(), secret("other", OTHER)])
    return store


def exporting(it: Store) -> Callable[[], BackingImage]:
    """What makes the image x of a detached volume with the same content."""
    node = Node(it)
    node.make(it.images.get("luks"), encrypted=True, written={1: (it.work / "raw").read_bytes()[CHUNK : 2 * CHUNK]})
    return lambda: node.export(exported("x", secret="key", secret_namespace=NAMESPACE))


def operation(it: Store, name: str) -> Callable[[], BackingImage]:
    """What makes the image x."""
    raw, packed = it.work / "raw", it.work / "raw.gz"

    def upload() -> BackingImage:
        with raw.open("rb", buffering=0) as file:
            return it.images.upload(manifest("x", "upload", sha512(raw)), http.from_file(file))

    if name == "upload":
        return upload
    if name == "export from volume":
        return exporting(it)
    keys = {"secret": "other", "source_secret": "key", "source_secret_namespace": NAMESPACE}
    document = {
        "download": manifest("x", "download", sha512(raw), url=raw.as_uri()),
        "unpack": manifest("x", "download", sha512(packed), url=packed.as_uri()),
        "clone": clone("x", "golden"),
        "encrypt": clone("x", "golden", "encrypt"),
        "encrypt qcow2": clone("x", "qcow2", "encrypt"),
        "decrypt": clone("x", "luks", "decrypt"),
        "reencrypt": clone("x", "luks", "reencrypt", **keys),
    }[name]
    return lambda: it.apply(document)


def data(passphrase: bytes) -> dict[str, bytes]:
    """The data of a Secret."""
    return {key: value.encode() for key, value in secret(passphrase=passphrase)["stringData"].items()}


def found(it: Store) -> BackingImage | None:
    try:
        return it.images.get("x")
    except EbiError as error:
        assert error.kind is Kind.NOT_FOUND
        return None


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def content(it: Store) -> dict[str, str]:
    """The SHA-512 of every file of the sources."""
    images = (it.images.root / name for name in ("golden", "qcow2", "luks"))
    volumes = it.images.root.with_name("volumes").glob("*")
    return {str(path): sha512(path) for directory in (*images, *volumes) for path in directory.iterdir()}


def check_whole(it: Store, image: BackingImage, passphrase: bytes) -> None:
    """`image` is ready, and nothing beside it is too much."""
    assert image.ready
    kept = {"record.json", "extents.json", image.path.name} | ({"header.luks"} if image.encrypted else set())
    assert names(image.directory) == kept
    assert disk_hash(image.path, passphrase) == sha512(it.work / "raw")


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_at_any_step_an_image_is_failed_or_whole_and_made_again(it: Store, name: str) -> None:
    make, passphrase = operation(it, name), OTHER if name == "reencrypt" else PASSPHRASE
    before = content(it)
    for number in itertools.count():
        killed = killed_at(number, make)
        image = found(it)
        assert image is None or image.status.state in (State.FAILED, State.READY), number
        if number % 2:  # else no start comes between
            it.images.recover()
            assert names(it.images.root) - {"x"} == {"golden", "qcow2", "luks"}, number
            image = found(it)
            if image is not None and not image.ready:
                assert names(image.directory) == {"record.json"}, number
        if image is not None and image.ready:
            check_whole(it, image, passphrase)
        check_whole(it, make(), passphrase)
        it.images.delete("x")
        it.images.recover()
        assert names(it.images.root) == {"golden", "qcow2", "luks"}, number
        if not killed:
            break
    assert number > 15
    assert content(it) == before


@pytest.mark.parametrize("name", EXPORTS)
def test_killed_at_any_step_an_export_leaves_no_file_or_a_whole_one(it: Store, name: str) -> None:
    before, directory = content(it), it.work / "out"
    directory.mkdir()
    file = directory / "file"

    def run() -> None:
        export.export(it.images, Settings(workers=1), "luks", file, secret=data(PASSPHRASE), **EXPORTS[name])

    for number in itertools.count():
        killed = killed_at(number, run)
        if file.exists():
            with pytest.raises(EbiError, match="exists"):
                run()
        else:
            run()
        assert names(directory) == {"file"}, number
        assert disk_hash(file) == sha512(it.work / "raw"), number
        file.unlink()
        if not killed:
            break
    assert number > 4
    assert content(it) == before


def test_killed_at_any_step_of_its_deletion_an_image_goes_by_the_next_one(it: Store) -> None:
    for number in itertools.count():
        it.apply(clone("x", "luks"))
        killed = killed_at(number, lambda: it.images.delete("x"))
        it.images.recover()
        if found(it):
            it.images.delete("x")
        assert names(it.images.root) == {"golden", "qcow2", "luks"}, number
        if not killed:
            break
    assert number > 3


def test_killed_at_any_step_of_its_unpacking_a_qcow2_image_is_unpacked_by_the_next_call(it: Store) -> None:
    disk = it.images.get("qcow2").disk
    for number in itertools.count():
        killed = killed_at(number, lambda: it.images.raw("qcow2"))
        assert it.images.get("qcow2").ready
        if number % 2:
            it.images.recover()
            assert not disk.parent.exists() or names(disk.parent) <= {"disk"}, number
        assert sha512(it.images.raw("qcow2")) == sha512(it.work / "raw"), number
        it.images.recover()
        assert names(disk.parent) == {"disk"}, number
        disk.unlink()
        if not killed:
            break
    assert number > 8


def test_killed_at_any_step_of_a_rekey_the_old_or_the_new_secret_opens_the_image(it: Store) -> None:
    image, old, new = it.apply(clone("x", "luks")), PASSPHRASE, OTHER
    key = header.volume_key(image.path, old, "it")

    def rekey() -> None:
        headers.rekey(it.images, "x", data(old), data(new), (NAMESPACE, "key"))

    for number in itertools.count():
        killed = killed_at(number, rekey)
        assert opens(image.path, old) or opens(image.path, new), number
        if number % 2:
            it.images.recover()
        rekey()
        it.images.recover()
        check_whole(it, it.images.get("x"), new)
        assert header.volume_key(image.path, new, "it") == key and not opens(image.path, old), number
        assert not opens(image.header_path, old), number
        old, new = new, old
        if not killed:
            break
    assert number > 8
