"""The durable facts of a volume: what was asked for, and whether it was ever formatted. Nothing of what is mounted."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from plugin import events
from plugin.errors import EbiError, not_found, of_system, out_of_range, precondition
from plugin.host import dm, files
from plugin.host.files import read_json, write_json
from plugin.volumes import names, tables

RECORD = "record.json"
DATA = "volume.img"
STAGING = "staging"
GRAIN = 4096  # capacities are whole sectors of the largest size
LUKS_HEADER = 16 << 20  # bytes before the payload, as cryptsetup makes it


@dataclass(frozen=True)
class Volume:
    """One volume: `capacity` is what can be used of it in bytes, `chunk` the snapshot's grain in bytes.

    `covered` is how many bytes, from the first on, are the image's until they are written, 0 without an image. What
    comes behind them lies in the volume's file as it is, behind the snapshot's store.
    `formatted` says that its header, store and filesystem were once made: then nothing is ever formatted again.
    `ephemeral` is the target path of an inline volume, which goes with its publish; "" for any other.
    """

    id: str
    name: str
    capacity: int
    encrypted: bool
    created: str
    chunk: int
    image: str = ""
    image_uuid: str = ""
    covered: int = 0
    fs_type: str = ""
    mkfs_options: tuple[str, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    formatted: bool = False
    ephemeral: str = ""
    directory: Path = field(default=Path(), compare=False)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], directory: Path) -> Self:
        """The volume that `to_json` wrote; what a later version added is left out.

        Raises KeyError, TypeError or AttributeError for anything else.
        """
        known = {item.name for item in fields(cls)}
        values = {key: item for key, item in value.items() if key in known}
        if value["image"]:  # there was a time when all of a volume was
            values.setdefault("covered", value["capacity"])
        found = cls(**{**values, "mkfs_options": tuple(value["mkfs_options"]), "directory": directory})
        if not isinstance(found.capacity, int) or not isinstance(found.chunk, int) or found.id != directory.name:
            raise TypeError
        return found

    def to_json(self) -> dict[str, Any]:
        """What is kept on the disk."""
        value = asdict(self)
        del value["directory"]
        return value

    @property
    def path(self) -> Path:
        """The file that holds it."""
        return self.directory / DATA

    @property
    def staging(self) -> Path:
        """Where an ephemeral one is staged."""
        return self.directory / STAGING

    @property
    def header_size(self) -> int:
        """Bytes of its file before what the mapper shows."""
        return LUKS_HEADER if self.encrypted else 0

    @property
    def file_size(self) -> int:
        """Bytes that its file must have: they come on top of what can be used."""
        return self.header_size + self.store_size + self.capacity - self.covered

    @property
    def store_size(self) -> int:
        """Bytes of its payload that hold what was written over the image."""
        return tables.store_size(self.covered, self.chunk) if self.image else 0

    @property
    def is_reserved(self) -> bool:
        """Whether its file has all of its blocks; one whose owner wants discards may have given some back."""
        status = self.path.stat()
        return status.st_size >= self.file_size and status.st_blocks * 512 >= self.file_size

    def check_file(self) -> None:
        """Raise PRECONDITION where its file is missing, or shorter than it was made."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            raise precondition(
                f"the file of {self.described} is missing: {self.path}",
                "put it back from a backup, or delete the volume",
            ) from None
        if size < self.file_size:
            raise precondition(
                f"the file of {self.described} has {size} bytes, not {self.file_size}: data is lost",
                "restore it from a backup, or delete the volume",
            )

    def reserve(self) -> None:
        """Have its file there in its full size, on the disk, with every block its own. Raises EXHAUSTED."""
        with files.room(self.described):
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        before = os.fstat(fd).st_size
        try:
            with events.step("reserve"):
                files.preallocate(fd, self.file_size, self.described)
                os.fsync(fd)
        except BaseException:
            if before < self.file_size:
                os.ftruncate(fd, before)  # gives back what was reserved until the space ran out
            raise
        finally:
            os.close(fd)

    @property
    def described(self) -> str:
        """Its name for messages."""
        return f"{'encrypted ' if self.encrypted else ''}volume {self.id}"

    @property
    def state(self) -> str:
        """`attached` while its device is mapped on this node, else `detached`."""
        return "attached" if dm.find(names.top(self.id)) else "detached"

    def to_object(self) -> dict[str, Any]:
        """The volume as `ebi get` shows it."""
        try:
            real_size = self.path.stat().st_blocks * 512
        except FileNotFoundError:
            real_size = 0
        return {
            "apiVersion": "ebi/v1",
            "kind": "Volume",
            "metadata": {"name": self.id, "creationTimestamp": self.created},
            "spec": {
                "capacity": self.capacity,
                "backingImage": self.image,
                "encrypted": self.encrypted,
                "parameters": dict(self.parameters),
            },
            "status": {
                "state": self.state,
                "realSize": real_size,
                "formatted": self.formatted,
                "ephemeral": self.ephemeral,
            },
        }


