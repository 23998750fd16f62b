"""Images that come as gzip, xz or zstd files: unpacked as they stream, and nothing in them believed."""

import gzip
import hashlib
import lzma
import os
import random
import subprocess
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from plugin.errors import EbiError, Kind
from plugin.images import integrity
from plugin.images.formats import Format
from plugin.images.http import Download
from plugin.images.image import BackingImage
from plugin.images.packed import Content, Packing
from plugin.settings import Settings
from tests.unit.conftest import KIB, MIB, Store, clone, make_raw, manifest, sha512
from tests.unit.loopback import Answer, serving

SIZE = 5 * MIB + 512
KINDS = ["gzip", "xz", "zstd"]


def pack(data: bytes, kind: str) -> bytes:
    if kind == "gzip":
        return gzip.compress(data, 1)
    if kind == "xz":
        return lzma.compress(data, preset=0)
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def content(*pieces: bytes) -> bytes:
    return b"".join(Content(iter(pieces), "it"))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return make_raw(tmp_path / "raw", SIZE, [(0, 70 * KIB), (2 * MIB, 300 * KIB), (SIZE - 512, 512)])


def packed(path: Path, kind: str) -> Path:
    file = path.with_name(f"{path.name}.of-{kind}")  # names tell nothing
    file.write_bytes(pack(path.read_bytes(), kind))
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_a_raw_image_comes_out_sparse_and_its_record_is_honest(store: Store, raw: Path, kind: str) -> None:
    file = packed(raw, kind)
    image = store.download(file, checksum=sha512(file))
    assert image.path.read_bytes() == raw.read_bytes()
    assert image.path.stat().st_blocks * 512 < MIB
    assert (image.status.format, image.virtual_size, image.status.packing) == (Format.RAW, SIZE, kind)
    # The manifest tells of the file as it came; the status never of another file than the image's own.
    assert (image.spec.checksum, image.status.checksum) == (sha512(file), "")
    assert integrity.verify(store.images, Settings(), "golden") == image
    integrity._fill(store.images, image, threading.Event())
    assert store.images.get("golden").status.checksum == sha512(raw)
    assert integrity.verify(store.images, Settings(), "golden").ready
    assert store.download(file, checksum=sha512(file)).uuid == image.uuid  # the same again changes nothing
    copy = store.apply(clone("copy", "golden"))
    assert (copy.spec.checksum, copy.status.checksum, copy.status.packing) == ("", sha512(raw), "")
    assert store.images.get("golden").to_object()["status"]["packing"] == kind


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_later(store: Store, raw: Path, kind: str) -> None:
    image = store.download(packed(raw, kind))
    with image.path.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(b"damage")
    with pytest.raises(EbiError, match="golden is damaged"):
        integrity.verify(store.images, Settings(), "golden")


def test_a_checksum_is_that_of_the_packed_file(store: Store, raw: Path) -> None:
    with pytest.raises(EbiError, match="the checksum of backing image golden is"):
        store.download(packed(raw, "xz"), checksum=sha512(raw))


@pytest.mark.parametrize("kind", KINDS)
def test_a_qcow2_may_be_inside(store: Store, tmp_path: Path, raw: Path, kind: str) -> None:
    qcow2 = tmp_path / "qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, qcow2], check=True, capture_output=True)
    image = store.download(packed(qcow2, kind))
    assert (image.status.format, image.virtual_size) == (Format.QCOW2, SIZE)
    assert image.path.read_bytes() == qcow2.read_bytes()
    assert store.apply(clone("copy", "golden")).path.read_bytes() == qcow2.read_bytes()


def test_a_luks_device_may_be_inside(store: Store, raw: Path) -> None:
    store.download(raw)
    luks = store.apply(clone("e", "golden", "encrypt"))
    store.images.upload(manifest("up", "upload"), Download(None, iter([pack(luks.path.read_bytes(), "zstd")])))
    assert store.images.get("up").encrypted and store.images.get("up").extents() == luks.extents()
    assert store.apply(clone("d", "up", "decrypt")).path.read_bytes() == raw.read_bytes()
    assert integrity.verify(store.images, Settings(), "up").ready


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 7, 4096])
def test_any_cut_into_pieces_will_do(kind: str, step: int) -> None:
    data = os.urandom(3000) + bytes(200 * KIB)
    file = pack(data, kind) + pack(b"", kind) + pack(data[:5], kind)
    assert content(*(file[at : at + step] for at in range(0, len(file), step))) == data + data[:5]


def test_padding_and_frames_to_be_skipped_hold_nothing() -> None:
    skipped = b"\x5a\x2a\x4d\x18" + (200 * KIB).to_bytes(4, "little") + bytes(200 * KIB)
    assert content(skipped, pack(b"a", "zstd"), skipped, pack(b"b", "zstd")) == b"ab"
    for kind in ("gzip", "xz"):
        assert content(pack(b"a", kind) + bytes(100 * KIB) + pack(b"b", kind) + bytes(8)) == b"ab"


