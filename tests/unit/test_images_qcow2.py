"""qcow2 is read as qemu-img reads it, and what it must not read is refused."""

import errno
import os
import random
import subprocess
from pathlib import Path

import pytest

from plugin.errors import EbiError, Kind
from plugin.images import extents, integrity
from plugin.images.formats import Format, opened
from tests.unit.conftest import KIB, MIB, Store, clone, make_raw, sha512

DISK = 6 * MIB + 512
RUNS = [(0, 70 * KIB), (MIB + 512, 3 * KIB), (2 * MIB, MIB), (5 * MIB, 200), (6 * MIB, 512)]
OPTIONS = [
    "compat=0.10",
    "compat=1.1",
    "cluster_size=512",
    "cluster_size=4096",
    "cluster_size=2M",
    "extended_l2=on,cluster_size=128k",
    "extended_l2=on,cluster_size=16k",
    "preallocation=metadata",
    "preallocation=full",
    "lazy_refcounts=on",
]


def qemu(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *arguments], check=True, capture_output=True)


def convert(raw: Path, path: Path, *options: str) -> Path:
    qemu("convert", "-f", "raw", "-O", "qcow2", *options, raw, path)
    return path


def content(path: Path) -> bytes:
    """The whole disk, read in odd pieces; and what is outside of the extents must be zeros."""
    with opened(path, Format.QCOW2) as source:
        data = bytearray(source.size)
        at, dice = 0, random.Random(7)
        while at < source.size:
            piece = memoryview(data)[at : at + dice.randrange(1, 300 * KIB)]
            source.read(piece, at)
            at += len(piece)
        rest = bytearray(data)
        for run in source.extents():
            rest[run.start : run.end] = bytes(run.length)
        assert not any(rest)
    return bytes(data)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return make_raw(tmp_path / "raw", DISK, RUNS)


@pytest.fixture
def qcow2(tmp_path: Path, raw: Path) -> Path:
    return convert(raw, tmp_path / "qcow2")


@pytest.mark.parametrize("options", OPTIONS)
def test_reads_what_qemu_wrote(tmp_path: Path, raw: Path, options: str) -> None:
    assert content(convert(raw, tmp_path / "qcow2", "-o", options)) == raw.read_bytes()


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", ["4k", "64k", "2M"])
def test_reads_compressed_clusters(tmp_path: Path, kind: str, cluster: str) -> None:
    raw = tmp_path / "raw"
    text = random.Random(1).choices(b"abcdefgh", k=3 * MIB)  # compresses, other than random bytes
    raw.write_bytes(bytes(text) + bytes(MIB) + os.urandom(512))
    path = convert(raw, tmp_path / "qcow2", "-c", "-o", f"compression_type={kind},cluster_size={cluster}")
    assert content(path) == raw.read_bytes()


