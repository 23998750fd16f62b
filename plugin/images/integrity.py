"""Whether images are still what was written: re-read on demand; and the SHA-512 that nobody waits for."""

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from plugin.errors import EbiError, precondition
from plugin.host.files import Extent, data_extents, read_exactly
from plugin.images import engine, extents, operations
from plugin.images.disk import Disk
from plugin.images.image import BackingImage, State
from plugin.images.progress import Progress, Reporter
from plugin.images.store import Images
from plugin.luks import header
from plugin.settings import Settings

log = logging.getLogger(__name__)

_PIECE = 1 << 20
_ZEROS = bytes(_PIECE)


def verify(
    images: Images, settings: Settings, name: str, progress: Callable[[Progress], None] | None = None
) -> BackingImage:
    """Read the file of the image `name` again and return the image if it is what was written.

    The data is compared with the checksums kept at writing, by all workers; the whole file with its SHA-512 where one
    was asked for; the header of an encrypted one must be whole in one of its copies. A damaged image is `failed` from
    then on: no volume is made of it; one that is right again is ready again.
    Raises NOT_FOUND, BUSY, and PRECONDITION for an image that is damaged, not ready, or has nothing to compare with.
    """
    report = Reporter(images.get(name), None, progress)
    # In this order: while it waits for its turn, volumes may be made of the image.
    with images.turn(report), images.changing(name, damaged=True) as (image, save):
        kept = extents.load_sums(image.map_path)
        expected = image.spec.checksum if image.spec.checksum == image.status.checksum else ""
        if not kept and not expected and image.virtual_size and extents.total(image.extents()):
            raise precondition(f"there are no checksums of {image.described}", "make it again to have them")
        try:
            _check(image, settings, expected, report)
        except (EbiError, OSError) as error:
            text = error.message if isinstance(error, EbiError) else f"its file can't be read: {error.strerror}"
            save(image.changed(state=State.FAILED, message=text))
            if isinstance(error, EbiError):
                raise
            raise precondition(
                f"{image.described} is damaged: {text}", "verify it again once the disk has healed, or make it again"
            ) from error
        if image.ready:
            return image
        healed = image.changed(state=State.READY, message="")
        save(healed)
        return healed


def _check(image: BackingImage, settings: Settings, expected: str, report: Reporter) -> None:
    if image.encrypted:
        header.read(image.path)
    kept = extents.load_sums(image.map_path)
    fd = os.open(image.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # the disk is asked, not the page cache
        size = os.fstat(fd).st_size
        if kept and kept[-1].extent.end > size:
            raise precondition(f"{image.described} is damaged: its file ends at byte {size}", "make it again")
        report.expect(sum(item.length for item in kept) + (size if expected else 0))
        pieces = [item.extent for item in kept]
        found = engine.copy(Disk(fd, size), None, pieces, workers=settings.workers, advance=report.advance)
        operations.check_sums(image, kept, found)
        if expected and _sha512(fd, report.advance) != expected:
            raise precondition(
                f"{image.described} is damaged: its file has not the SHA-512 that its manifest tells",
                "delete it and make it again",
            )
    finally:
        os.close(fd)


def fill_checksums(images: Images, stop: threading.Event, every: float = 30.0) -> None:
    """Give each ready image the SHA-512 of its file that it lacks, until `stop`; looks for new ones `every` seconds.

    For a thread of its own, which becomes the least important one of the process; the kernel derives the priority of
    its reads from that (ioprio_set(2)). It holds no lock while it reads: whoever wants to delete the image may.
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    while True:
        for image in images.list():
            if stop.is_set():
                return
            if image.ready and not image.status.checksum:
                try:
                    _fill(images, image, stop)
                except (EbiError, OSError) as error:
                    log.info("no checksum of %s this time: %s", image.described, error)
        if stop.wait(every):
            return


class _Stopped(Exception):
    pass


def _fill(images: Images, image: BackingImage, stop: threading.Event) -> None:
    def advance(_: int) -> None:
        if stop.is_set():
            raise _Stopped

    try:
        before = _identity(image.path)
        fd = os.open(image.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            digest = _sha512(fd, advance)
        finally:
            os.close(fd)
    except _Stopped:
        return
    # Shared: or a volume that is made of the image in this instant would be refused.
    with images.changing(image.name, shared=True) as (now, save):
        if now.uuid == image.uuid and not now.status.checksum and _identity(now.path) == before:
            save(now.changed(checksum=digest))


def _identity(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _sha512(fd: int, advance: Callable[[int], None]) -> str:
    """The SHA-512 of the file, holes included; what it reads does not stay in the page cache."""
    digest, piece = hashlib.sha512(), memoryview(bytearray(_PIECE))
    for run, is_data in _all(fd):
        for at in range(run.start, run.end, _PIECE):
            length = min(_PIECE, run.end - at)
            if is_data:
                read_exactly(fd, piece[:length], at)
            digest.update(piece[:length] if is_data else memoryview(_ZEROS)[:length])
            advance(length)
        if is_data:
            os.posix_fadvise(fd, run.start, run.length, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def _all(fd: int) -> Iterator[tuple[Extent, bool]]:
    """The runs of the whole file, and whether each is data."""
    at, size = 0, os.fstat(fd).st_size
    for run in data_extents(fd):
        if run.start > at:
            yield Extent(at, run.start - at), False
        yield run, True
        at = run.end
    if size > at:
        yield Extent(at, size - at), False
