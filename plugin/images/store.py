"""`Images`: the backing images of one data directory, and everything that can be done with them."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plugin import events
from plugin.errors import EbiError, Kind, exists, not_found, of_system, precondition
from plugin.host.files import sync_directory
from plugin.host.lock import is_locked, locked
from plugin.images import extents, operations, rules, slots, space, volume
from plugin.images.catalog import Catalog, LocalCatalog
from plugin.images.formats import Format
from plugin.images.http import Download
from plugin.images.image import WORKING, BackingImage, State
from plugin.images.manifest import EXPORT, Manifest, check_name, parse
from plugin.images.operations import Made, Operation, Work
from plugin.images.progress import Progress, Reporter, logged
from plugin.images.secrets import SecretSource
from plugin.images.volume import VolumeSource
from plugin.luks import backup
from plugin.settings import Settings

_QUEUED = "it waits for other operations to end"
_CANCEL_SECONDS = 5.0
_INTERRUPTED = "it was interrupted; apply its manifest again"


@dataclass(frozen=True)
class _Job:
    """An operation under the name that metrics know it by."""

    name: str
    run: Operation


class Images:
    """The backing images below `root`; their objects are in `catalog`, by default in files there too.

    Safe to use from several threads and processes at once: an image's directory is locked while it is worked on.
    `users` tells which volumes start from the image of a name; whoever keeps volumes sets it.
    """

    def __init__(self, root: Path, settings: Settings, catalog: Catalog | None = None) -> None:
        self._root, self._settings = root, settings
        self._catalog = catalog or LocalCatalog(root)
        self.users: Callable[[str], Sequence[str]] = lambda _: ()

    @property
    def root(self) -> Path:
        """The directory that holds a directory for each image."""
        return self._root

    def apply(
        self,
        manifest: Mapping[str, Any],
        secrets: SecretSource,
        progress: Callable[[Progress], None] | None = None,
        *,
        volumes: VolumeSource | None = None,
    ) -> BackingImage:
        """Make the image that `manifest` asks for, in this process, and return it ready; `volumes` are for exports.

        The same again changes nothing; what failed or was interrupted is done again. Raises the rejections of
        `manifest` and `rules` before anything is written, and what the operation meets; the record then says `failed`.
        """
        return self._make(
            parse(manifest), lambda wanted, held: self._job(wanted, secrets, held, volumes), progress, volumes
        )

    def upload(
        self, manifest: Mapping[str, Any], found: Download, progress: Callable[[Progress], None] | None = None
    ) -> BackingImage:
        """Make the image that `manifest`, of source type upload, describes from the bytes of `found`.

        Nothing is read where the image is ready and known to be the same by its checksum. Raises as `apply` does, and
        EXISTS for an image that is ready and not known to be the same.
        """
        wanted = parse(manifest)
        current = self._catalog.get(wanted.name)
        if current is not None and current.ready and not wanted.spec.checksum:
            raise exists(f"{current.described} exists already", "delete it first, or use another name")
        return self._make(wanted, lambda *_: _Job("upload", operations.upload(found, wanted.spec.checksum)), progress)

    def _make(
        self,
        wanted: Manifest,
        job: Callable[[Manifest, ExitStack], _Job],
        progress: Callable[[Progress], None] | None,
        volumes: VolumeSource | None = None,
    ) -> BackingImage:
        current = self._catalog.get(wanted.name)
        if current is not None and current.ready and rules.unchanged(wanted, current) == current.spec:
            return current
        with self._locked(wanted.name) as directory, ExitStack() as held:
            current = self._catalog.get(wanted.name)
            if current is not None and current.ready:
                current = replace(current, spec=rules.unchanged(wanted, current))
                self._catalog.save(current)
                return current
            if current is not None and current.path.exists():  # it was damaged since
                self._check_unused(current.name, f"make {current.described} again")
            wanted = rules.resolved(wanted, self._catalog.get, volumes)
            todo = job(wanted, held)
            image = BackingImage.new(wanted, directory, current)
            return self._run(todo, Reporter(image, self._catalog, progress))

    def get(self, name: str) -> BackingImage:
        """The image `name`. Raises NOT_FOUND."""
        image = self._seen(check_name(name))
        if image is None:
            raise not_found(f"backing image {name} not found", "see ebi get backingimages")
        return image

    def list(self) -> list[BackingImage]:
        """All images, by name."""
        return [image for found in self._catalog.list() if (image := self._seen(found.name)) is not None]

    def delete(self, name: str) -> None:
        """Remove the image `name`, and stop whoever makes it.

        Raises NOT_FOUND, PRECONDITION where volumes start from it, and BUSY where it is in use, or its maker did not
        stop within some seconds.
        """
        image, doing = self.get(name), f"delete backing image {name}"
        self._check_unused(name, doing)  # what is refused is not stopped
        if image.status.state in WORKING:
            _cancel(image)
        with self._locked(name):
            self._check_unused(name, doing)
            left = self._catalog.get(name)
            if left is not None:
                self._catalog.remove(left)

    def _check_unused(self, name: str, doing: str) -> None:
        """Raise PRECONDITION for an image with users; none comes to it while its lock is held."""
        if users := self.users(name):
            raise precondition(
                f"cannot {doing} since there are volumes using it: {', '.join(sorted(users))}", "delete those first"
            )

    @contextmanager
    def held(self, name: str) -> Iterator[BackingImage]:
        """The image `name`, which nobody deletes or changes inside the block; several may hold it at once.

        Raises NOT_FOUND, and BUSY while it is worked on.
        """
        self.get(name)
        with locked(self._root / name, f"backing image {name}", shared=True):
            yield self.get(name)

    @contextmanager
    def changing(
        self, name: str, *, shared: bool = False, damaged: bool = False
    ) -> Iterator[tuple[BackingImage, Callable[[BackingImage], None]]]:
        """The ready image `name`, which nobody else uses or changes inside the block, and what keeps it as changed.

        `shared`: others may use it meanwhile, for a change that is nothing to them. `damaged`: also one that was found
        to be so. Raises NOT_FOUND, BUSY, PRECONDITION for an image that is not ready.
        """
        self.get(name)
        with locked(self._root / name, f"backing image {name}", shared=True) if shared else self._locked(name):
            image = self.get(name)
            if not (damaged and image.status.state is State.FAILED and image.path.exists()):
                _check_ready(image)
            with explaining(image, "handling"):
                yield image, self._catalog.save

    @contextmanager
    def ready(self, name: str) -> Iterator[BackingImage]:
        """As `held`, of an image that is ready. Raises PRECONDITION for another one."""
        with self.held(name) as image:
            _check_ready(image)
            yield image

    def raw(self, name: str) -> Path:
        """The file to make a device of: the image's own, or, for qcow2, its disk unpacked beside it, once.

        Raises NOT_FOUND, PRECONDITION for an image that is not ready, BUSY while another call unpacks it.
        """
        with self.ready(name) as image:
            if image.disk.exists():
                return image.disk
            with locked(image.disk.parent, f"the unpacked disk of {image.described}"):
                if not image.disk.exists():
                    self._unpack(image)
            return image.disk

    def recover(self) -> None:
        """Clean what a kill has left: files without a record, partial files, records that nobody works on."""
        for directory in sorted(entry for entry in self._root.glob("*") if entry.is_dir()):
            try:
                self.clean(directory.name)
            except EbiError as error:
                if error.kind is not Kind.BUSY:  # somebody works on it: nothing to clean
                    raise

    def clean(self, name: str) -> None:
        """Clean what a kill has left of the work on the image `name`. Raises BUSY while somebody works on it."""
        directory = self._root / name
        with locked(directory, f"backing image {name}"):
            self._recover(directory)

    def _seen(self, name: str) -> BackingImage | None:
        """The image `name`, failed if its record says that it is worked on and nobody does."""
        image = self._catalog.get(name)
        if image is None or image.status.state not in WORKING or is_locked(image.directory):
            return image
        image = self._catalog.get(name)  # the work may have ended between the two looks
        if image is not None and image.status.state in WORKING:
            image = image.changed(state=State.FAILED, message=_INTERRUPTED)
        return image

    def _job(self, wanted: Manifest, secrets: SecretSource, held: ExitStack, volumes: VolumeSource | None) -> _Job:
        """The operation that `wanted` asks for, its source held until `held` is closed."""
        spec = wanted.spec
        keys = rules.keys(wanted, secrets)
        if spec.source_type == "download":
            url = spec.parameters["url"]
            return _Job("download", operations.download(url, spec.checksum, wanted.described, self._settings))
        if spec.source_type == "upload":
            raise precondition(
                f"{wanted.described} has no content yet", f"upload it: ebi image upload {wanted.name} FILE"
            )
        if volumes is not None and spec.source_type == EXPORT:
            return _Job("export", volume.export(volumes, wanted, keys.new))
        source = held.enter_context(self.held(spec.source))
        if keys.new:
            return _Job(spec.encryption, operations.encrypt(source, keys.new, old=keys.old, sparse=spec.sparse))
        if keys.old:
            return _Job("decrypt", operations.decrypt(source, keys.old.passphrase, sparse=spec.sparse))
        return _Job("clone", operations.clone(source))

    def _run(self, job: _Job, report: Reporter) -> BackingImage:
        image = report.image
        _clear(image.directory)
        try:
            # One that waits for a network more than it works needs no turn.
            turn = nullcontext() if job.name in ("download", "upload") else self.turn(report)
            with explaining(image, job.name), _timed(job.name, report), turn:
                report.state(State.STARTING, message="")
                made = job.run(Work(image.partial, image.described, self._settings, report))
                self._finish(made, report)
        except BaseException as error:
            _clear(image.directory)
            with suppress(EbiError, OSError):  # a record on a full disk; that nobody works on it tells the same
                report.state(State.FAILED, message=str(error) or "it was cancelled")
            raise
        return report.image

    @contextmanager
    def turn(self, report: Reporter) -> Iterator[None]:
        """The turn of the operation that `report` follows: two share the cores and the disk, more wait.

        The block must not take another one: it could wait for itself. It may lock, which waits for nobody.
        """

        def waiting() -> None:
            if report.image.status.message != _QUEUED:
                report.state(State.PENDING, message=_QUEUED)
            report.tick()

        with slots.slot(self._root, waiting):
            yield

    def _finish(self, made: Made, report: Reporter) -> None:
        image = report.image
        extents.save(image.map_path, made.runs, made.virtual_size, made.sums)
        image.partial.rename(image.path)
        (image.directory / space.CLAIM).unlink(missing_ok=True)
        sync_directory(image.directory)
        if made.format is Format.LUKS:
            backup.save(image.path, image.header_path, image.described)
        report.state(
            State.READY,
            progress=100,
            message="",
            virtual_size=made.virtual_size,
            checksum=made.checksum,
            encrypted=made.format is Format.LUKS,
            format=made.format,
            packing=made.packing,
        )

    def _unpack(self, image: BackingImage) -> None:
        # The image stays ready, so its record tells nothing of this. It takes no turn: a pod waits for it, which
        # shall not stand behind operations that may take hours.
        partial = image.disk.with_suffix(".partial")
        report = Reporter(image, None, logged(f"unpacking {image.described}"))
        try:
            with explaining(image, "unpacking"), _timed("unpack", report):
                operations.unpack(image)(Work(partial, image.described, self._settings, report))
                partial.rename(image.disk)
                sync_directory(image.disk.parent)
        finally:
            partial.unlink(missing_ok=True)
            (partial.parent / space.CLAIM).unlink(missing_ok=True)

    def _recover(self, directory: Path) -> None:
        image = self._catalog.get(directory.name)
        if image is None:
            shutil.rmtree(directory)
        elif image.status.state in WORKING:
            _clear(directory)
            self._catalog.save(image.changed(state=State.FAILED, message=_INTERRUPTED))
        else:
            for left in (*directory.rglob("*.partial"), *directory.rglob(space.CLAIM)):
                left.unlink()

    @contextmanager
    def _locked(self, name: str) -> Iterator[Path]:
        """The directory of the image `name`, locked; it does not outlive the block without a record in it."""
        directory = self._root / name
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(directory, f"backing image {name}"):
            try:
                yield directory
            finally:
                if directory.exists() and self._catalog.get(name) is None:
                    shutil.rmtree(directory)


@contextmanager
def _timed(name: str, report: Reporter) -> Iterator[None]:
    """Publish the block as the operation `name` of `report` when it has ended."""
    start, ok = time.monotonic(), False
    try:
        yield
        ok = True
    finally:
        events.publish(events.ImageOperation(name, report.done, time.monotonic() - start, ok))


def _cancel(image: BackingImage) -> None:
    """Have whoever works on `image` stop, and wait a while for it."""
    with suppress(FileNotFoundError):
        image.cancel_path.touch()
    until = time.monotonic() + _CANCEL_SECONDS
    while is_locked(image.directory) and time.monotonic() < until:
        time.sleep(0.05)


def _check_ready(image: BackingImage) -> None:
    if not image.ready:
        raise precondition(f"{image.described} is {image.status.state}, not ready", image.status.message)


def _clear(directory: Path) -> None:
    """Remove everything but the record: what is left of an attempt."""
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "record.json":
            entry.unlink(missing_ok=True)


@contextmanager
def explaining(image: BackingImage, doing: str) -> Iterator[None]:
    """What the block raises is raised with the image named in it, where a user can do something about it."""
    try:
        yield
    except BaseException as error:
        found = _explained(error, image, doing)
        if found is error:
            raise
        raise found from error


def _explained(error: BaseException, image: BackingImage, doing: str) -> BaseException:
    if isinstance(error, OSError):
        return of_system(error, f"the {doing} of {image.described}")
    if isinstance(error, EbiError) and image.described not in error.message:
        return EbiError(f"{image.described}: {error.message}", kind=error.kind, hint=error.hint)
    return error
