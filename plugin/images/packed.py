"""What is in a gzip, xz or zstd file, as cloud images come, unpacked while it streams by.

No number in the file is believed: what comes out is handed on piece by piece, at most 1 MiB at a time, and the memory
that a file may ask for has a bound. Sources: RFC 1952 (gzip), the .xz file format 1.2, RFC 8878 (zstd).
"""

import lzma
import zlib
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Protocol

from plugin.errors import EbiError, invalid, unsupported

PIECE = 1 << 20  # bytes that come out at once
_SOME = 64 << 10  # bytes that go in at once
_MEMORY = 128 << 20  # bytes that unpacking may take: enough for xz -9 and zstd --long=27


class Packing(StrEnum):
    """How a file is packed."""

    NONE = ""
    GZIP = "gzip"
    XZ = "xz"
    ZSTD = "zstd"


_GZIP, _XZ, _ZSTD = b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"
_SKIPPED = tuple(bytes((0x50 + low, 0x2A, 0x4D, 0x18)) for low in range(16))  # frames of zstd that hold no content
_MARK = 6  # bytes that tell


def packing(head: bytes) -> Packing:
    """How the file is packed that begins with `head`."""
    if head.startswith(_GZIP):
        return Packing.GZIP
    if head.startswith(_XZ):
        return Packing.XZ
    return Packing.ZSTD if head.startswith((_ZSTD, *_SKIPPED)) else Packing.NONE


class Content:
    """The content of the file that comes in `pieces`, in pieces of 1 MiB, the last shorter; of another file as it is.

    As in `http.Download` an empty piece, there or here, says that all before it is void. `packing` and `name`, for
    messages, are those of the file. Iterating raises INVALID for a damaged file or one that is cut short, UNSUPPORTED
    for one that takes too much memory or is packed twice.
    """

    def __init__(self, pieces: Iterator[bytes], name: str) -> None:
        self.packing = Packing.NONE
        self._pieces, self._name = pieces, name

    def __iter__(self) -> Iterator[bytes]:
        again = True
        while again:
            try:
                yield from self._attempt()
                again = False
            except _Void:
                yield b""

    def _attempt(self) -> Iterator[bytes]:
        feed = _Feed(self._pieces)
        head = feed.first(_MARK)
        self.packing = packing(head)
        if self.packing is Packing.NONE:
            yield from _gathered(feed.rest())
            return
        first = True
        try:
            for piece in _gathered(_UNPACK[self.packing](feed)):
                if first and (inner := packing(piece)):
                    raise unsupported(f"{self._name} is packed twice: {inner} in {self.packing}", "unpack it once")
                first = False
                yield piece
        except _Damaged as damaged:
            raise invalid(
                f"the {self.packing} file of {self._name} is damaged: {damaged}", "is the file complete?"
            ) from damaged
        except _TooLarge as error:
            raise self._too_large() from error

    def _too_large(self) -> EbiError:
        return unsupported(
            f"the {self.packing} file of {self._name} needs more than {_MEMORY >> 20} MiB of memory to unpack",
            "pack it with a smaller dictionary or window",
        )


class _Void(Exception):
    """All that has come is void."""


class _Damaged(Exception):
    """What is wrong with the file."""


class _TooLarge(Exception):
    """Unpacking would take too much memory."""


class _Feed:
    """The packed bytes, taken in amounts that the format needs."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._have, self._at = b"", 0

    def first(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end, which are not taken."""
        while len(self._have) - self._at < count and (piece := self._next()):
            self._have, self._at = self._have[self._at :] + piece, 0
        return self._have[self._at : self._at + count]

    def some(self) -> bytes:
        """Some bytes, none at the end."""
        self.first(1)
        part = self._have[self._at : self._at + _SOME]
        self._at += len(part)
        return part

    def exactly(self, count: int) -> bytes:
        """`count` bytes, at most 128 KiB and a few. Raises _Damaged where there are no more."""
        part = self.first(count)
        if len(part) < count:
            raise _Damaged("it is cut short")
        self._at += count
        return part

    def back(self, count: int) -> None:
        """Give back the last `count` bytes of `some`."""
        self._at -= count

    def rest(self) -> Iterator[bytes]:
        """All that is left."""
        yield self._have[self._at :]
        while piece := self._next():
            yield piece

    def _next(self) -> bytes:
        """The next piece, none at the end."""
        piece = next(self._pieces, None)
        if piece == b"":
            raise _Void
        return piece or b""


