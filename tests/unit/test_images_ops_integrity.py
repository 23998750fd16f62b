"""Damage is found, named and not served; checksums that nobody waits for come afterwards."""

import os
import threading
from pathlib import Path

import pytest

from plugin.errors import EbiError, Kind
from plugin.host.files import Extent
from plugin.images import engine, extents, headers, integrity, operations
from plugin.images.disk import Disk
from plugin.images.image import BackingImage
from plugin.images.sums import Sum
from plugin.settings import Settings
from tests.unit.conftest import KIB, MIB, Store, clone, make_raw, manifest, sha512


@pytest.fixture(scope="module")
def first(first_store: Store) -> Store:
    first_store.download(make_raw(first_store.work / "raw", 12 * MIB, [(0, 64 * KIB), (5 * MIB, 5 * MIB)]))
    first_store.apply(clone("e", "golden", "encrypt"))
    first_store.apply(clone("d", "e", "decrypt"))
    first_store.apply(clone("c", "e"))
    return first_store


@pytest.fixture
def golden(first: Store, tmp_path: Path) -> Store:
    return first.copied(tmp_path)


def verify(store: Store, name: str) -> BackingImage:
    return integrity.verify(store.images, Settings(workers=2), name)


def flip(path: Path, at: int) -> None:
    fd = os.open(path, os.O_RDWR)
    byte = os.pread(fd, 1, at)
    os.pwrite(fd, bytes([byte[0] ^ 1]), at)
    os.close(fd)


@pytest.mark.parametrize("name", ["golden", "e", "d", "c"])
def test_a_sound_image_is_sound(golden: Store, name: str) -> None:
    assert verify(golden, name) == golden.images.get(name)
    kept = extents.load_sums(golden.images.get(name).map_path)
    assert sum(item.length for item in kept) == 5 * MIB + 64 * KIB and max(item.length for item in kept) <= 4 * MIB


@pytest.mark.parametrize(("name", "at"), [("golden", 10 * MIB - 1), ("e", 16 * MIB), ("c", 26 * MIB - 1)])
def test_one_bit_is_found_and_the_image_not_served(golden: Store, name: str, at: int) -> None:
    flip(golden.images.get(name).path, at)
    with pytest.raises(EbiError, match=f"backing image {name} is damaged: .* bytes of its file from byte") as caught:
        verify(golden, name)
    assert caught.value.kind is Kind.PRECONDITION
    image = golden.images.get(name)
    assert image.status.state == "failed" and "is damaged" in image.status.message
    with pytest.raises(EbiError, match="failed, not ready"), golden.images.ready(name):
        pass
    with pytest.raises(EbiError, match="it is failed, not ready"):
        golden.apply(clone("x", name))


def test_a_plain_clone_finds_damage_in_its_source(golden: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "share", lambda *_: False)
    assert golden.apply(clone("x", "e")).path.read_bytes() == golden.images.get("e").path.read_bytes()
    assert verify(golden, "x").ready
    flip(golden.images.get("e").path, 22 * MIB)
    with pytest.raises(EbiError, match="backing image e is damaged"):
        golden.apply(clone("y", "e"))
    assert golden.images.get("y").status.state == "failed"


def test_a_dense_clone_stays_dense_and_equal(golden: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "share", lambda *_: False)
    golden.apply(clone("full", "e", "decrypt", sparse="false"))
    copy = golden.apply(clone("x", "full"))
    assert sha512(copy.path) == sha512(golden.work / "raw") and copy.path.stat().st_blocks * 512 >= 12 * MIB


def test_a_short_or_absent_file_is_damage_too(golden: Store) -> None:
    os.truncate(golden.images.get("e").path, 20 * MIB)
    golden.images.get("d").path.unlink()
    for name, message in (("e", "its file ends at byte"), ("d", "No such file")):
        with pytest.raises(EbiError, match=message):
            verify(golden, name)
        assert golden.images.get(name).status.state == "failed"


def find_both_headers_damaged(golden: Store) -> None:
    path = golden.images.get("e").path
    for at in range(0, 128 * KIB, 512):
        flip(path, at)
    with pytest.raises(EbiError, match="LUKS2 header"):
        verify(golden, "e")


def test_a_header_damaged_in_both_copies_is_named(golden: Store) -> None:
    find_both_headers_damaged(golden)


def test_a_sha512_that_was_asked_for_is_compared(golden: Store) -> None:
    digest = sha512(golden.work / "raw")
    image = golden.download(golden.work / "raw", "checked", digest)
    assert verify(golden, "checked").ready
    flip(image.path, 11 * MIB)  # in a hole: no piece covers it
    with pytest.raises(EbiError, match="has not the SHA-512"):
        verify(golden, "checked")


