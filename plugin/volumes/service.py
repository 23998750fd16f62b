"""`Volumes`: every call on volumes, the controller's here, the node's handed on."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from plugin.errors import EbiError, exists, invalid, out_of_range, precondition
from plugin.findings import Finding
from plugin.host import dm, files
from plugin.host.lock import locked
from plugin.images import BackingImage, Images
from plugin.settings import Settings
from plugin.volumes import keys, names, parameters, reconcile, stats, tables
from plugin.volumes.capability import Capability
from plugin.volumes.node import Node
from plugin.volumes.parameters import VolumeParameters
from plugin.volumes.record import DATA, RECORD, Records, Volume

MIB = 1 << 20
CHUNK = 64 << 10
DEFAULT_CAPACITY = 1 << 30
_GRAIN = 4096  # capacities are whole sectors of the largest size
_XFS_LEAST = 300 * MIB


class Volumes:
    """The volumes kept in `root`, which start from `images`."""

    def __init__(self, root: Path, images: Images, settings: Settings) -> None:
        self._records = Records(root)
        self._images = images
        self._node = Node(self._records, images, settings)

    def create(
        self, name: str, capacity: int, given: Mapping[str, str], *, limit: int = 0, block: bool = False
    ) -> Volume:
        """Make the volume `name` of at least `capacity` bytes (0: a default), at most `limit` (0: no bound).

        Its space is reserved on the disk at once. The same call again returns the same volume. Raises EXISTS for
        another one of that name, INVALID, NOT_FOUND and PRECONDITION about the image, OUT_OF_RANGE, EXHAUSTED.
        """
        wanted = parameters.parse(given)
        volume = names.volume_id(name)
        with locked(self._records.directory(volume), f"volume {volume}"):
            found = self._records.find(volume)
            if found is not None:
                return _same(found, name, capacity, limit, wanted)
            try:
                with self._images.held(wanted.image) if wanted.image else nullcontext() as image:
                    size = _capacity(capacity, limit, wanted, image, block=block)
                    return self._make(volume, name, size, wanted, image)
            except BaseException:
                shutil.rmtree(self._records.directory(volume), ignore_errors=True)
                raise

    def _make(
        self,
        volume: str,
        name: str,
        capacity: int,
        wanted: VolumeParameters,
        image: BackingImage | None,
    ) -> Volume:
        record = Volume(
            id=volume,
            name=name,
            capacity=capacity,
            encrypted=wanted.encrypted,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            chunk=CHUNK,
            image=image.name if image else "",
            image_uuid=image.uuid if image else "",
            fs_type=wanted.fs_type,
            mkfs_options=wanted.mkfs_options,
            parameters=wanted.given,
            directory=self._records.directory(volume),
        )
        _reserve(record)
        return self._records.save(record)  # the record makes it exist: all else is there

    def delete(self, volume: str) -> None:
        """Destroy the volume's keys, then its data. An absent one is fine. Raises PRECONDITION while it is staged."""
        if not names.is_volume_id(volume) or not self._records.directory(volume).exists():
            return
        directory = self._records.directory(volume)
        with locked(directory, f"volume {volume}"):
            try:
                record = self._records.find(volume)
            except EbiError:  # a damaged one can be deleted all the same
                record = None
            if any(dm.find(name) for name in names.mappers(volume)):
                raise precondition(f"volume {volume} is staged on this node", "unstage it first")
            if record is None or record.encrypted:
                keys.destroy(directory / DATA)
            (directory / RECORD).unlink(missing_ok=True)
            files.sync_directory(directory)
            shutil.rmtree(directory)

    def get(self, volume: str) -> Volume:
        """The volume with this id. Raises NOT_FOUND."""
        return self._records.get(volume)

    def list(self) -> Sequence[Volume]:
        """All volumes, by id."""
        return [*self._records.every()]

    def using(self, image: str) -> Sequence[str]:
        """The ids of the volumes that start from the backing image named `image`, and of those that may: whose
        records can't be read.
        """
        known = [volume.id for volume in self._records.every() if volume.image == image]
        return [*known, *self._records.damaged()]

    def rekey(self, volume: str, old: Mapping[str, bytes], new: Mapping[str, bytes], *, keep_old: bool = False) -> None:
        """Change the volume's passphrase from the Secret data `old` to `new`; it may be staged meanwhile.

        The old or the new opens at every instant; after a kill, the same call again finishes. `keep_old` leaves the
        old one in. Raises NOT_FOUND, BUSY, INVALID where there is nothing to open or neither opens it, and
        PRECONDITION where the new one does not open the volume's image: one secret opens both.
        """
        with self._node.operation(volume):
            keys.change(self._node, self._records.get(volume), old, new, keep_old=keep_old)

    def locked_out(self, image: str, secret: Mapping[str, bytes]) -> Sequence[str]:
        """The ids of the volumes of the encrypted image `image` that the Secret data `secret` does not open.

        Costs a key derivation for each of its volumes.
        """
        damaged = set(self._records.damaged())
        return [
            volume
            for volume in self.using(image)
            if volume in damaged or not keys.opens(self._records.get(volume), secret)
        ]

    def free_bytes(self) -> int:
        """Bytes that new volumes can take, headers and metadata included."""
        directory = self._records.root
        while not directory.exists():
            directory = directory.parent
        space = os.statvfs(directory)
        return space.f_bavail * space.f_frsize

    def expand(self, volume: str, capacity: int, *, limit: int = 0) -> int:
        """Reserve the space for `capacity` bytes and say so in the record; the node's `node_expand` follows.

        Returns the capacity then, which is never less than before. Raises NOT_FOUND, OUT_OF_RANGE, EXHAUSTED.
        """
        with self._node.operation(volume):
            record = self._records.get(volume)
            wanted = max(record.capacity, tables.round_up(capacity, _GRAIN))
            if limit and wanted > limit:
                raise out_of_range(
                    f"volume {volume} has {record.capacity} bytes, {capacity} to {limit} are asked for",
                    "a volume does not shrink; sizes are multiples of 4096 bytes",
                )
            if wanted > record.capacity:
                grown = replace(record, capacity=wanted)
                _reserve(grown)
                self._records.save(grown)
            return wanted

    def stage(
        self,
        volume: str,
        staging: Path,
        capability: Capability,
        secrets: Mapping[str, str],
        context: Mapping[str, str],
    ) -> None:
        """Map the volume, and mount it at `staging` unless it is for raw use."""
        self._node.stage(volume, staging, capability, secrets, context)

    def unstage(self, volume: str, staging: Path) -> None:
        """Undo `stage`; what is not there is fine."""
        self._node.unstage(volume, staging)

    def publish(self, volume: str, staging: Path, target: Path, capability: Capability, readonly: bool) -> None:
        """Show the staged volume at `target`."""
        self._node.publish(volume, staging, target, capability, readonly)

    def unpublish(self, volume: str, target: Path) -> None:
        """Undo `publish`; what is not there is fine."""
        self._node.unpublish(volume, target)

    def node_expand(self, volume: str, path: Path, capacity: int) -> int:
        """Have the mapped volume at `path` take its present size; returns that in bytes."""
        return self._node.expand(volume, path, capacity)

    def stats(self, volume: str, path: Path) -> stats.Stats:
        """How full and how well the volume at `path` is. Raises NOT_FOUND."""
        return stats.stats(self._node, volume, path)

    def recover(self) -> None:
        """Clean up, or bring to its end, what a killed process left."""
        reconcile.recover(self._node)

    def watching(self) -> AbstractContextManager[None]:
        """Within the block, also when a device of ours vanishes without our doing."""
        return reconcile.watching(self._node)

    def examine(self) -> Sequence[Finding]:
        """What is wrong with the volumes, their devices and mounts."""
        return list(reconcile.examine(self._node))


