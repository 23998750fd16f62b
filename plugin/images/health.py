"""What is wrong with the images of a data directory. What somebody works on now is passed over."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from plugin.errors import EbiError
from plugin.findings import Finding
from plugin.host.lock import is_locked
from plugin.images import extents
from plugin.images.image import BackingImage, State
from plugin.images.store import Images
from plugin.luks import backup, header, metadata

_AGAIN = "delete the image and make it again"


def examine(images: Images) -> Iterator[Finding]:
    """Everything that is wrong, by image."""
    for directory in sorted(entry for entry in images.root.glob("*") if entry.is_dir()):
        if not is_locked(directory):
            yield from _of_directory(images, directory)


def _of_directory(images: Images, directory: Path) -> Iterator[Finding]:
    name, subject = directory.name, f"backing image {directory.name}"
    try:
        image = images.get(name)
    except EbiError:  # no record, or no name
        image = None
    if image is None and not directory.exists():  # it was being removed
        return
    # Of a disk that is being unpacked, its own directory is locked.
    if image is None or any(not is_locked(path.parent) for path in directory.rglob("*.partial")):
        text = f"{directory} holds what an interrupted operation has left"
        yield Finding(
            "partial", subject, text, "ebi doctor --fix removes it", partial(images.clean, name), safe=True
        )  # fmt: skip
    if image is None:
        return
    if image.status.state is State.UNKNOWN:
        yield Finding("record-damaged", subject, image.status.message, _AGAIN)
    elif image.status.state is State.FAILED:
        hint = "apply it again, or delete it"
        if image.path.exists():  # it was ready once
            hint = f"ebi image verify {name} looks again; or delete the image and make it again"
        yield Finding("failed", subject, f"it has failed: {image.status.message}", hint)
        if image.encrypted and image.path.exists():
            yield from _of_header(images, image, subject)
    elif image.ready and not image.path.exists():
        yield Finding("file-missing", subject, f"its file {image.path} is missing", _AGAIN)
    elif image.ready and image.encrypted:
        yield from _of_header(images, image, subject)
        if extents.load(image.map_path, image.virtual_size) is None:
            text = "its extent map is missing or can't be read"
            yield Finding(
                "map-missing", subject, text, "ebi doctor --fix makes it anew", partial(_rebuild, images, name)
            )  # fmt: skip


def _of_header(images: Images, image: BackingImage, subject: str) -> Iterator[Finding]:
    damaged = metadata.damaged(image.path)
    if damaged:
        text = f"the {' and the '.join(damaged)} copy of its LUKS2 header is damaged"
        yield Finding("header-damaged", subject, text, f"ebi image header restore {image.name}")
        return
    if not image.header_path.exists() or metadata.sequence(image.header_path) < metadata.sequence(image.path):
        text = "the backup of its LUKS2 header is missing, damaged, or older than the header"
        renew = partial(_renew, images, image.name)
        yield Finding("backup-old", subject, text, "ebi doctor --fix makes it anew", renew, safe=True)


def _renew(images: Images, name: str) -> None:
    with images.changing(name) as (image, _):
        backup.save(image.path, image.header_path, image.described)


def _rebuild(images: Images, name: str) -> None:
    with images.changing(name) as (image, _):
        found = header.read(image.path)
        fd = os.open(image.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            runs = extents.rebuilt(fd, found.payload_offset, image.virtual_size)
        finally:
            os.close(fd)
        extents.save(image.map_path, runs, image.virtual_size, extents.load_sums(image.map_path))
