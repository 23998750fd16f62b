"""The disks of volumes as images are made of them: read from the volume's file, with no device and no root.

A volume that is detached is read where it is, and held meanwhile. One that is attached is captured first: its device
stands still, its filesystem frozen, for as long as it takes to share the blocks of its file with another file, or to
copy its data where the filesystem can't share. The ciphertext is what is captured; from then on the volume is free.
"""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from plugin import events
from plugin.errors import EbiError, Kind, precondition
from plugin.host import dm
from plugin.host.files import Extent, data_extents, share
from plugin.images import formats, operations, space
from plugin.images.disk import Source
from plugin.images.formats import Format
from plugin.images.image import BackingImage
from plugin.images.operations import Work
from plugin.images.patched import Patch, Patched
from plugin.images.volume import VolumeFacts
from plugin.luks import header, payload
from plugin.volumes import exceptions, names, stats
from plugin.volumes.node import Node
from plugin.volumes.record import Volume

_PIECE = 4 << 20


class Disks:
    """The disks of the volumes of `node`: a `plugin.images.VolumeSource`."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def facts(self, volume: str) -> VolumeFacts:
        """As the protocol says."""
        record = self._usable(volume)
        image = self._image(record)
        if image is None:
            return VolumeFacts(record.encrypted)
        return VolumeFacts(record.encrypted, image.spec.secret, image.spec.secret_namespace)

    @contextmanager
    def disk(self, volume: str, passphrase: bytes, work: Work) -> Iterator[Source]:
        """As the protocol says. Raises INVALID when `passphrase` does not open it, BUSY, EXHAUSTED."""
        with ExitStack() as held, ExitStack() as lock:
            lock.enter_context(self._node.operation(volume))
            record = self._usable(volume)
            image = self._image(record)
            if image is not None:
                held.enter_context(self._node.images.ready(image.name))
            file = record.path
            if any(dm.find(name) for name in names.mappers(volume)):
                file = work.path.with_name("volume.partial")
                held.callback(file.unlink, missing_ok=True)
                self._capture(record, file, work)
                lock.close()
            yield held.enter_context(_composed(record, image, file, passphrase))

    def _usable(self, volume: str) -> Volume:
        record = self._node.records.get(volume)
        if not record.formatted:
            raise precondition(
                f"{record.described} can't be exported: it was never staged, so it holds nothing yet",
                "clone its backing image" if record.image else "stage it first",
            )
        record.check_file()
        if record.encrypted:
            found = header.read(record.path)
            payload.check(found.cipher, found.key_size, record.described)
        return record

    def _image(self, record: Volume) -> BackingImage | None:
        try:
            image = self._node.image(record)
        except EbiError as error:
            if error.kind is not Kind.NOT_FOUND:
                raise
            raise precondition(f"{record.described} can't be read: {error.message}", error.hint) from error
        if image is not None:
            image.check_file()
        return image

    def _capture(self, record: Volume, file: Path, work: Work) -> None:
        """Have `file` be the volume's file as it is at one instant."""
        condition = stats.examine(self._node, record.id)
        if condition.abnormal:
            raise precondition(f"{record.described} can't be exported: {condition.message}", "see ebi get volumes")
        source = os.open(record.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with operations.created(file) as target:
                can_share = share(source, target)
                if not can_share:
                    space.claim(file, target, sum(run.length for run in data_extents(source)), record.described)
                start = time.monotonic()
                with events.step("capture"), dm.still(names.top(record.id)):
                    if can_share:
                        share(source, target)
                    else:
                        _copy(source, target, work)
                work.report.note(f"volume {record.id} stood still for {time.monotonic() - start:.2f} s to be captured")
        finally:
            os.close(source)


def _copy(source: int, target: int, work: Work) -> None:
    for run in data_extents(source):
        at = run.start
        while at < run.end:
            count = os.copy_file_range(source, target, min(_PIECE, run.end - at), at, at)
            if not count:
                raise precondition(f"a volume's file ends at byte {at}, in the middle of its data", "it is truncated")
            at += count
            work.report.tick()
    os.ftruncate(target, os.fstat(source).st_size)


@contextmanager
def _composed(record: Volume, image: BackingImage | None, file: Path, passphrase: bytes) -> Iterator[Source]:
    """What the volume's mapper would show of `file` over `image`."""
    form = Format.LUKS if record.encrypted else Format.RAW
    key = header.volume_key(file, passphrase, record.described) if record.encrypted else None
    with formats.opened(file, form, key) as own:
        if image is None:
            yield Patched(record.capacity, own, _data(file, record.header_size), None, ())
            return
        patches = exceptions.patches(own, record.chunk, record.covered, record.described)
        behind = record.store_size - record.covered
        patches += [
            Patch(run.start - behind, run.length, run.start)
            for run in _data(file, record.header_size, record.store_size)
        ]
        key = header.volume_key(image.path, passphrase, image.described) if image.encrypted else None
        with formats.opened(image.path, image.status.format, key) as base:
            yield Patched(record.capacity, base, image.extents(), own, patches)


def _data(file: Path, header: int, start: int = 0) -> list[Extent]:
    """The data from byte `start` on of what comes in `file` behind `header` bytes; what was only reserved is none."""
    with file.open("rb") as opened:
        return [Extent(run.start - header, run.length) for run in data_extents(opened.fileno(), header + start)]