def _same(found: Volume, name: str, capacity: int, limit: int, wanted: VolumeParameters) -> Volume:
    fits = found.capacity >= capacity and (not limit or found.capacity <= limit)
    if found.name != name or not fits or dict(found.parameters) != dict(wanted.given):
        raise exists(
            f"volume {found.id} exists with {found.capacity} bytes and parameters {json.dumps(dict(found.parameters))}",
            "delete it, or use another name",
        )
    return found


def _capacity(asked: int, limit: int, wanted: VolumeParameters, image: BackingImage | None, *, block: bool) -> int:
    if image is not None:
        _check_image(image, wanted)
    capacity = tables.round_up(asked or (image.virtual_size if image else DEFAULT_CAPACITY), _GRAIN)
    if limit and capacity > limit:
        raise out_of_range(
            f"a volume of {capacity} bytes exceeds the limit of {limit}", "sizes are multiples of 4096 bytes"
        )
    if image is not None and capacity < image.virtual_size:
        raise out_of_range(
            f"volume size should be larger than the backing image size: {capacity} bytes are asked for, and"
            f" {image.name} has {image.virtual_size}",
            f"ask for at least {image.virtual_size} bytes",
        )
    if image is None and not block and wanted.fs_type == "xfs" and capacity < _XFS_LEAST:
        raise out_of_range(f"{capacity} bytes are too few for xfs", f"ask for at least {_XFS_LEAST}, or for ext4")
    return capacity


def _check_image(image: BackingImage, wanted: VolumeParameters) -> None:
    if not image.ready:
        raise precondition(f"backing image {image.name} is not ready", "wait until it is; see ebi get backingimages")
    if image.encrypted != wanted.encrypted:
        have, ask = ("encrypted", "not encrypted") if image.encrypted else ("not encrypted", "encrypted")
        raise invalid(
            f"the volume is to be {ask}, but the backing image {image.name} is {have}",
            f'set encrypted: "{str(image.encrypted).lower()}", or use a clone of the image that fits',
        )
    spec = image.to_object()["spec"]
    other = (
        (wanted.image_source_type and wanted.image_source_type != spec.get("sourceType"))
        or (
            wanted.image_source_parameters is not None
            and dict(wanted.image_source_parameters) != dict(spec.get("sourceParameters") or {})
        )
        or (wanted.image_checksum and wanted.image_checksum != spec.get("checksum"))
    )
    if other:
        raise invalid(
            f"existing backing image {image.name} data source is different from the parameters in the creation"
            " request or StorageClass",
            "give the parameters that the image was made with, or none",
        )


def _reserve(record: Volume) -> None:
    """Have the volume's file there in its full size, on the disk, with every block its own."""
    fd = os.open(record.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    before = os.fstat(fd).st_size
    try:
        files.preallocate(fd, record.file_size, record.described)
        os.fsync(fd)
    except BaseException:
        os.ftruncate(fd, before)  # gives back what was reserved until the space ran out
        raise
    finally:
        os.close(fd)
