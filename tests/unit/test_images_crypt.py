"""Encrypting and decrypting give the same bytes and the same holes back."""

import os
import subprocess
from pathlib import Path

import pytest

from plugin.errors import EbiError, Kind
from plugin.host.files import Extent, data_extents
from plugin.images import extents
from plugin.images.secrets import DocumentSecrets
from plugin.luks import header
from plugin.luks.payload import Cipher
from tests.unit.conftest import KIB, MIB, PASSPHRASE, Store, clone, make_raw, secret, sha512

SIZES = [512, 4096, 64 * KIB, MIB + 512, 5 * MIB + 4096, 9 * MIB - 512]


def on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("size", SIZES)
def test_decrypting_gives_the_original_back(store: Store, size: int) -> None:
    raw = make_raw(store.work / "raw", size, [(0, min(size, 3000)), (max(0, size - 5000), min(size, 5000))])
    store.download(raw)
    encrypted, back = (store.apply(clone("e", "golden", "encrypt")), store.apply(clone("d", "e", "decrypt")))
    assert encrypted.encrypted and not back.encrypted
    assert (encrypted.virtual_size, back.virtual_size) == (size, size)
    assert encrypted.path.stat().st_size == size + 16 * MIB
    assert back.path.read_bytes() == raw.read_bytes()


def test_the_file_is_luks2_as_cryptsetup_knows_it(store: Store) -> None:
    raw = make_raw(store.work / "raw", 2 * MIB, [(0, 2 * MIB)])
    store.download(raw)
    path = store.apply(clone("e", "golden", "encrypt")).path
    subprocess.run(["cryptsetup", "isLuks", "--type", "luks2", path], check=True)
    found = header.read(path)
    payload = bytearray(path.read_bytes()[found.payload_offset :])
    key = header.volume_key(path, PASSPHRASE, "it")
    Cipher(found.cipher, key, found.sector_size).decrypt(payload, 0)
    assert payload == raw.read_bytes()


def test_holes_stay_holes_and_short_ones_are_filled(store: Store) -> None:
    runs = [(MIB, 128 * KIB), (MIB + 160 * KIB, 4 * KIB), (40 * MIB, MIB), (63 * MIB, MIB)]
    store.download(make_raw(store.work / "raw", 64 * MIB, runs))
    encrypted = store.apply(clone("e", "golden", "encrypt"))
    # A download finds zeros by blocks of 64 KiB, so the short hole is filled and the block it ends in is whole.
    expected = [Extent(MIB, 192 * KIB), Extent(40 * MIB, MIB), Extent(63 * MIB, MIB)]
    assert encrypted.extents() == expected
    assert on_disk(encrypted.path) <= 16 * MIB + extents.total(expected) + 256 * KIB
    back = store.apply(clone("d", "e", "decrypt"))
    assert sha512(back.path) == sha512(store.work / "raw")
    with back.path.open("rb") as file:
        assert list(data_extents(file.fileno())) == expected


def test_zeros_that_the_source_wrote_become_holes_too(store: Store) -> None:
    raw = store.work / "raw"
    raw.write_bytes(os.urandom(64 * KIB) + bytes(MIB) + os.urandom(64 * KIB))
    store.download(raw)
    store.images.get("golden").path.write_bytes(raw.read_bytes())  # the download has made holes of them already
    assert store.apply(clone("e", "golden", "encrypt")).extents() == [
        Extent(0, 64 * KIB),
        Extent(MIB + 64 * KIB, 64 * KIB),
    ]


def test_a_dense_image_has_no_holes(store: Store) -> None:
    store.download(make_raw(store.work / "raw", 8 * MIB, [(MIB, MIB)]))
    dense = store.apply(clone("e", "golden", "encrypt", sparse="false"))
    assert dense.extents() == [Extent(0, 8 * MIB)]
    assert on_disk(dense.path) >= 24 * MIB
    assert sha512(store.apply(clone("d", "e", "decrypt")).path) == sha512(store.work / "raw")
    assert on_disk(store.apply(clone("full", "e", "decrypt", sparse="false")).path) >= 8 * MIB


def test_the_map_is_found_again_from_the_file_alone(store: Store) -> None:
    store.download(make_raw(store.work / "raw", 16 * MIB, [(0, 4 * KIB), (3 * MIB, 200 * KIB), (15 * MIB, MIB)]))
    encrypted = store.apply(clone("e", "golden", "encrypt"))
    before = encrypted.extents()
    for damage in (lambda path: path.unlink(), lambda path: path.write_text("{"), lambda path: path.write_text("[]")):
        damage(encrypted.map_path)
        assert encrypted.extents() == before


def test_a_file_without_holes_still_tells_them(store: Store) -> None:
    store.download(make_raw(store.work / "raw", 4 * MIB, [(MIB, MIB)]))
    encrypted = store.apply(clone("e", "golden", "encrypt"))
    before = encrypted.extents()
    encrypted.path.write_bytes(encrypted.path.read_bytes())
    encrypted.map_path.unlink()
    assert encrypted.extents() == before


def test_a_wrong_passphrase_decrypts_nothing(store: Store) -> None:
    store.download(make_raw(store.work / "raw", MIB, [(0, MIB)]))
    store.apply(clone("e", "golden", "encrypt"))
    with pytest.raises(EbiError, match="the passphrase does not open backing image e") as caught:
        store.images.apply(clone("d", "e", "decrypt"), DocumentSecrets([secret(passphrase=b"wrong")]))
    assert caught.value.kind is Kind.INVALID
    failed = store.images.get("d")
    assert failed.status.state == "failed" and "does not open" in failed.status.message
    assert [entry.name for entry in failed.directory.iterdir()] == ["record.json"]


def test_no_file_and_no_repr_holds_a_secret(store: Store) -> None:
    store.download(make_raw(store.work / "raw", MIB, [(0, MIB)]))
    encrypted = store.apply(clone("e", "golden", "encrypt"))
    store.apply(clone("d", "e", "decrypt"))
    key = header.volume_key(encrypted.path, PASSPHRASE, "it")
    for path in (store.work / "data").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert PASSPHRASE.strip() not in content and key not in content and key.hex().encode() not in content
    assert PASSPHRASE.decode().strip() not in repr(store.secrets) + repr(encrypted) + str(encrypted.to_object())
