"""`Volumes`: every call on volumes, the controller's here, the node's handed on."""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from plugin import findings
from plugin.errors import EbiError, Kind, invalid, precondition
from plugin.findings import Finding
from plugin.host import dm, files, mounts
from plugin.host.lock import is_locked, locked
from plugin.images.image import BackingImage
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import ephemeral, fit, keys, names, parameters, paths, publish, reconcile, stats, tables, usage
from plugin.volumes.capability import Capability
from plugin.volumes.disks import Disks
from plugin.volumes.node import Node
from plugin.volumes.ondemand import OnDemand
from plugin.volumes.parameters import VolumeParameters
from plugin.volumes.record import DATA, RECORD, Records, Volume

log = logging.getLogger(__name__)

MIB = 1 << 20
CHUNK = 256 << 10


class Volumes:
    """The volumes kept in `root`, which start from `images`; images are exported from their `disks`."""

    def __init__(self, root: Path, images: Images, settings: Settings) -> None:
        self._records = Records(root)
        self._images = images
        self._settings = settings
        self._node = Node(self._records, images, settings)
        self.disks = Disks(self._node)
        self._on_demand = OnDemand(images, self.disks)
        images.users = self.using

    def create(
        self,
        name: str,
        capacity: int,
        given: Mapping[str, str],
        *,
        limit: int = 0,
        block: bool = False,
        fs_type: str = "",
        target: str = "",
    ) -> Volume:
        """Make the volume `name` of at least `capacity` bytes (0: a default), at most `limit` (0: no bound).

        Its space is reserved on the disk at once. It is for raw `block` use, or for a filesystem of the type `fs_type`,
        where that is known. `target` is that of an inline volume. The same call again returns
        the same volume. Raises EXISTS for another one of that name, INVALID, NOT_FOUND and PRECONDITION about the
        image, UNAVAILABLE while that is being made, OUT_OF_RANGE, EXHAUSTED.
        """
        wanted = parameters.parse(given)
        volume = names.volume_id(name)
        if wanted.image and self._records.find(volume) is None:
            self._on_demand.provide(wanted)
        with locked(self._records.directory(volume), f"volume {volume}"):
            found = self._records.find(volume)
            if found is not None:
                return fit.same(found, wanted, name=name, capacity=capacity, limit=limit, target=target)
            if wanted.ignored:
                log.info("volume %s: these parameters have no effect here: %s", volume, ", ".join(wanted.ignored))
            try:
                with self._images.held(wanted.image) if wanted.image else nullcontext() as image:
                    size = fit.capacity(wanted, image, asked=capacity, limit=limit, block=block, fs_type=fs_type)
                    record = self._described(name, size, wanted, image)
                    return self._make(replace(record, ephemeral=target))
            except BaseException:
                shutil.rmtree(self._records.directory(volume), ignore_errors=True)
                raise

    def _described(self, name: str, capacity: int, wanted: VolumeParameters, image: BackingImage | None) -> Volume:
        volume = names.volume_id(name)
        covered = min(tables.round_up(image.virtual_size, CHUNK), capacity) if image else 0
        return Volume(
            id=volume,
            name=name,
            capacity=capacity,
            encrypted=wanted.encrypted,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            chunk=CHUNK,
            image=image.name if image else "",
            image_uuid=image.uuid if image else "",
            covered=covered,
            fs_type=wanted.fs_type,
            mkfs_options=wanted.mkfs_options,
            parameters=wanted.given,
            directory=self._records.directory(volume),
        )

    def _make(self, record: Volume) -> Volume:
        record.reserve()
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
            return self._records.grow(self._records.get(volume), capacity, limit=limit).capacity

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
        publish.publish(self._node, volume, staging, target, capability, readonly=readonly)

    def publish_ephemeral(
        self,
        volume: str,
        target: Path,
        capability: Capability,
        *,
        readonly: bool,
        secrets: Mapping[str, str],
        context: Mapping[str, str],
    ) -> None:
        """Make, stage and publish the inline volume that `context` describes; should that fail, nothing of it stays."""
        target = paths.usable(target, "target path", self._settings)
        capability.check()
        if capability.block:
            raise invalid(f"the inline volume {volume} can't be a raw device", "use a generic ephemeral volume")
        size, parameters = ephemeral.request(context)
        record = self.create(volume, size, parameters, target=str(target))
        try:
            record.staging.mkdir(mode=0o700, exist_ok=True)
            self._node.stage(record.id, record.staging, capability, secrets, {})
            publish.publish(self._node, record.id, record.staging, target, capability, readonly=readonly)
        except EbiError as error:
            if error.kind is not Kind.BUSY and not usage.published(record.id, record.staging):
                self._remove_ephemeral(record)
            raise

    def unpublish(self, volume: str, target: Path) -> None:
        """Undo `publish`; what is not there is fine. An ephemeral volume goes with it."""
        publish.unpublish(self._node, volume, target)
        try:
            record = self._records.find(volume)
        except EbiError:  # a damaged record keeps nobody from unpublishing
            return
        if record is not None and record.ephemeral == str(mounts.canonical(target)):
            self._remove_ephemeral(record)

    def _remove_ephemeral(self, record: Volume) -> None:
        self._node.unstage(record.id, record.staging)
        self.delete(record.id)

    def node_expand(self, volume: str, path: Path, capacity: int, *, limit: int = 0) -> int:
        """Have the mapped volume at `path` be of at least `capacity` bytes, and take its size; returns that in bytes.

        Raises NOT_FOUND, OUT_OF_RANGE, EXHAUSTED, UNAVAILABLE where a device did not follow.
        """
        return self._node.expand(volume, path, capacity, limit)

    def stats(self, volume: str, path: Path) -> stats.Stats:
        """How full and how well the volume at `path` is. Raises NOT_FOUND."""
        return stats.stats(self._node, volume, path)

    def stop(self) -> None:
        """End what goes on in the background; nothing new is begun."""
        self._on_demand.stop()

    def recover(self) -> None:
        """Clean up, or bring to its end, what a killed process left."""
        reconcile.recover(self._node)
        findings.repair(list(self._forgotten()))

    def watching(self) -> AbstractContextManager[None]:
        """Within the block, also when a device of ours vanishes without our doing."""
        return reconcile.watching(self._node)

    def examine(self) -> Sequence[Finding]:
        """What is wrong with the volumes, their devices and mounts."""
        return [*reconcile.examine(self._node), *self._forgotten()]

    def _forgotten(self) -> Iterator[Finding]:
        for volume in self._records.every():
            if ephemeral.is_forgotten(volume) and not is_locked(volume.directory):
                text = f"its pod has gone, and nobody will unpublish it at {volume.ephemeral}"
                remove = partial(self._remove_ephemeral, volume)
                yield Finding(
                    "forgotten", f"inline volume {volume.id}", text, "ebi doctor --fix removes it", remove, safe=True
                )