@pytest.mark.parametrize("extended", ["off", "on"])
def test_reads_clusters_that_were_zeroed_and_discarded(tmp_path: Path, raw: Path, extended: str) -> None:
    path = convert(raw, tmp_path / "qcow2", "-o", f"extended_l2={extended},cluster_size=128k")
    commands = ["write -z 2M 300k", "write -z 70k 4k", "discard 2944k 64k", "write -P 7 1M 4k"]
    arguments = [part for command in commands for part in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *arguments, path], check=True, capture_output=True)
    qemu("convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "after")
    assert content(path) == (tmp_path / "after").read_bytes()


def test_a_snapshot_inside_does_not_matter(tmp_path: Path, raw: Path, qcow2: Path) -> None:
    qemu("snapshot", "-c", "before", qcow2)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 9 2M 100k", qcow2], check=True, capture_output=True)
    qemu("convert", "-f", "qcow2", "-O", "raw", qcow2, tmp_path / "after")
    assert content(qcow2) == (tmp_path / "after").read_bytes() != raw.read_bytes()


def test_a_qcow2_image_is_kept_as_it_is_and_encrypts_to_the_disk_in_it(store: Store, raw: Path, qcow2: Path) -> None:
    kept = store.download(qcow2, checksum=sha512(qcow2))
    assert kept.path.read_bytes() == qcow2.read_bytes()
    assert (kept.status.format, kept.virtual_size) == (Format.QCOW2, DISK)
    assert kept.to_object()["status"]["size"] == qcow2.stat().st_size
    assert store.apply(clone("again", "golden")).path.read_bytes() == qcow2.read_bytes()
    store.apply(clone("e", "golden", "encrypt"))
    assert sha512(store.apply(clone("d", "e", "decrypt")).path) == sha512(raw)


def test_the_disk_is_unpacked_once_for_a_plain_volume(store: Store, raw: Path, qcow2: Path) -> None:
    kept = store.download(qcow2)
    path = store.images.raw("golden")
    assert path == kept.disk != kept.path and path.read_bytes() == raw.read_bytes()
    before = path.stat().st_ino
    assert store.images.raw("golden").stat().st_ino == before
    assert [entry.name for entry in path.parent.iterdir()] == ["disk"]
    store.images.delete("golden")
    assert not kept.directory.exists()


def patched(path: Path, offset: int, value: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value)
    return path


def test_files_that_name_other_files_are_refused(tmp_path: Path, raw: Path, store: Store) -> None:
    over = tmp_path / "over"
    qemu("create", "-f", "qcow2", "-b", raw, "-F", "raw", over)
    external = tmp_path / "external"
    qemu("create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'elsewhere'}", external, "1M")
    for path, words in ((over, "has a backing file"), (external, "keeps its data in another file")):
        with pytest.raises(EbiError, match=words) as caught:
            store.download(path)
        assert caught.value.kind is Kind.UNSUPPORTED


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (4, b"\0\0\0\x04", "no qcow2 file of version 2 or 3"),
        (20, b"\0\0\0\x1f", "clusters of 2"),
        (24, b"\0\0\0\0\0\0\0\1", "no whole sectors"),
        (24, b"\x7f" + b"\0" * 7, "first-level table"),
        (32, b"\0\0\0\1", "encrypted by qcow2"),
        (36, b"\0\0\0\0", "first-level table"),
        (40, b"\0\1\0\0\0\0\0\0", "a table at"),
        (72, b"\0\0\0\0\0\0\0\2", "marked as corrupt"),
        (72, b"\0\0\0\0\0\0\1\0", "features that are not known"),
    ],
)
def test_headers_that_make_no_sense_are_refused(qcow2: Path, offset: int, value: bytes, words: str) -> None:
    with pytest.raises(EbiError, match=words), opened(patched(qcow2, offset, value), Format.QCOW2):
        pass


def test_a_truncated_file_is_refused_on_arrival(store: Store, qcow2: Path) -> None:
    os.truncate(qcow2, qcow2.stat().st_size - 200 * KIB)
    with pytest.raises(EbiError, match="behind its end"):
        store.download(qcow2)
    assert store.images.get("golden").status.state == "failed"


@pytest.mark.parametrize("options", ["cluster_size=4096", "extended_l2=on,cluster_size=16k", "compression_type=zstd"])
def test_damage_anywhere_is_an_error_or_harmless_but_never_worse(tmp_path: Path, raw: Path, options: str) -> None:
    whole = convert(raw, tmp_path / "whole", "-c", "-o", options)
    data, dice = whole.read_bytes(), random.Random(options)
    broken = tmp_path / "broken"
    errors = 0
    for _ in range(150):
        copy = bytearray(data)
        for _ in range(dice.randrange(1, 6)):
            # Most of the damage to the header and the tables, which lie in front.
            at = dice.randrange(len(copy)) if dice.random() < 0.2 else dice.randrange(min(len(copy), 64 * KIB))
            copy[at] = dice.randrange(256)
        broken.write_bytes(copy[: dice.randrange(1, len(copy))] if dice.random() < 0.2 else copy)
        try:
            with opened(broken, Format.QCOW2) as source:
                for run in source.extents():
                    assert run.end <= source.size
                    source.read(memoryview(bytearray(min(run.length, 64 * KIB))), run.start)
        except EbiError as error:
            assert error.kind in (Kind.INVALID, Kind.UNSUPPORTED)
            errors += 1
    assert errors > 10


@pytest.mark.parametrize("options", [(), ("-c",)])
def test_where_the_disk_can_t_be_read_that_is_the_error_and_not_a_damaged_file(
    raw: Path, tmp_path: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = convert(raw, tmp_path / "qcow2", *options)
    bad, preadv = path.stat().st_size // 2 // KIB * KIB | KIB, os.preadv

    def read(fd: int, buffers: list[memoryview], offset: int) -> int:
        """As the kernel does with a sector that fails: a read ends in front of it."""
        if offset <= bad < offset + len(buffers[0]):
            if bad == offset:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            buffers = [buffers[0][: bad - offset]]
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    with pytest.raises(OSError, match="Input/output error"):
        content(path)


def test_what_is_read_in_small_parts_is_the_same(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, preadv = convert(raw, tmp_path / "qcow2"), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:4096]], offset))
    assert content(path) == raw.read_bytes()
    with raw.open("rb") as file:
        assert integrity._sha512(file.fileno(), lambda _: None) == sha512(raw)
        found = extents.rebuilt(file.fileno(), 0, DISK)
    assert all(any(run.start <= start < start + length <= run.end for run in found) for start, length in RUNS)
