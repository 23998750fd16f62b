"""What is done to make an image: download, upload, clone, encrypt, decrypt, unpack. Each writes one new file.

None needs root, a loop device or device-mapper, and none makes a temporary file beside its result.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from plugin.errors import invalid, precondition
from plugin.host.files import Extent, data_extents, reserve, share
from plugin.images import engine, extents, formats, http, qcow2_writer, space, sums
from plugin.images.disk import CipherSpec, Disk, Source
from plugin.images.formats import Format
from plugin.images.image import BackingImage
from plugin.images.packed import Packing
from plugin.images.progress import Reporter
from plugin.images.receive import receive
from plugin.images.sums import Sum
from plugin.images.target import PIECE, Places, TargetSpec, open_direct
from plugin.luks import header, payload
from plugin.luks.parameters import SecretParameters
from plugin.luks.sectors import HEAD, sector_size
from plugin.settings import Settings


@dataclass(frozen=True)
class Made:
    """What came of an operation: the file's format, the plain disk's size in bytes, and what is known besides.

    `checksum` is the SHA-512 of the file, empty if it was not asked for; `runs` is the extent map of an encrypted disk;
    `sums` are of the bytes of the file, without the header of an encrypted one, which may change; `packing` is that of
    the file that it came in.
    """

    format: Format
    virtual_size: int
    checksum: str = ""
    runs: list[Extent] | None = None
    sums: list[Sum] = field(default_factory=list)
    packing: Packing = Packing.NONE


@dataclass(frozen=True)
class Work:
    """Where an operation writes and to whom it tells how far it is; `team` is who copies, where they started before."""

    path: Path
    owner: str
    settings: Settings
    report: Reporter
    team: engine.Team | None = None


Operation = Callable[[Work], Made]


def download(url: str, checksum: str, owner: str, settings: Settings) -> Operation:
    """The file at `url`, kept as it is, or what is packed in it.

    `checksum` is the SHA-512 that it must have as it comes, empty if that is not known. Raises INVALID at once for a
    `url` that the `settings` don't allow.
    """
    http.check(url, owner, settings)

    def run(work: Work) -> Made:
        with http.download(url, work.settings) as found:
            return _kept(found, checksum, work)

    return run


def upload(found: http.Download, checksum: str) -> Operation:
    """The file that `found` hands out, kept as `download` keeps one."""
    return lambda work: _kept(found, checksum, work)


def clone(image: BackingImage) -> Operation:
    """The file of `image` once more, byte for byte: shared where the filesystem can, copied and checked otherwise."""

    def run(work: Work) -> Made:
        runs, kept = image.extents() if image.encrypted else None, extents.load_sums(image.map_path)
        with created(work.path) as fd, image.path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            work.report.expect(size)
            if not share(file.fileno(), fd):
                # The very pieces that there are checksums of, so that the copy tells whether they are still right.
                pieces = [item.extent for item in kept]
                rest = list(extents.without(data_extents(file.fileno()), pieces))
                todo = sorted(pieces + rest, key=lambda run: run.start)
                found = copy_disk(Disk(file.fileno(), size), fd, work, todo, size=size, sparse=False)
                check_sums(image, kept, found)
            os.fsync(fd)
        return Made(image.status.format, image.virtual_size, image.status.checksum, runs, kept)

    return run


def encrypt(
    image: BackingImage, parameters: SecretParameters, *, old: SecretParameters | None = None, sparse: bool
) -> Operation:
    """The disk of `image` as a LUKS2 device under `parameters`; `old` opens it where it is one already."""

    def run(work: Work) -> Made:
        with engine.Team() as team:  # their Python starts while the header is read, and a key derived
            key = header.volume_key(image.path, old.passphrase, image.described) if old else None
            with formats.opened(image.path, image.status.format, key) as source:
                runs = image.extents() if old and sparse else data_runs(source, sparse=sparse)
                return encrypted(source, runs, parameters, replace(work, team=team), sparse=sparse)

    return run


def encrypted(source: Source, runs: list[Extent], parameters: SecretParameters, work: Work, *, sparse: bool) -> Made:
    """Write `runs` of `source` as a LUKS2 device under `parameters`, with a volume key of its own."""
    with created(work.path) as fd:
        cipher = CipherSpec(parameters.cipher, header.new_key(parameters), _sector_size(source))
        os.ftruncate(fd, header.PAYLOAD_OFFSET + source.size)
        # The key derivation needs a core, the payload mostly the disk, and neither needs the other.
        with _beside(
            lambda: header.create(work.path, parameters, cipher.key, sector_size=cipher.sector_size, owner=work.owner)
        ):
            work.report.expect(extents.total(runs))
            written = copy_disk(
                source, fd, work, runs,
                size=source.size, base=header.PAYLOAD_OFFSET, cipher=cipher, sparse=sparse,
            )  # fmt: skip
        os.fsync(fd)
    return _encrypted(source, written, header.PAYLOAD_OFFSET)


def decrypt(image: BackingImage, passphrase: bytes, *, sparse: bool) -> Operation:
    """The plain disk of `image`, a LUKS2 device, with its holes as holes."""

    def run(work: Work) -> Made:
        with engine.Team() as team:  # their Python starts while the key is derived
            key = header.volume_key(image.path, passphrase, image.described)
            with formats.opened(image.path, image.status.format, key) as source:
                runs = image.extents() if sparse else whole(source)
                return unpacked(source, runs, replace(work, team=team), sparse=sparse)

    return run


def unpack(image: BackingImage) -> Operation:
    """The disk of `image`, a qcow2 file, as a raw file."""

    def run(work: Work) -> Made:
        with formats.opened(image.path, image.status.format) as source:
            return unpacked(source, data_runs(source, sparse=True), work, sparse=True)

    return run


def unpacked(source: Source, runs: list[Extent], work: Work, *, sparse: bool) -> Made:
    """Write `runs` of `source` as a raw file."""
    with created(work.path) as fd:
        os.ftruncate(fd, source.size)
        work.report.expect(extents.total(runs))
        written = copy_disk(source, fd, work, runs, size=source.size, sparse=sparse)
        os.fsync(fd)
    return Made(Format.RAW, source.size, sums=written)


def as_qcow2(source: Source, runs: list[Extent], work: Work, *, sparse: bool) -> Made:
    """Write `runs` of `source` as a qcow2 file."""
    layout = qcow2_writer.layout(runs, source.size)
    with created(work.path) as fd:
        qcow2_writer.write_tables(fd, layout)
        work.report.expect(extents.total(runs))
        size, places = layout.end * qcow2_writer.CLUSTER, layout.places
        written = copy_disk(source, fd, work, runs, size=size, sparse=sparse, places=places)
        os.fsync(fd)
        tables = list(_sums(fd, Extent(0, layout.first_data * qcow2_writer.CLUSTER)))
    target = TargetSpec(-1, -1, 0, None, sparse, places)
    return Made(
        Format.QCOW2, source.size, sums=tables + [replace(item, start=target.at(item.start)) for item in written]
    )


def _sums(fd: int, run: Extent) -> Iterator[Sum]:
    for at in range(run.start, run.end, PIECE):
        yield Sum.of(memoryview(os.pread(fd, min(PIECE, run.end - at), at)), at)


def check_sums(image: BackingImage, kept: list[Sum], found: list[Sum]) -> None:
    """Raises PRECONDITION where what was `found` in the file of `image` is not what was `kept` of it."""
    if bad := sums.damaged(kept, found):
        raise precondition(
            f"{image.described} is damaged: {extents.total(bad)} bytes of its file from byte {bad[0].start} on are not"
            " what was written",
            "delete it and make it again; does the kernel's log tell of the disk?",
        )


def _encrypted(source: Source, written: list[Sum], base: int) -> Made:
    runs = list(extents.merged(item.extent for item in written))
    return Made(Format.LUKS, source.size, runs=runs, sums=[replace(item, start=base + item.start) for item in written])


def copy_disk(
    source: Source, fd: int, work: Work, runs: list[Extent],
    *, size: int, base: int = 0, cipher: CipherSpec | None = None, sparse: bool = True, places: Places = (),
) -> list[Sum]:  # fmt: skip
    """`engine.copy` into the file `fd` at `work.path`, which grows to `base + size`; its space is checked before."""
    space.claim(work.path, fd, extents.total(runs) + base, work.owner)
    os.ftruncate(fd, base + size)
    direct = open_direct(work.path)
    try:
        target = TargetSpec(fd, direct, base, cipher, sparse, places)
        # Where blocks are there already, several can be written at once, and they lie in one piece on the disk.
        lying = (Extent(target.at(run.start), run.length) for run in extents.merged(runs))
        target = replace(target, reserved=all(reserve(fd, run, work.owner) for run in lying))
        return engine.copy(
            source, target, runs, workers=work.settings.workers, team=work.team, advance=work.report.advance
        )
    finally:
        if direct >= 0:
            os.close(direct)


def _kept(found: http.Download, checksum: str, work: Work) -> Made:
    with created(work.path) as fd:
        got = receive(found, work.path, fd, work.owner, work.report, hashed=bool(checksum))
        os.fsync(fd)
    if got.digest != checksum:
        raise invalid(
            f"the checksum of {work.owner} is {got.digest}, and {checksum} was expected",
            "is it another version of the file, or was it changed on the way?",
        )
    # That of a packed file is not that of what was in it.
    digest, written = ("" if got.packing else got.digest), got.sums
    form = formats.detect(work.path)
    with formats.opened(work.path, form) as source:
        # Every number in a foreign file's tables is checked once, here, before anyone relies on it.
        runs = list(extents.normalised(source.extents(), source.size)) if form is not Format.RAW else None
        if form is not Format.LUKS:
            return Made(form, source.size, digest, sums=written, packing=got.packing)
        luks = header.read(work.path)
        if luks.key_size:  # else it has no keyslot, and nothing opens it
            payload.check(luks.cipher, luks.key_size, work.owner)
        written = [item for item in written if item.start >= luks.payload_offset]
        return Made(form, source.size, digest, runs, written, got.packing)


def data_runs(source: Source, *, sparse: bool) -> list[Extent]:
    """What to copy of `source`: its data, or all of it."""
    return list(extents.normalised(source.extents(), source.size)) if sparse else whole(source)


def whole(source: Source) -> list[Extent]:
    """The one run that is all of `source`."""
    return [Extent(0, source.size)]


def _sector_size(source: Source) -> int:
    head = bytearray(min(HEAD, source.size))
    source.read(memoryview(head), 0)
    return sector_size(bytes(head), source.size)


@contextmanager
def created(path: Path) -> Iterator[int]:
    """A new, empty file at `path`, open for reading and writing, locked as long as anybody writes it."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with suppress(OSError):  # not every filesystem that takes an export knows locks
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _beside(action: Callable[[], None]) -> Iterator[None]:
    """Run `action` in a thread while the block runs; what it raises is raised when the block ends."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(action)
        yield
        running.result()