def test_without_checksums_that_is_said(golden: Store) -> None:
    golden.images.get("golden").map_path.unlink()
    with pytest.raises(EbiError, match="there are no checksums of backing image golden"):
        verify(golden, "golden")
    assert golden.images.get("golden").ready


def test_what_has_healed_is_ready_again(golden: Store) -> None:
    image = golden.images.get("golden")
    flip(image.path, 6 * MIB)
    with pytest.raises(EbiError):
        verify(golden, "golden")
    flip(image.path, 6 * MIB)
    assert verify(golden, "golden").ready
    assert golden.images.get("golden").ready


def test_a_header_is_restored_after_it_was_found_damaged(golden: Store) -> None:
    find_both_headers_damaged(golden)
    assert "ebi image verify e" in headers.restore(golden.images, "e").status.message
    assert verify(golden, "e").ready


def test_a_failed_image_with_users_is_not_made_again(golden: Store) -> None:
    image = golden.images.get("golden")
    golden.images.users = lambda _: ["vol"]
    flip(image.path, 6 * MIB)
    with pytest.raises(EbiError):
        verify(golden, "golden")
    again = manifest("golden", "download", url=(golden.work / "raw").as_uri())
    with pytest.raises(EbiError, match="cannot make backing image golden again since there are volumes using it: vol"):
        golden.apply(again)
    assert image.path.exists() and golden.images.get("golden").uuid == image.uuid


def test_pieces_that_lie_across_a_boundary_are_read_as_they_were_written(golden: Store) -> None:
    """Those of an exported qcow2 do: its tables come first."""
    pieces = [Extent(320 * KIB + at, 4 * MIB) for at in (0, 4 * MIB)] + [Extent(9 * MIB, 128 * KIB)]
    with golden.images.get("golden").path.open("rb") as file:
        found = engine.copy(Disk(file.fileno(), 12 * MIB), None, pieces, workers=2)
    assert [item.extent for item in found] == pieces


def test_a_failed_image_is_made_again(golden: Store) -> None:
    flip(golden.images.get("golden").path, 6 * MIB)
    with pytest.raises(EbiError):
        verify(golden, "golden")
    golden.apply(manifest("golden", "download", url=(golden.work / "raw").as_uri()))
    assert verify(golden, "golden").ready


def test_checksums_come_afterwards(golden: Store) -> None:
    stop = threading.Event()
    filler = threading.Thread(target=integrity.fill_checksums, args=(golden.images, stop, 0.05))
    filler.start()
    try:
        for _ in range(400):
            if all(image.status.checksum for image in golden.images.list()):
                break
            stop.wait(0.05)
    finally:
        stop.set()
        filler.join(30)
    assert not filler.is_alive()
    for image in golden.images.list():
        assert image.ready and image.status.checksum == sha512(image.path)


def test_a_checksum_is_kept_while_others_use_the_image(golden: Store) -> None:
    with golden.images.held("golden") as image:
        integrity._fill(golden.images, image, threading.Event())
    assert golden.images.get("golden").status.checksum == sha512(image.path)


def test_a_stop_ends_it_within_a_file(golden: Store) -> None:
    stop = threading.Event()
    stop.set()
    integrity.fill_checksums(golden.images, stop)
    integrity._fill(golden.images, golden.images.get("golden"), stop)
    assert golden.images.get("golden").status.checksum == ""


def test_runs_without_others() -> None:
    runs = [Extent(0, 10), Extent(20, 10), Extent(40, 5)]
    others = [Extent(0, 2), Extent(5, 20), Extent(44, 10)]
    assert list(extents.without(runs, others)) == [Extent(2, 3), Extent(25, 5), Extent(40, 4)]
    assert list(extents.without(runs, [])) == runs
    assert list(extents.without(runs, [Extent(0, 100)])) == []


def test_a_map_that_is_damaged_has_no_sums(tmp_path: Path) -> None:
    extents.save(tmp_path / "map", None, 10, [Sum(0, 4, 7), Sum(6, 2, 0xFFFFFFFF)])
    assert extents.load_sums(tmp_path / "map") == [Sum(0, 4, 7), Sum(6, 2, 0xFFFFFFFF)]
    assert extents.load(tmp_path / "map", 10) is None
    for text in ("{", "[]", '{"crc32": "1+x:2"}', '{"crc32": 5}'):
        (tmp_path / "map").write_text(text)
        assert extents.load_sums(tmp_path / "map") == []
