"""A disk that lies in a file byte for byte, plain or as the payload of a LUKS2 device."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from plugin.host.files import Extent, data_extents, read_exactly
from plugin.images import extents
from plugin.luks.payload import Cipher


class Source(Protocol):
    """Where a copy reads: a disk of `size` bytes."""

    size: int

    def extents(self) -> Iterator[Extent]:
        """Its data runs, in order; everything else reads as zeros."""

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the disk's bytes from `offset` on. Raises INVALID when they can't be had."""

    def description(self) -> dict[str, Any]:
        """What another process makes the same source of, the file descriptors inherited. It may hold a key."""


@dataclass(frozen=True)
class CipherSpec:
    """A payload's cipher with its key."""

    name: str
    key: bytes = field(repr=False)
    sector_size: int

    def make(self) -> Cipher:
        """The cipher. Raises UNSUPPORTED for one that is not known."""
        return Cipher(self.name, self.key, self.sector_size)

    def description(self) -> dict[str, Any]:
        """For another process; holds the key."""
        return {"name": self.name, "key": self.key.hex(), "sector_size": self.sector_size}

    @classmethod
    def restored(cls, value: Mapping[str, Any] | None) -> "CipherSpec | None":
        """The inverse of `description`."""
        return cls(value["name"], bytes.fromhex(value["key"]), value["sector_size"]) if value else None


class Disk:
    """A disk of `size` bytes that lies in the open file `fd` from `base` on, ciphered where there is a `cipher`.

    `sealed` says that it is a payload whose key is not known: its extents can be told, its bytes can't.
    """

    def __init__(
        self, fd: int, size: int, base: int = 0, cipher: CipherSpec | None = None, *, sealed: bool = False
    ) -> None:
        self.size = size
        self._fd, self._base, self._spec, self._sealed = fd, base, cipher, sealed
        self._cipher = cipher.make() if cipher else None

    def extents(self) -> Iterator[Extent]:
        """As the filesystem tells them; of a payload, whatever is not zeros in the file."""
        if self._spec or self._sealed:
            yield from extents.rebuilt(self._fd, self._base, self.size)
        else:
            yield from data_extents(self._fd, self._base, self._base + self.size)

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`; of a payload, whole sectors only, and one of zeros, which can only be a hole, gives zeros."""
        assert not self._sealed
        read_exactly(self._fd, buffer, self._base + offset)
        if self._cipher:
            holes = list(self._holes(buffer, self._cipher.sector_size))
            self._cipher.decrypt(buffer, offset)
            for hole in holes:
                buffer[hole] = bytes(hole.stop - hole.start)

    @staticmethod
    def _holes(buffer: memoryview, size: int) -> Iterator[slice]:
        zeros = bytes(size)
        for at in range(0, len(buffer), size):
            if buffer[at] == 0 and buffer[at : at + size] == zeros:
                yield slice(at, at + size)

    def description(self) -> dict[str, Any]:
        """For another process."""
        cipher = self._spec.description() if self._spec else None
        return {"kind": "disk", "fd": self._fd, "size": self.size, "base": self._base, "cipher": cipher}

    @classmethod
    def restored(cls, value: Mapping[str, Any]) -> "Disk":
        """The inverse of `description`."""
        return cls(value["fd"], value["size"], value["base"], CipherSpec.restored(value["cipher"]))