class _Stream(Protocol):
    """What the decompressors of zlib and lzma have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, size: int, /) -> bytes: ...


def _gunzipped(feed: _Feed) -> Iterator[bytes]:
    yield from _streams(feed, lambda: zlib.decompressobj(wbits=31))


def _unxz(feed: _Feed) -> Iterator[bytes]:
    yield from _streams(feed, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY))


def _streams(feed: _Feed, new: Callable[[], _Stream]) -> Iterator[bytes]:
    """One stream after the other, to the end; zeros may follow, as padding."""
    while feed.first(1):
        stream, data = new(), feed.some()
        while True:
            try:
                plain = stream.decompress(data, PIECE)
            except lzma.LZMAError as error:
                if "Memory" in str(error):
                    raise _TooLarge from error
                raise _Damaged(str(error)) from error
            except zlib.error as error:
                raise _Damaged(str(error).partition("decompressing data: ")[2] or str(error)) from error
            yield plain
            if stream.eof:
                break
            # zlib hands back what it has not taken, lzma keeps it.
            data = getattr(stream, "unconsumed_tail", b"")
            if not data and getattr(stream, "needs_input", True):
                data = feed.some()
                if not data and not plain:
                    raise _Damaged("it is cut short")
        feed.back(len(stream.unused_data))
        _skip_padding(feed)


def _skip_padding(feed: _Feed) -> None:
    while (part := feed.some()) and not part.strip(b"\0"):
        pass
    feed.back(len(part.lstrip(b"\0")))


def _unzstd(feed: _Feed) -> Iterator[bytes]:
    """One frame after the other, block by block: none can hold more than 128 KiB, however small it is."""
    import zstandard  # noqa: PLC0415 - few files need it

    unpack = zstandard.ZstdDecompressor(max_window_size=_MEMORY)
    while feed.first(1):
        magic = feed.exactly(4)
        if magic in _SKIPPED:
            left = int.from_bytes(feed.exactly(4), "little")
            while left:
                left -= len(feed.exactly(min(left, _SOME)))
            continue
        if magic != _ZSTD:
            raise _Damaged("something else stands behind its end")
        frame = unpack.decompressobj()
        try:
            for part in _parts(feed):
                yield frame.decompress(magic + part)
                magic = b""
        except zstandard.ZstdError as error:
            if "memory" in str(error):
                raise _TooLarge from error
            raise _Damaged(str(error).rpartition(": ")[2]) from error
        if not frame.eof:
            raise _Damaged("a frame does not end where it should")


def _parts(feed: _Feed) -> Iterator[bytes]:
    """A frame's header without its magic number, its blocks, its checksum: section 3.1.1 of RFC 8878."""
    descriptor = feed.exactly(1)
    flags = descriptor[0]
    single = flags >> 5 & 1  # there is no window descriptor, but always a content size
    size = (single, 2, 4, 8)[flags >> 6]
    yield descriptor + feed.exactly(1 - single + (0, 1, 2, 4)[flags & 3] + size)
    last = False
    while not last:
        head = feed.exactly(3)
        number = int.from_bytes(head, "little")
        last, kind, length = bool(number & 1), number >> 1 & 3, number >> 3
        if kind == 3 or length > 128 << 10:
            raise _Damaged("it has a block of no known kind")
        yield head + feed.exactly(1 if kind == 1 else length)  # 1: a byte that is repeated
    if flags >> 2 & 1:
        yield feed.exactly(4)


_UNPACK: dict[Packing, Callable[[_Feed], Iterator[bytes]]] = {
    Packing.GZIP: _gunzipped,
    Packing.XZ: _unxz,
    Packing.ZSTD: _unzstd,
}


def _gathered(parts: Iterator[bytes]) -> Iterator[bytes]:
    """`parts` as pieces of 1 MiB, the last shorter."""
    buffer = bytearray()
    for part in parts:
        if len(part) == PIECE and not buffer:
            yield part
            continue
        buffer += part
        while len(buffer) >= PIECE:
            yield bytes(memoryview(buffer)[:PIECE])
            del buffer[:PIECE]
    if buffer:
        yield bytes(buffer)
