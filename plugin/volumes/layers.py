"""The layers that a volume's devices are made of. Each knows when a mapper of its name is the right one, and makes it.

Nothing is remembered: whether a mapper is right is asked of the kernel every time, by the devices under it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from plugin import events
from plugin.errors import EbiError, precondition, unavailable
from plugin.host import blockdev, dm, loop
from plugin.host.dm import Mapper
from plugin.host.files import Extent
from plugin.luks import mapping
from plugin.volumes import names, tables

log = logging.getLogger(__name__)

# struct disk_header of drivers/md/dm-snap-persistent.c: magic, valid, version, chunk size; 32 bits each, little-endian.
_SNAPSHOT_MAGIC = 0x70416E53
_VALID_AT = 4


class Backing(Protocol):
    """What a lowest layer stands on."""

    def is_under(self, mapper: Mapper) -> bool:
        """Whether `mapper` stands on this, and nothing else."""

    def opened(self) -> AbstractContextManager[Path]:
        """A block device of it, for as long as it takes to put a mapper on it."""

    def refresh(self, mapper: Mapper) -> None:
        """Have the block device under `mapper` take the present size."""


@dataclass(frozen=True)
class FileBacking:
    """A file, through a loop device that lives as long as the mapper on it.

    Only with `discards` does the file lose blocks by what is done to the device: see decision 072.
    """

    path: Path
    readonly: bool = False
    discards: bool = False

    def is_under(self, mapper: Mapper) -> bool:
        """By device and inode: a deleted file's namesake is another file."""
        return len(mapper.slaves) == 1 and all(loop.is_over(slave, self.path) for slave in mapper.slaves)

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """A new loop; for writing it goes past the page cache, which the filesystem above has already."""
        with loop.attached(
            self.path, readonly=self.readonly, direct_io=not self.readonly, discards=self.discards
        ) as device:
            yield device

    def refresh(self, mapper: Mapper) -> None:
        """Loops don't follow their files by themselves."""
        for slave in mapper.slaves:
            loop.set_capacity(slave)


@dataclass(frozen=True)
class DeviceBacking:
    """A block device that another system attaches."""

    path: Path

    def is_under(self, mapper: Mapper) -> bool:
        """By device number: after a new attachment the same path may name another device."""
        try:
            number = blockdev.number(self.path)
        except EbiError:
            return False
        return mapper.slaves == {blockdev.kernel_name(number)}

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """The device itself."""
        blockdev.number(self.path)
        yield self.path

    def refresh(self, mapper: Mapper) -> None:
        """Its size is its owner's business."""


class Layer(Protocol):
    """One mapper of the stack."""

    @property
    def name(self) -> str:
        """The mapper's name."""

    def fits(self, mapper: Mapper) -> bool:
        """Whether `mapper`, which has this layer's name, is over the right devices."""

    def make(self) -> None:
        """Make the mapper. What is below is there."""

    def grow(self) -> None:
        """Have the mapper, under running I/O, take the present size of what is below it, which has grown first."""


@dataclass(frozen=True)
class Crypt:
    """A LUKS2 device; `unlock` opens the block device that it is given under the layer's name."""

    name: str
    backing: Backing
    unlock: Callable[[Path], None]

    def fits(self, mapper: Mapper) -> bool:
        """Made by cryptsetup, over this backing."""
        return mapper.uuid.startswith("CRYPT-LUKS2-") and self.backing.is_under(mapper)

    def make(self) -> None:
        """Open it."""
        with self.backing.opened() as device:
            self.unlock(device)

    def grow(self) -> None:
        """Take all that the backing has now. Raises UNAVAILABLE when the device did not follow."""
        mapper = _there(self.name)
        self.backing.refresh(mapper)
        mapping.resize(self.name)


@dataclass(frozen=True)
class Linear:
    """The backing as it is, `size` bytes of it, or all."""

    name: str
    backing: Backing
    size: int = 0
    readonly: bool = False

    def fits(self, mapper: Mapper) -> bool:
        """Made by us, over this backing."""
        return mapper.uuid == dm.UUID_PREFIX + self.name and self.backing.is_under(mapper)

    def make(self) -> None:
        """Map it."""
        with self.backing.opened() as device, events.step("map"):
            dm.create(self.name, self._table(device), readonly=self.readonly)

    def grow(self) -> None:
        """Take all that the backing has now."""
        mapper = _there(self.name)
        self.backing.refresh(mapper)
        (slave,) = mapper.slaves
        dm.load(self.name, self._table(Path("/dev") / slave), readonly=self.readonly)
        dm.resume(self.name)

    def _table(self, device: Path) -> str:
        size = self.size or blockdev.size(device) // dm.SECTOR * dm.SECTOR
        return tables.linear(blockdev.number(device), size)


