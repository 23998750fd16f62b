"""Images on demand: a StorageClass may say where its backing image comes from, and its first volume has it made.

That takes longer than a call may. So it runs in a thread of its own, and whoever asks for a volume is told UNAVAILABLE
and how far it is, until the image is ready: an orchestrator asks again. What fails is told once; the next call after
that starts over.
"""

import logging
import threading
from collections.abc import Mapping
from typing import Any

from plugin.errors import EbiError, Kind, not_found, unavailable
from plugin.images import manifest
from plugin.images.image import WORKING, BackingImage
from plugin.images.progress import Progress
from plugin.images.secrets import DocumentSecrets
from plugin.images.store import Images
from plugin.images.volume import VolumeSource
from plugin.volumes import fit
from plugin.volumes.parameters import VolumeParameters

log = logging.getLogger(__name__)

# The sources that Longhorn makes an image of on demand, and what is said of one that is being made.
_DOING = {"download": "downloaded", "export-from-volume": "exported"}
_PATIENCE = 3.0  # seconds; a small image is there by then
_STOP_SECONDS = 5.0


class OnDemand:
    """Makes what is missing among `images`, each image once however many ask; exports are of the volumes in `disks`."""

    def __init__(self, images: Images, disks: VolumeSource) -> None:
        self._images, self._disks = images, disks
        self._lock = threading.Lock()
        self._jobs: dict[str, _Job] = {}
        self._stopping = threading.Event()

    def provide(self, wanted: VolumeParameters) -> None:
        """Return once the image that `wanted` names is there, or can't be made here.

        Raises UNAVAILABLE while it is being made, NOT_FOUND for an absent one whose source is none of those that are
        made on demand, INVALID for a source that makes no sense or is not the image's own, and what the making met.
        """
        image = self._find(wanted.image)
        ours = wanted.image in self._jobs
        if image is not None:
            fit.check_source(image, wanted)
            if image.ready and not ours:
                return
            if image.status.state in WORKING and not ours:
                raise _unfinished(wanted, image)
        if wanted.image_source_type not in _DOING:
            if image is None:
                raise not_found(
                    f"backing image {wanted.image} not found",
                    f"apply its manifest; only {' and '.join(_DOING)} make one on demand",
                )
            return
        job = self._job(wanted)
        job.join(_PATIENCE)
        if job.is_alive():
            raise _unfinished(wanted, self._find(wanted.image))
        with self._lock:
            if self._jobs.get(wanted.image) is job:
                del self._jobs[wanted.image]
        if job.error is not None:
            raise EbiError(job.error.message, kind=job.error.kind, hint=job.error.hint)

    def stop(self) -> None:
        """Have all work end, and wait some seconds for it: its images are then failed, and can be made again."""
        self._stopping.set()
        with self._lock:
            jobs = [*self._jobs.values()]
        for job in jobs:
            job.join(_STOP_SECONDS)

    def _find(self, name: str) -> BackingImage | None:
        try:
            return self._images.get(name)
        except EbiError as error:
            if error.kind is not Kind.NOT_FOUND:
                raise
            return None

    def _job(self, wanted: VolumeParameters) -> "_Job":
        document = _document(wanted)
        manifest.parse(document)
        with self._lock:
            job = self._jobs.get(wanted.image)
            if job is None:
                if self._stopping.is_set():
                    raise unavailable("the driver is stopping", "try again in a moment")
                log.info("making backing image %s on demand", wanted.image)
                job = self._jobs[wanted.image] = _Job(self._images, self._disks, document, self._stopping)
                job.start()
            return job


class _Job(threading.Thread):
    """One image being made; `error` is what that met, once the thread has ended."""

    def __init__(
        self, images: Images, disks: VolumeSource, document: Mapping[str, Any], stopping: threading.Event
    ) -> None:
        super().__init__(name="image", daemon=True)
        self.error: EbiError | None = None
        self._images, self._disks, self._document, self._stopping = images, disks, document, stopping

    def run(self) -> None:
        """Make it."""
        try:
            self._images.apply(self._document, DocumentSecrets(), self._heard, volumes=self._disks)
        except EbiError as error:
            log.warning("%s", error)
            self.error = error
        except Exception:
            log.exception("backing image %s was not made", self._document["metadata"]["name"])
            self.error = EbiError(
                f"backing image {self._document['metadata']['name']} was not made", hint="see the driver's log"
            )

    def _heard(self, _: Progress) -> None:
        if self._stopping.is_set():
            raise EbiError("the driver is stopping", kind=Kind.CANCELLED, hint="the next call starts it again")


def _document(wanted: VolumeParameters) -> Mapping[str, Any]:
    spec = {
        "sourceType": wanted.image_source_type,
        "sourceParameters": dict(wanted.image_source_parameters or {}),
        "checksum": wanted.image_checksum,
    }
    return {
        "apiVersion": manifest.API_VERSION,
        "kind": manifest.KIND,
        "metadata": {"name": wanted.image},
        "spec": spec,
    }


def _unfinished(wanted: VolumeParameters, image: BackingImage | None) -> EbiError:
    doing = _DOING.get(image.spec.source_type if image else wanted.image_source_type, "made")
    percent = image.status.progress if image else 0
    return unavailable(f"backing image {wanted.image} is being {doing}, {percent} %", "ask again until it is ready")
