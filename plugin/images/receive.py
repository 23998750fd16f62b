"""A file that comes in pieces, written as it comes: unpacked where it is packed, hashed beside, zeros left out."""

import hashlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from plugin.host.files import Extent, start_writing
from plugin.images.http import Download
from plugin.images.packed import Content, Packing
from plugin.images.progress import Reporter
from plugin.images.space import Room
from plugin.images.sums import Sum
from plugin.images.target import Target, TargetSpec

_LOOK_SECONDS = 0.2
_END_SECONDS = 1.0
_AHEAD = 2  # pieces that wait to be hashed


@dataclass(frozen=True)
class Received:
    """What has come: the SHA-512 of the file as it came, empty if not asked for; how it was packed; what was written.

    The last are the checksums of what stands in the file now.
    """

    digest: str
    packing: Packing
    sums: list[Sum] = field(default_factory=list)


def receive(found: Download, path: Path, fd: int, owner: str, report: Reporter, *, hashed: bool) -> Received:
    """Write the content of `found` into the empty file `path`, open as `fd`; nothing is synced.

    Its space is claimed before: all of it where the size is told, else as it grows. Raises what `found`, `Content` and
    `Room` do, and CANCELLED when the image is deleted, be it while nothing comes.
    """
    incoming = _Incoming(found, report, hashed=hashed)
    target, at, room = Target(TargetSpec(fd, -1, 0, None, sparse=True)), 0, Room(path, fd, owner)
    sums: list[Sum] = []
    with closing(incoming.pieces()) as pieces:
        content = Content(pieces, owner)
        for piece in content:
            if not piece:
                os.ftruncate(fd, 0)
                at, sums, room.used = 0, [], 0
                continue
            if at == 0 and content.packing is Packing.NONE:
                room.cover(min(size for size in (found.size or 0, found.allocated) if size is not None))
            room.cover(room.used + len(piece))
            written = target.write(memoryview(piece), at)
            room.used += sum(item.length for item in written)
            sums += written
            start_writing(fd, Extent(at, len(piece)))
            at += len(piece)
            report.tick()
    os.ftruncate(fd, at)
    return Received(incoming.digest(), content.packing, sums)


class _Incoming:
    """The pieces of `found`, reported and hashed on their way."""

    def __init__(self, found: Download, report: Reporter, *, hashed: bool) -> None:
        self._found, self._report, self._hashed = found, report, hashed
        self._digest = hashlib.sha512()

    def pieces(self) -> Generator[bytes, None, None]:
        """As they come; an empty one: see `Download`."""
        begun = False
        with ThreadPoolExecutor(1) as hasher, closing(ahead(self._found, self._report.tick)) as coming:
            hashing: deque[Future[None]] = deque()
            for piece in coming:
                while len(hashing) > (_AHEAD if piece else 0):  # memory stays bounded
                    hashing.popleft().result()
                if not piece:
                    self._digest, begun = hashlib.sha512(), False
                    self._report.advance(-self._report.done)
                elif self._hashed:
                    hashing.append(hasher.submit(self._digest.update, piece))
                if piece and not begun:
                    self._report.expect(self._found.size or 0)
                    begun = True
                yield piece
                self._report.advance(len(piece))

    def digest(self) -> str:
        """The SHA-512 of what came, all of which must have been taken."""
        return self._digest.hexdigest() if self._hashed else ""


def ahead(found: Download, tick: Callable[[], None]) -> Generator[bytes, None, None]:
    """The pieces of `found`, taken by a thread that is one ahead; `tick` is called now and then while none comes.

    So what `tick` raises ends the wait for a server that has fallen silent, or for a pipe.
    """
    taken: queue.Queue[bytes | BaseException | None] = queue.Queue(1)
    ended = threading.Event()
    thread = threading.Thread(target=_take, args=(found.pieces, taken, ended), name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = taken.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                tick()
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()
        with suppress(queue.Empty):  # it may stand there with a piece in its hand
            taken.get_nowait()
        found.stop()
        thread.join(_END_SECONDS)  # nothing can wake one that waits for a pipe


def _take(pieces: Iterator[bytes], taken: "queue.Queue[bytes | BaseException | None]", ended: threading.Event) -> None:
    try:
        for piece in pieces:
            taken.put(piece)
            if ended.is_set():
                return
        taken.put(None)
    except BaseException as error:  # for whoever takes the pieces
        taken.put(error)