class Records:
    """The volumes below `root`: `<root>/<id>/record.json` makes one exist."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def directory(self, volume: str) -> Path:
        """Where the volume with this id is kept. Raises NOT_FOUND for what can't be an id, such as a path."""
        if not names.is_volume_id(volume):
            raise not_found(f"volume {volume!r} does not exist", "see ebi get volumes")
        return self.root / volume

    def find(self, volume: str) -> Volume | None:
        """The volume with this id, if there is one.

        Raises INTERNAL where its record is damaged or can't be read, PRECONDITION for one that this user may not read.
        """
        if not names.is_volume_id(volume):
            return None
        directory = self.directory(volume)
        try:
            value = read_json(directory / RECORD)
            return Volume.from_json(value, directory) if value is not None else None
        except OSError as error:  # not damaged: nobody shall delete it for that
            raise of_system(error, f"reading the record of volume {volume}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise EbiError(
                f"the record of volume {volume} is damaged",
                hint=f"put {directory / RECORD} back from a backup, or delete the volume",
            ) from None

    def get(self, volume: str) -> Volume:
        """The volume with this id. Raises NOT_FOUND."""
        found = self.find(volume)
        if found is None:
            raise not_found(f"volume {volume} does not exist", "see ebi get volumes")
        return found

    def every(self) -> Iterator[Volume]:
        """All volumes whose records can be read, by id."""
        for name in self._names():
            try:
                found = self.find(name)
            except EbiError:  # `damaged` and `ebi doctor` tell
                continue
            if found is not None:
                yield found

    def damaged(self) -> Iterator[str]:
        """The ids of the volumes whose records can't be read."""
        for name in self._names():
            try:
                self.find(name)
            except EbiError:
                yield name

    def _names(self) -> list[str]:
        return sorted(entry.name for entry in self.root.iterdir() if entry.is_dir()) if self.root.is_dir() else []

    def grow(self, volume: Volume, capacity: int, *, limit: int = 0) -> Volume:
        """Have `volume` be of at least `capacity` bytes, at most `limit` (0: no bound), its space reserved.

        It never shrinks. Raises OUT_OF_RANGE, EXHAUSTED.
        """
        wanted = max(volume.capacity, tables.round_up(capacity, GRAIN))
        if limit and wanted > limit:
            raise out_of_range(
                f"volume {volume.id} has {volume.capacity} bytes, {capacity} to {limit} are asked for",
                "a volume does not shrink; sizes are multiples of 4096 bytes",
            )
        if wanted == volume.capacity:
            return volume
        grown = replace(volume, capacity=wanted)
        grown.reserve()
        return self.save(grown)

    def save(self, volume: Volume, **changes: Any) -> Volume:
        """Keep `volume` with `changes`, on the disk when this returns."""
        changed = replace(volume, **changes)
        write_json(changed.directory / RECORD, changed.to_json())
        return changed