@dataclass(frozen=True)
class Base:
    """What the first `covered` bytes of the volume are until they are written: the image's data, zeros elsewhere.

    `opened` opens the image's mapper `image`, and nobody takes that away within it.
    """

    name: str
    image: str
    opened: Callable[[], AbstractContextManager[None]]
    extents: Callable[[], Sequence[Extent]]
    size: int
    covered: int

    def fits(self, mapper: Mapper) -> bool:
        """Over the image's device; an image of nothing but holes has none under it."""
        image = dm.find(self.image)
        below = {image.kernel_name} if image else set()
        return mapper.uuid == dm.UUID_PREFIX + self.name and (mapper.slaves == below or not self.extents())

    def make(self) -> None:
        """Open the image and map it, read-only."""
        with self.opened(), events.step("map"):
            dm.create(self.name, self._table(), readonly=True)

    def grow(self) -> None:
        """An image does not grow."""

    def _table(self) -> str:
        return tables.base(self.extents(), self.size, self.covered, _there(self.image).number)


@dataclass(frozen=True)
class Snapshot:
    """The volume: `covered` bytes of the base with what was written since from the store, and the rest from there, too.

    A `fresh` store is cleared first: dm-snapshot takes one whose first chunks read as zeros for a new one; what a new
    LUKS device shows is noise.
    """

    name: str
    base: str
    store: str
    covered: int
    capacity: int
    chunk: int
    fresh: bool = False

    def fits(self, mapper: Mapper) -> bool:
        """Over this base and this store."""
        below = {found.kernel_name for found in (dm.find(self.base), dm.find(self.store)) if found}
        return mapper.uuid == dm.UUID_PREFIX + self.name and mapper.slaves == below and len(below) == 2

    def make(self) -> None:
        """Map it."""
        with events.step("map"):
            if self.fresh:
                blockdev.zero(dm.path(self.store), max(2 * self.chunk, blockdev.MIB))
            else:
                _revalidate(dm.path(self.store))
            dm.create(self.name, self._table())

    def grow(self) -> None:
        """Take the present capacity."""
        dm.clear(self.name)  # what was cut short has left its table, and exceptions are handed over to one only
        dm.load(self.name, self._table())
        # They are handed over when nothing runs.
        dm.suspend(self.name)
        dm.resume(self.name)

    def _table(self) -> str:
        base, store = _there(self.base).number, _there(self.store).number
        return tables.snapshot(base, store, self.covered, self.capacity, self.chunk)


def readonly(volume: str) -> Linear:
    """The raw device of `volume` as one that can't be written."""
    return Linear(names.readonly(volume), DeviceBacking(dm.path(names.top(volume))), readonly=True)


def is_right(layer: Layer, mapper: Mapper | None) -> bool:
    """Whether `mapper` is there, in force, and over the right devices. Without a size its table was only loaded."""
    return mapper is not None and mapper.size > 0 and layer.fits(mapper)


def ensure(layer: Layer) -> bool:
    """Have the layer's mapper there, right and running; True if it was made for that."""
    mapper = dm.find(layer.name)
    if mapper is not None and is_right(layer, mapper):
        if mapper.suspended:  # a resize was cut short
            dm.resume(layer.name)
        return False
    dm.remove(layer.name)
    layer.make()
    return True


def _revalidate(store: Path) -> None:
    """Have a store that dm-snapshot has given up taken again. Raises PRECONDITION for one without its header.

    dm-snapshot would take that for a new one, and begin it anew over the data.

    After an I/O error it marks the store invalid, since its origin goes on to change. Ours never does, so that every
    exception that was written is as good as before: what was lost is the write that failed, as on any other disk.
    """
    magic, valid = blockdev.read_words(store, 2)
    if magic != _SNAPSHOT_MAGIC:
        raise precondition(
            f"{store} has lost the header of its snapshot store",
            "restore the volume from a backup; nothing was changed",
        )
    if not valid:
        log.warning("%s was given up after an I/O error; it is taken into use again", store)
        blockdev.write(store, _VALID_AT, (1).to_bytes(4, "little"))


def _there(name: str) -> Mapper:
    mapper = dm.find(name)
    if mapper is None:
        raise unavailable(f"the device {name} has vanished", "stage the volume again")
    return mapper
