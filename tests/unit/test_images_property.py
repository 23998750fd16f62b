"""Whatever the disk and the cipher: what is encrypted, encrypted anew and decrypted comes back, and is as sparse.

EBI_EXAMPLES sets how many disks are tried (default 4; `EBI_EXAMPLES=500` for a night).
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugin.host.files import Extent
from plugin.images import extents
from plugin.images.disk import Disk
from plugin.images.patched import Patch, Patched
from plugin.images.secrets import DocumentSecrets
from plugin.images.store import Images
from plugin.luks import header
from plugin.settings import Settings
from tests.unit.conftest import KIB, MIB, NAMESPACE, Store, clone, secret
from tests.unit.test_images_cryptsetup import reencrypt

EXAMPLES = int(os.environ.get("EBI_EXAMPLES", "4"))
BLOCK = 64 * KIB
MOST = 5 * MIB
CIPHERS = [
    *[("aes-xts-plain64", size) for size in ("256", "512")],
    *[("aes-cbc-essiv:sha256", size) for size in ("128", "192", "256")],
    ("aes-cbc-plain64", "256"),
]
# Where mistakes live: at the edges of sectors, of blocks that are looked at for zeros, of pieces that a worker takes.
edges = st.builds(
    lambda unit, number, off: max(0, unit * number + off),
    st.sampled_from([512, 4096, BLOCK, 4 * MIB]),
    st.integers(0, 40),
    st.sampled_from([-512, -1, 0, 1, 511, 4095]),
)
places = st.one_of(edges, st.integers(0, MOST))
lengths = st.one_of(st.sampled_from([1, 511, 512, 513, 4096, BLOCK, 3 * BLOCK]), st.integers(1, MIB))


@st.composite
def disks(draw: st.DrawFn) -> bytes:
    """A disk: zeros but for some runs; some have a partition table, so that their sectors are of 512 bytes."""
    size = -(-draw(st.one_of(edges, st.integers(1, MOST)).filter(lambda size: 0 < size <= MOST)) // 512) * 512
    disk = bytearray(size)
    for start, length in draw(st.lists(st.tuples(places, lengths), max_size=6)):
        end = max(start, min(start + length, size))
        disk[start:end] = os.urandom(end - start)
    if draw(st.booleans()):
        disk[510:512] = b"\x55\xaa"
    return bytes(disk)


def data_blocks(disk: bytes) -> Iterator[Extent]:
    """The blocks of 64 KiB that are not all zeros."""
    for start in range(0, len(disk), BLOCK):
        if any(disk[start : start + BLOCK]):
            yield Extent(start, min(BLOCK, len(disk) - start))


def store_of(work: Path, disk: bytes, old: tuple[str, str], new: tuple[str, str]) -> Store:
    keys = [secret(name, KEY_CIPHER=cipher, KEY_SIZE=size) for name, (cipher, size) in (("key", old), ("other", new))]
    store = Store(work, Images(work / "images", Settings(workers=1)), DocumentSecrets(keys))
    (work / "raw").write_bytes(disk)
    store.download(work / "raw")
    return store


@settings(max_examples=EXAMPLES, deadline=None, database=None)
@given(disk=disks(), old=st.sampled_from(CIPHERS), new=st.sampled_from(CIPHERS))
def test_any_disk_comes_back_and_stays_sparse(
    tmp_path_factory: pytest.TempPathFactory, disk: bytes, old: tuple[str, str], new: tuple[str, str]
) -> None:
    work = tmp_path_factory.mktemp("any")
    store = store_of(work, disk, old, new)
    again = {"source_secret": "key", "source_secret_namespace": NAMESPACE, "secret": "other"}
    made = [store.apply(clone("e", "golden", "encrypt")), store.apply(clone("r", "e", "reencrypt", **again))]
    expected = list(extents.merged(data_blocks(disk)))
    for image in made:
        assert image.extents() == expected
        assert image.path.stat().st_blocks * 512 <= 17 * MIB + extents.total(expected)
        image.map_path.unlink()
        assert extents.total(image.extents()) <= extents.total(expected)
    for name, key in (("e", "key"), ("r", "other")):
        assert store.apply(clone(f"{name}-back", name, "decrypt", secret=key)).path.read_bytes() == disk
    shutil.rmtree(work)


@settings(max_examples=max(2, EXAMPLES // 10), deadline=None, database=None)
@given(disk=disks(), cipher=st.sampled_from(CIPHERS))
def test_cryptsetup_agrees(tmp_path_factory: pytest.TempPathFactory, disk: bytes, cipher: tuple[str, str]) -> None:
    work = tmp_path_factory.mktemp("any")
    image = store_of(work, disk, cipher, cipher).apply(clone("e", "golden", "encrypt", sparse="false"))
    theirs = work / "theirs"
    shutil.copy(image.path, theirs)
    assert header.read(theirs).cipher == cipher[0]
    reencrypt(theirs, "--decrypt", "--header", work / "h")
    assert theirs.read_bytes()[: len(disk)] == disk
    shutil.rmtree(work)


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    pieces=st.lists(st.tuples(st.integers(0, 15), st.integers(0, 31)), max_size=8, unique_by=lambda piece: piece[0]),
    reads=st.lists(st.tuples(st.integers(0, 63), st.integers(1, 64)), min_size=1, max_size=5),
)
def test_a_patched_disk_reads_as_its_parts(
    tmp_path: Path, sizes: tuple[int, int], pieces: list[tuple[int, int]], reads: list[tuple[int, int]]
) -> None:
    size, below = max(sizes) * 512, min(sizes) * 512
    chunk = 2048
    files = {name: os.urandom(length) for name, length in (("lower", below), ("upper", 32 * chunk))}
    model = bytearray(files["lower"].ljust(size, b"\0"))
    patches = []
    for at, place in sorted(pieces):
        if at * chunk < size:
            patches.append(Patch(at * chunk, min(chunk, size - at * chunk), place * chunk))
            model[at * chunk : (at + 1) * chunk] = files["upper"][place * chunk :][: patches[-1].length]
    fds = []
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        fds.append(os.open(tmp_path / name, os.O_RDONLY))
    try:
        lower, upper = Disk(fds[0], below), Disk(fds[1], 32 * chunk)
        disk = Patched(size, lower, list(lower.extents()), upper, patches)
        for start, length in reads:
            buffer = bytearray(b"?" * max(0, min(length * 512, size - start * 512)))
            disk.read(memoryview(buffer), start * 512)
            assert buffer == model[start * 512 :][: len(buffer)]
        outside = bytearray(model)
        for run in disk.extents():
            outside[run.start : run.end] = bytes(run.length)
        assert not any(outside)
    finally:
        for fd in fds:
            os.close(fd)