@pytest.mark.parametrize("text", [b"", b"\x1f", b"\x28\xb5\x2f", b"\xfd7zXZ", b"anything else"])
def test_anything_else_stays_as_it_is(text: bytes) -> None:
    assert content(*(text[at : at + 1] for at in range(len(text)))) == text


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cut_short_is_an_error_wherever(kind: str) -> None:
    file = pack(os.urandom(300 * KIB) + bytes(300 * KIB), kind)
    dice = random.Random(kind)
    for end in [6, 7, 8, 20, *(dice.randrange(8, len(file)) for _ in range(30)), len(file) - 4, len(file) - 1]:
        with pytest.raises(EbiError, match=f"the {kind} file of it is damaged") as caught:
            content(file[:end])
        assert caught.value.kind is Kind.INVALID


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_an_error_and_so_is_anything_behind_the_end(kind: str) -> None:
    data = random.Random(1).randbytes(40 * KIB) + bytes(MIB)
    file, dice = pack(data, kind), random.Random(2)
    for _ in range(60):
        copy = bytearray(file)
        copy[dice.randrange(4, len(copy))] ^= 1 << dice.randrange(8)
        try:
            assert content(bytes(copy)) == data  # a bit of a name or a date says nothing of the content
        except EbiError as error:
            assert error.kind in (Kind.INVALID, Kind.UNSUPPORTED)
    with pytest.raises(EbiError, match="is damaged"):
        content(file + b"x")


def test_a_damaged_file_leaves_a_failed_image(store: Store, raw: Path) -> None:
    file = packed(raw, "zstd")
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(EbiError, match="the zstd file of backing image golden is damaged: it is cut short"):
        store.download(file)
    assert [entry.name for entry in store.images.get("golden").directory.iterdir()] == ["record.json"]


@pytest.mark.parametrize("outer", KINDS)
@pytest.mark.parametrize("inner", KINDS)
def test_packed_twice_is_refused_by_name(outer: str, inner: str) -> None:
    with pytest.raises(EbiError, match=f"it is packed twice: {inner} in {outer}") as caught:
        content(pack(pack(b"x" * 512, inner), outer))
    assert caught.value.kind is Kind.UNSUPPORTED


def bomb(kind: str) -> bytes:
    """256 MiB of zeros in very little."""
    if kind == "zstd":  # blocks that say "this byte 128 Ki times", in one frame without a content size
        block = ((128 * KIB) << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
        return b"\x28\xb5\x2f\xfd\x00\x58" + block * 2048 + b"\x01\0\0"
    one = pack(bytes(32 * MIB), kind)
    return one * 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_comes_out_a_piece_at_a_time(kind: str) -> None:
    file = bomb(kind)
    assert len(file) < 2 * MIB
    tracemalloc.start(1)
    try:
        size = sum(len(piece) for piece in Content(iter([file]), "it"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 256 * MIB and peak < 16 * MIB


def test_what_asks_for_too_much_memory_is_refused() -> None:
    wide = lzma.compress(b"x", filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 256 * MIB}])
    window = b"\x28\xb5\x2f\xfd\x00" + bytes([18 << 3]) + b"\x09\0\0x"  # 2^28 bytes
    for file in (wide, window):
        with pytest.raises(EbiError, match="needs more than 128 MiB of memory to unpack") as caught:
            content(file)
        assert caught.value.kind is Kind.UNSUPPORTED


def test_the_disk_that_it_takes_is_checked_as_it_grows(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packed").write_bytes(pack(b"x" * (8 * MIB), "zstd"))
    found = os.statvfs(tmp_path)
    blocks = 18 * MIB // found.f_frsize
    little = os.statvfs_result((found.f_bsize, found.f_frsize, found.f_blocks, blocks, blocks, *found[5:]))
    monkeypatch.setattr(os, "fstatvfs", lambda _: little)
    with pytest.raises(EbiError, match="golden needs 10 MiB of disk, and 18 MiB are free") as caught:
        store.download(tmp_path / "packed")
    assert caught.value.kind is Kind.EXHAUSTED
    (tmp_path / "packed").write_bytes(pack(bytes(200 * MIB), "zstd"))  # holes take none
    assert store.download(tmp_path / "packed").virtual_size == 200 * MIB


@pytest.mark.parametrize("kind", KINDS)
def test_a_download_that_goes_on_or_begins_again(store: Store, raw: Path, kind: str) -> None:
    with serving() as server:
        data = os.urandom(3 * MIB)
        server.content = pack(data, kind)

        def made(name: str, *answers: Answer) -> BackingImage:
            server.answers = list(answers)
            document = manifest(name, "download", sha512_of(server.content), url=server.url + "/x.img")
            return store.apply(document)

        assert made("on", Answer(cut=MIB + 5), Answer(cut=700_000)).path.read_bytes() == data
        assert made("again", Answer(cut=2 * MIB), Answer(ranges=False)).path.read_bytes() == data


def test_a_file_that_changes_may_be_packed_in_another_way() -> None:
    def pieces() -> Iterator[bytes]:
        yield pack(b"first" * 1000, "xz")[:-10]
        yield b""
        yield pack(b"second", "gzip")[:10]
        yield b""
        yield b"plain"

    found = Content(pieces(), "it")
    assert [*found] == [b"", b"", b"plain"] and found.packing is Packing.NONE


def sha512_of(data: bytes) -> str:
    return hashlib.sha512(data).hexdigest()
