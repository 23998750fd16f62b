"""A backing image as a value: what was asked for, how far it is, and where its bytes are."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from plugin.errors import precondition
from plugin.host.files import Extent
from plugin.images import extents, formats
from plugin.images.formats import Format
from plugin.images.manifest import API_VERSION, EXPORT, KIND, Manifest, Spec
from plugin.images.packed import Packing


class State(StrEnum):
    """Longhorn's states of a backing image file."""

    PENDING = "pending"
    STARTING = "starting"
    READY_FOR_TRANSFER = "ready-for-transfer"
    IN_PROGRESS = "in-progress"
    READY = "ready"
    FAILED = "failed"
    UNKNOWN = "unknown"


_EVENTS = 20  # kept in the record
# States in which somebody works on the image, or has died doing so.
WORKING = frozenset({State.PENDING, State.STARTING, State.READY_FOR_TRANSFER, State.IN_PROGRESS})


@dataclass(frozen=True)
class Event:
    """Something that happened to an image at `time` (RFC 3339); `type` is Normal or Warning, as in Kubernetes."""

    time: str
    type: str
    message: str

    def to_dict(self) -> dict[str, str]:
        """For the record."""
        return {"time": self.time, "type": self.type, "message": self.message}


@dataclass(frozen=True)
class Status:
    """How far an image is; `progress` in percent, `virtual_size` the bytes of the plain disk, `since` RFC 3339.

    `checksum` is the SHA-512 of its own file; one that came packed (`packing`) has another one than the manifest tells.
    """

    state: State = State.PENDING
    progress: int = 0
    message: str = ""
    virtual_size: int = 0
    checksum: str = ""
    encrypted: bool = False
    format: Format = Format.RAW
    since: str = ""
    events: tuple[Event, ...] = ()
    packing: Packing = Packing.NONE


@dataclass(frozen=True)
class BackingImage:
    """One backing image; `directory` holds its file, its extent map and, kept locally, its record."""

    name: str
    namespace: str
    uuid: str
    created: str
    spec: Spec
    status: Status
    directory: Path = field(compare=False)

    @classmethod
    def new(cls, manifest: Manifest, directory: Path, before: "BackingImage | None" = None) -> "BackingImage":
        """An image that nothing was done for yet, with a new identity; `before` is an earlier attempt at it."""
        created, events = (before.created, before.status.events) if before else ("", ())
        status = Status(events=events)
        image = cls(
            manifest.name, manifest.namespace, str(uuid.uuid4()), created or now(), manifest.spec, status, directory
        )
        spec = manifest.spec
        exported = spec.source_type == EXPORT and bool(spec.secret)
        return image.changed(encrypted=exported or spec.encryption in ("encrypt", "reencrypt"))

    @property
    def described(self) -> str:
        """How messages name it."""
        return f"backing image {self.name}"

    @property
    def ready(self) -> bool:
        """Whether its file is whole."""
        return self.status.state is State.READY

    @property
    def encrypted(self) -> bool:
        """Whether its file is a LUKS2 device (or shall be)."""
        return self.status.encrypted

    @property
    def virtual_size(self) -> int:
        """Bytes of the plain disk; 0 before they are known."""
        return self.status.virtual_size

    @property
    def path(self) -> Path:
        """Its file, there once it is ready."""
        return self.directory / "image"

    @property
    def partial(self) -> Path:
        """Its file while it is being made."""
        return self.directory / "image.partial"

    @property
    def map_path(self) -> Path:
        """The checksums of its file and, of an encrypted image, the extent map."""
        return self.directory / "extents.json"

    @property
    def cancel_path(self) -> Path:
        """Where it is, whoever works on the image stops: it is to be deleted."""
        return self.directory / "cancel"

    @property
    def header_path(self) -> Path:
        """The backup of an encrypted image's LUKS2 header."""
        return self.directory / "header.luks"

    @property
    def disk(self) -> Path:
        """The file that a device is made of: `path`, or the unpacked copy of a qcow2 image (`Images.raw` makes it)."""
        return self.directory / "unpacked" / "disk" if self.status.format is Format.QCOW2 else self.path

    def extents(self) -> list[Extent]:
        """The data runs of the plain disk, in order; whatever is outside of them reads as zeros.

        Raises PRECONDITION when the file is missing.
        """
        if self.encrypted and (kept := extents.load(self.map_path, self.virtual_size)) is not None:
            return kept
        self.check_file()
        with formats.opened(self.path, self.status.format) as source:
            return list(extents.normalised(source.extents(), self.virtual_size))

    def check_file(self) -> None:
        """Raise PRECONDITION where its file is missing."""
        if not self.path.exists():
            raise precondition(
                f"the file of {self.described} is missing: {self.path}",
                "put it back, or delete the image and make it again",
            )

    def changed(self, **changes: Any) -> "BackingImage":
        """This image with another status; a new state is given its time."""
        if changes.get("state", self.status.state) != self.status.state or not self.status.since:
            changes["since"] = now()
        changed = replace(self, status=replace(self.status, **changes))
        if changed.status.state is self.status.state:
            return changed
        state, message = changed.status.state, changed.status.message
        return changed.noted(f"{state}: {message}" if message else str(state), warning=state is State.FAILED)

    def noted(self, message: str, *, warning: bool = False) -> "BackingImage":
        """This image with one more event; the oldest go."""
        event = Event(now(), "Warning" if warning else "Normal", message)
        return replace(self, status=replace(self.status, events=(*self.status.events, event)[-_EVENTS:]))

    def to_record(self) -> dict[str, Any]:
        """What has to be kept of it: the object without what the file itself tells."""
        status = self.status
        return {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": self.name, "namespace": self.namespace, "creationTimestamp": self.created},
            "spec": self.spec.to_dict(),
            "status": {
                "uuid": self.uuid,
                "state": str(status.state),
                "progress": status.progress,
                "message": status.message,
                "virtualSize": status.virtual_size,
                "checksum": status.checksum,
                "encrypted": status.encrypted,
                "format": str(status.format),
                "lastStateTransitionTime": status.since,
                "packing": str(status.packing),
                "events": [event.to_dict() for event in status.events],
            },
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], directory: Path) -> "BackingImage":
        """The inverse of `to_record`. Raises KeyError, TypeError, ValueError or AttributeError for anything else."""
        metadata, status = record["metadata"], record["status"]
        return cls(
            name=metadata["name"],
            namespace=metadata["namespace"],
            uuid=status["uuid"],
            created=metadata["creationTimestamp"],
            spec=Spec.from_dict(record["spec"]),
            status=Status(
                State(status["state"]),
                status["progress"],
                status["message"],
                status["virtualSize"],
                status["checksum"],
                status["encrypted"],
                Format(status["format"]),
                status["lastStateTransitionTime"],
                tuple(Event(**event) for event in status.get("events", [])),
                Packing(status.get("packing", "")),
            ),
            directory=directory,
        )

    def to_object(self) -> dict[str, Any]:
        """The Kubernetes object, with the sizes that its file has now."""
        value = self.to_record()
        size, real = 0, 0
        for path in (self.path, self.partial, self.disk):
            try:
                found = path.stat()
            except OSError:
                continue
            size, real = size or found.st_size, real + found.st_blocks * 512
            if self.disk == self.path:
                break
        value["status"] |= {"size": size, "realSize": real, "path": str(self.path)}
        return value


def now() -> str:
    """The time as RFC 3339, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
