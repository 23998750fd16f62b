"""The images' devices: each image is opened once a node, shared by its volumes, and closed with the last of them.

Opening, and putting a volume's base on it, happens under a lock on the image's file; so does closing one that nothing
stands on. A volume that finds its image open derives one key, not two: that its passphrase is the image's too is known
where this process has used it for that before (a keyed digest is kept, in memory only, until the image is closed).
"""

import fcntl
import hashlib
import hmac
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from plugin.errors import EbiError
from plugin.host import dm, loop
from plugin.host.dm import Mapper
from plugin.images.image import BackingImage
from plugin.luks import header, mapping
from plugin.volumes import names
from plugin.volumes.layers import Crypt, FileBacking, Layer, Linear, ensure

log = logging.getLogger(__name__)

# The first binary header and its JSON: a changed keyslot changes its salt there.
_HEADER = 16 << 10
_digest_key = os.urandom(32)
_opened_by: dict[str, bytes] = {}
# The files of images by their mappers' names: what a loop tells of its file is how its maker saw it.
_paths: dict[str, Path] = {}


def known(images: Iterable[BackingImage]) -> list[Path]:
    """The files that the devices of `images` are over. From now on they are looked for there."""
    found = {names.image(image.uuid): image.disk for image in images}
    _paths.update(found)
    return [*found.values()]


def _file(mapper: Mapper) -> Path | None:
    if mapper.name in _paths:
        return _paths[mapper.name]
    files = [backing.path for slave in mapper.slaves if (backing := loop.backing(slave))]
    return Path(files[0]) if files else None


@contextmanager
def opened(image: BackingImage, passphrase: bytes, *, check: bool) -> Iterator[None]:
    """The image's device open, and nobody closes it within the block. Put a mapper on it there.

    `check`: an image that was open already must still open with `passphrase`. Raises INVALID when it does not.
    """
    name = names.image(image.uuid)
    owner = f"backing image {image.name}"

    def unlock(device: Path) -> None:
        mapping.open_with_passphrase(device, name, passphrase, owner, readonly=True, step="unlock_image")

    backing = FileBacking(image.disk, readonly=True)
    layer: Layer = (
        Crypt(name, backing, unlock)
        if image.encrypted
        else Linear(name, backing, size=image.virtual_size, readonly=True)
    )
    known([image])
    try:
        with _alone(image.disk):
            digest = _digest(image.disk, passphrase) if image.encrypted else b""
            made = ensure(layer)
            if not made and check and image.encrypted and _opened_by.get(name) != digest:
                header.test_passphrase(image.disk, passphrase, owner, step="unlock_image")
            if made or check:
                _opened_by[name] = digest
            yield
    except BaseException:
        release_idle()
        raise


def release_idle() -> None:
    """Close every image that nothing stands on. One that somebody is about to use is left to him."""
    for mapper in list(dm.every(names.IMAGE)):
        if mapper.holders or not mapper.is_ours:
            continue
        with _alone(_file(mapper), wait=False) as alone:
            now = dm.find(mapper.name)
            if not alone or now is None or now.holders:
                continue
            try:
                dm.remove(mapper.name)
                _opened_by.pop(mapper.name, None)
            except EbiError as error:
                log.warning("%s", error)


def is_idle(name: str) -> bool:
    """Whether nothing stands on the image's mapper `name`, and nobody is about to put something there."""
    mapper = dm.find(name)
    file = _file(mapper) if mapper else None
    return mapper is not None and not mapper.holders and not (file and is_locked(file))


def is_locked(path: Path) -> bool:
    """Whether somebody is opening or closing the image with the file `path`."""
    with _alone(path, wait=False) as alone:
        return not alone


@contextmanager
def _alone(path: Path | None, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of the image file `path`; False if it is another's and we don't `wait`. No file, no lock."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if path else None
    except FileNotFoundError:
        fd = None
    if fd is None:
        yield True
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(fd)


def _digest(path: Path, passphrase: bytes) -> bytes:
    """Says that two passphrases are the same, for the image's present header only: a changed one asks again."""
    with path.open("rb") as file:
        head = hashlib.sha256(file.read(_HEADER)).digest()
    return hmac.digest(_digest_key, head + passphrase, "sha256")
