"""An image's content written to a file outside of the data directory, so that what goes in can come out."""

import fcntl
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from plugin.errors import EbiError, exists, invalid
from plugin.host.files import sync_directory, write_exactly
from plugin.images import extents, formats, operations
from plugin.images.disk import CipherSpec
from plugin.images.formats import Format
from plugin.images.image import BackingImage
from plugin.images.operations import Made, Operation, Work
from plugin.images.progress import Progress, Reporter
from plugin.images.store import Images, explaining
from plugin.luks import header
from plugin.luks.parameters import SecretParameters
from plugin.settings import Settings


def export(
    images: Images,
    settings: Settings,
    name: str,
    file: Path,
    *,
    form: Format | None = None,
    dense: bool = False,
    decrypt: bool = False,
    secret: Mapping[str, bytes] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Made:
    """Write the image `name` to the new file `file`, mode 0600, whole or not at all.

    As it is, or its disk as `form` (raw or qcow2). `decrypt` opens an encrypted image with the Secret data `secret`.
    `dense` leaves no holes: an encrypted image that other tools shall open needs that, and for it `secret`.
    What a killed export to it has left beside it goes.
    Raises NOT_FOUND, PRECONDITION for an image that is not ready, EXISTS for a file that is there, INVALID.
    """
    _sweep(file)  # first: a kill behind its last step leaves both
    if file.exists():
        raise _taken(file)
    with images.ready(name) as image:
        image.check_file()
        todo = _chosen(image, form, secret, dense=dense, decrypt=decrypt)
        report = Reporter(image, None, progress)
        partial = file.with_name(f".{file.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")
        try:
            with explaining(image, "export"):
                with images.turn(report):
                    made = todo(Work(partial, image.described, settings, report))
                _publish(partial, file)
        finally:
            partial.unlink(missing_ok=True)
        sync_directory(file.absolute().parent)
        return made


def _sweep(file: Path) -> None:
    """Remove the partial files of exports to `file` whose process is gone, and that nobody writes any more."""
    name = re.compile(rf"\.{re.escape(file.name)}\.(\d+)-[0-9a-f]{{8}}\.partial")
    for partial in file.absolute().parent.iterdir():
        found = name.fullmatch(partial.name)
        if found and not Path("/proc", found[1]).exists():
            with suppress(OSError):
                fd = os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    partial.unlink()
                finally:
                    os.close(fd)


def _publish(partial: Path, file: Path) -> None:
    """Give the whole file its name, where nobody else has taken it meanwhile."""
    try:
        os.link(partial, file)
    except FileExistsError:
        raise _taken(file) from None
    except OSError:  # a filesystem without hard links
        partial.rename(file)


def _taken(file: Path) -> EbiError:
    return exists(f"the file {file} exists", "remove it, or name another one")


def _chosen(
    image: BackingImage, form: Format | None, secret: Mapping[str, bytes] | None, *, dense: bool, decrypt: bool
) -> Operation:
    own = image.status.format
    if image.encrypted and not decrypt:
        if form not in (None, Format.LUKS):
            raise invalid(f"{image.described} is encrypted, so it is no {form} file", "decrypt it: --decrypt -f SECRET")
        if not dense:
            return operations.clone(image)
        if secret is None:
            raise invalid(
                f"to fill the holes of {image.described} its key is needed", "give its Secret with -f, or leave --dense"
            )
        return _filled(image, _passphrase(image, secret))
    if decrypt and not image.encrypted:
        raise invalid(f"{image.described} is not encrypted", "leave --decrypt out")
    if form is Format.LUKS:
        raise invalid(f"{image.described} can't be exported as {form}", "clone it with encryption: encrypt first")
    if decrypt and secret is None:
        raise invalid(f"{image.described} is decrypted with its secret only", "give its Secret with -f")
    if not (decrypt or dense) and form in (None, own):
        return operations.clone(image)
    passphrase = _passphrase(image, secret) if decrypt and secret is not None else None
    return _plain(image, passphrase, form or (Format.RAW if decrypt else own), dense=dense)


def _passphrase(image: BackingImage, secret: Mapping[str, bytes]) -> bytes:
    return SecretParameters.from_data(secret, image.described).passphrase


def _plain(image: BackingImage, passphrase: bytes | None, form: Format, *, dense: bool) -> Operation:
    """The disk of `image`, unlocked with `passphrase` where it has one, as a raw or qcow2 file."""

    def run(work: Work) -> Made:
        key = header.volume_key(image.path, passphrase, image.described) if passphrase else None
        with formats.opened(image.path, image.status.format, key) as source:
            runs = operations.whole(source) if dense else image.extents()
            if form is Format.RAW:
                return operations.unpacked(source, runs, work, sparse=not dense)
            return operations.as_qcow2(source, runs, work, sparse=not dense)

    return run


def _filled(image: BackingImage, passphrase: bytes) -> Operation:
    """The LUKS2 device `image` with encrypted zeros for its holes, its header and key the same."""

    def run(work: Work) -> Made:
        found = header.read(image.path)
        key = header.volume_key(image.path, passphrase, image.described)
        cipher = CipherSpec(found.cipher, key, found.sector_size)
        with formats.opened(image.path, Format.LUKS, key) as source, operations.created(work.path) as fd:
            runs = operations.whole(source)
            with image.path.open("rb") as file:
                write_exactly(fd, file.read(found.payload_offset), 0)
            work.report.expect(extents.total(runs))
            operations.copy_disk(
                source, fd, work, runs, size=source.size, base=found.payload_offset, cipher=cipher, sparse=False
            )
            os.fsync(fd)
            return Made(Format.LUKS, source.size)

    return run
