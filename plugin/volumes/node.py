"""The node's side: a volume is staged (mapped, its filesystem mounted), grown, and taken down again.

Each call first looks at what is there and does only what is missing, so that one cut short is finished by the next.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from plugin import events
from plugin.errors import EbiError, exists, not_found, precondition
from plugin.host import blockdev, dm, mounts
from plugin.host.lock import locked
from plugin.images.image import BackingImage
from plugin.images.store import Images
from plugin.luks import header
from plugin.settings import Settings
from plugin.volumes import assemble, attached, filesystem, group, layers, names, parameters, paths, usage
from plugin.volumes.assemble import Keys
from plugin.volumes.attached import Attached
from plugin.volumes.capability import Capability
from plugin.volumes.record import STAGING, Records, Volume
from plugin.volumes.stack import Stack, take_down

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """Stages the volumes of `records`, and devices that another system attaches."""

    records: Records
    images: Images
    settings: Settings

    @property
    def roots(self) -> tuple[Path, ...]:
        """The directories that hold our files, as the kernel names them."""
        return self.records.root.resolve(), self.images.root.resolve()

    @contextmanager
    def operation(self, volume: str) -> Iterator[None]:
        """The only operation on the volume. Raises BUSY, and NOT_FOUND for what can't be an id."""
        directory = self.records.directory(volume)
        with locked(directory, f"volume {volume}"):
            try:
                yield
            finally:
                # A volume of another system has nothing here but the lock.
                if directory.exists() and not any(directory.iterdir()):
                    directory.rmdir()

    def staging_path(self, volume: str, path: Path) -> Path:
        """`path` checked: one to mount at, or this driver's own for an ephemeral volume. Raises INVALID."""
        if path == self.records.directory(volume) / STAGING:
            return paths.checked(path, "staging path")
        return paths.usable(path, "staging path", self.settings)

    def stage(
        self,
        volume: str,
        staging: Path,
        capability: Capability,
        secrets: Mapping[str, str],
        context: Mapping[str, str],
    ) -> None:
        """Map the volume, and mount its filesystem at `staging` unless it is for raw use."""
        staging = self.staging_path(volume, staging)
        capability.check()
        with self.operation(volume):
            if not self._is_staged(volume, staging, capability):
                record = self.records.find(volume)
                if record is not None:
                    self._stage_ours(record, staging, capability, secrets)
                else:
                    self._stage_attached(volume, staging, capability, secrets, context)
            staged = mounts.at(staging)
            if staged is not None and not staged.readonly and not capability.reads_only:
                group.give(staging, capability.group)

    def _is_staged(self, volume: str, staging: Path, capability: Capability) -> bool:
        found = mounts.at(staging)
        if capability.block:
            mounted = usage.filesystems(volume)
            if mounted:
                raise exists(
                    f"volume {volume} is staged as a filesystem at {mounted[0].target}",
                    "unstage it before using it raw",
                )
            return False  # its stack says the rest
        if usage.devices(volume):
            raise exists(f"volume {volume} is staged as a raw device", "unstage it before mounting it")
        if found is None:
            return False
        if not usage.is_filesystem(found, volume):
            raise exists(f"{staging} has {found.source} mounted, not volume {volume}", "unmount that first")
        if dm.find(names.top(volume)) is None or not self._stands(volume):
            log.warning("unmounting %s: the device of volume %s is gone, or another one now", staging, volume)
            mounts.unmount(staging)
            return False
        if capability.fs_type not in ("", found.fs_type) or ("ro" in capability.options) != ("ro" in found.options):
            raise exists(
                f"volume {volume} is staged at {staging} with another capability: {found.fs_type},"
                f" {','.join(sorted(found.options))}",
                "unstage it first",
            )
        return True

    def _stands(self, volume: str) -> bool:
        """Whether a volume of another system stands on the device that is attached now. Raises NOT_FOUND for none."""
        return self.records.find(volume) is not None or self.stack(volume).is_right()

    def _stage_ours(
        self,
        record: Volume,
        staging: Path,
        capability: Capability,
        secrets: Mapping[str, str],
    ) -> None:
        image = self.image(record)
        if image is not None:
            self.images.raw(image.name)  # a compressed one has to be unpacked before it can be a device
        self._reserve_again(record)
        if not record.formatted:
            take_down(names.mappers(record.id))  # half made by one that was cut short, under who knows which key
        stack = assemble.volume(record, image, Keys(secrets, record.described), block=capability.block)
        with stack.built():
            device = dm.path(stack.top)
            if not record.formatted:
                if image is None and not capability.block:
                    fs_type = capability.fs_type or record.fs_type or "ext4"
                    filesystem.make(device, fs_type, record.mkfs_options)
                blockdev.flush(device)
                record = self.records.save(record, formatted=True)
            if not capability.block:
                wanted = capability.fs_type or record.fs_type
                self._mount(record.id, staging, wanted, capability.options)

    def _reserve_again(self, record: Volume) -> None:
        record.check_file()
        if dm.find(names.top(record.id)):  # staged elsewhere, so it was looked at
            return
        if parameters.flags(record.parameters).discards or record.is_reserved:
            return
        # Somebody has punched holes, through the raw device or from outside. The data is whole all the same.
        log.warning("%s has lost blocks that were reserved for it", record.described)
        try:
            record.reserve()
        except EbiError as error:
            log.warning("%s", error)

    def _stage_attached(
        self,
        volume: str,
        staging: Path,
        capability: Capability,
        secrets: Mapping[str, str],
        context: Mapping[str, str],
    ) -> None:
        device = self._device(volume)
        if device is None:
            raise not_found(f"volume {volume} does not exist", "see ebi get volumes, or is its device attached here?")
        found = Attached(volume, device, attached.parse(context), attached.Marks(self.records.root.parent / "attached"))
        stack = found.stack(Keys(secrets, found.owner), block=capability.block)
        with stack.built():
            found.finish(dm.path(stack.top), capability)
            if not capability.block:
                self._mount(volume, staging, capability.fs_type, capability.options)

    def _mount(self, volume: str, staging: Path, wanted: str, options: tuple[str, ...]) -> None:
        device, owner = dm.path(names.top(volume)), f"volume {volume}"
        if not staging.is_dir():
            raise not_found(f"there is no staging directory {staging}", "the orchestrator makes it")
        found = filesystem.find(device, wanted, owner)
        if usage.filesystems(volume):  # at another path, in use: nothing to check or to grow
            filesystem.mount(device, staging, found.type, options, owner)
            return
        filesystem.check(device, found.type, owner)
        short = "ro" not in options and filesystem.is_short(device)
        filesystem.mount(device, staging, found.type, options, owner)
        try:
            if short:
                with events.step("grow"):
                    filesystem.grow(device, found.type, staging)
        except BaseException:
            mounts.unmount(staging)
            raise

    def unstage(self, volume: str, staging: Path) -> None:
        """Unmount the volume from `staging` and take its devices away; what is not there is fine."""
        staging = paths.checked(staging, "staging path")
        with self.operation(volume):
            published = usage.published(volume, staging)
            if published:
                raise precondition(
                    f"volume {volume} is still published at {', '.join(map(str, sorted(published)))}",
                    "unpublish it first",
                )
            found = mounts.at(staging)
            if found is not None and usage.is_filesystem(found, volume):
                with events.step("unmount"):
                    mounts.unmount(staging)
            take_down(names.mappers(volume))

    def expand(self, volume: str, path: Path, capacity: int, limit: int) -> int:
        """Have the volume be of at least `capacity` bytes, and its devices and filesystem take its size; returns that.

        The space is reserved here where no controller has done it: see decision 041.
        """
        with self.operation(volume):
            self.must_exist(volume)
            shown = {mount.target: mount for mount in usage.filesystems(volume) + usage.devices(volume)}
            mapper = dm.find(names.top(volume))
            where = mounts.canonical(path)
            if mapper is None or (shown and where not in shown):
                raise not_found(f"volume {volume} is not at {path}", "stage and publish it first")
            record = self.records.find(volume)
            if record is not None:
                record = self.records.grow(record, capacity, limit=limit)
            stack = self.stack(volume)
            wanted = record.capacity if record is not None else self._attached_size(volume, mapper, capacity)
            writable = next((mount for mount in usage.filesystems(volume) if not mount.readonly), None)
            with events.step("grow"):
                stack.grow(wanted)
                if dm.find(names.readonly(volume)):
                    layers.readonly(volume).grow()
                if writable is not None:
                    filesystem.grow(mapper.path, writable.fs_type, writable.target)
            return max(wanted, capacity) or blockdev.size(mapper.path)

    def _attached_size(self, volume: str, mapper: dm.Mapper, capacity: int) -> int:
        """Bytes of the mapper of an attached device of `capacity` bytes: a LUKS2 header takes its part."""
        device = self._device(volume)
        if device is None or not mapper.uuid.startswith("CRYPT-"):
            return capacity
        return max(0, capacity - header.read(device).payload_offset)

    def stack(self, volume: str) -> Stack:
        """The volume's stack, for looking at it and growing it; it holds no secret. Raises NOT_FOUND."""
        record = self.records.find(volume)
        none = Keys({}, f"volume {volume}")
        if record is not None:
            return assemble.volume(record, self.image(record), none)
        device = self._device(volume)
        if device is None:
            raise not_found(f"volume {volume} does not exist", "see ebi get volumes")
        mapper = dm.find(names.top(volume))
        return assemble.mapped(volume, device, none, encrypted=mapper is not None and mapper.uuid.startswith("CRYPT-"))

    def must_exist(self, volume: str) -> None:
        """Raise NOT_FOUND for a volume that is neither ours, nor attached, nor mapped."""
        if self.records.find(volume) is None and not self.has_device(volume) and not dm.find(names.top(volume)):
            raise not_found(f"volume {volume} does not exist", "see ebi get volumes")

    def has_device(self, volume: str) -> bool:
        """Whether another system has attached the volume's device here."""
        return self._device(volume) is not None

    def _device(self, volume: str) -> Path | None:
        if not self.settings.device_template or not names.is_volume_id(volume):
            return None
        path = Path(self.settings.device_template.format(volume=volume))
        try:
            blockdev.number(path)
        except EbiError:
            return None
        return path

    def image(self, record: Volume) -> BackingImage | None:
        """The image that the volume starts from, if any. Raises NOT_FOUND, and PRECONDITION for its namesake."""
        if not record.image:
            return None
        image = self.images.get(record.image)
        if image.uuid != record.image_uuid:
            raise precondition(
                f"backing image {record.image} is not the one that {record.described} was made from",
                f"the volume needs the image with uuid {record.image_uuid}",
            )
        return image
