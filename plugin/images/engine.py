"""The copy engine: one disk into another, by worker processes that each take the next piece that is left.

Processes, since the threads of one interpreter do not scale at ciphering. One is started, and the others are its forks,
so that Python starts once for all. They get the keys by a standard input, and the open files and their work from a
socket that they share. Reading, ciphering and writing overlap between them, and the disk works while they do, since
they write past the page cache where the filesystem lets them.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from plugin.errors import EbiError, Kind
from plugin.host.files import Extent
from plugin.host.run import environment
from plugin.images import extents
from plugin.images.disk import Source
from plugin.images.sums import Sum
from plugin.images.target import LONGEST_MESSAGE, PIECE, TargetSpec

log = logging.getLogger(__name__)

_MOST_WORKERS = 8
_AHEAD = 2  # pieces a worker that are handed out: one at work, one to go on with
_ROOT = Path(__file__).parents[2]


def copy(
    source: Source,
    target: TargetSpec | None,
    runs: list[Extent],
    *,
    workers: int = 0,
    team: "Team | None" = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Sum]:
    """Copy `runs` of `source` into `target`; returns what was not all zeros, which alone was written, in order.

    A dense target gets all of `runs`; with no target they are read only, and the checksums are of what the source
    has there. `advance` is called with bytes as they are done; what it raises ends the copy.
    `workers`: 0 for one a core and one more; `team`: one that was started before, and is gone afterwards. Nothing is
    synced. Raises what a worker met, and INTERNAL when one died.
    """
    if not runs:
        return []
    # One more than there are cores, for the disk's sake: a worker that writes or reads ciphers nothing.
    wanted = workers or min(len(os.sched_getaffinity(0)) + 1, _MOST_WORKERS)
    count = max(1, min(wanted, -(-extents.total(runs) // PIECE)))
    origin = source.description()
    job: dict[str, object] = {
        "source": origin,
        "target": target.description() if target else None,
        "workers": count,
    }
    fds = ({*_fds(origin)} | ({target.fd, target.direct} if target else set())) - {-1}
    with team or Team() as at_work:
        at_work.begin(job, sorted(fds))
        return _drive(at_work, _pieces(runs), _AHEAD * count, advance)


def _fds(description: Mapping[str, Any]) -> Iterator[int]:
    """The file descriptors in the description of a source, which may be made of others."""
    for key, value in description.items():
        if key == "fd":
            yield value
        elif isinstance(value, Mapping):
            yield from _fds(value)


def _pieces(runs: Iterable[Extent]) -> Iterator[list[tuple[int, int]]]:
    """Lists of (start, length), each list of at most one piece's bytes in all; longer runs cut at its multiples."""
    piece: list[tuple[int, int]] = []
    size = 0
    for run in runs:
        at = run.start
        while at < run.end:
            # What fits a piece stays whole: a checksum that is looked for again is of the very same bytes.
            upto = run.end if run.length <= PIECE else min((at // PIECE + 1) * PIECE, run.end)
            length = upto - at
            if size + length > PIECE:
                yield piece
                piece, size = [], 0
            piece.append((at, length))
            at, size = at + length, size + length
    if piece:
        yield piece


def _drive(
    team: "Team", pieces: Iterator[list[tuple[int, int]]], most: int, advance: Callable[[int], None]
) -> list[Sum]:
    """Have the team do all pieces, `most` of them handed out at a time."""
    written: list[Sum] = []
    pending, piece = 0, next(pieces, None)
    while piece or pending:
        while piece and pending < most and team.give(piece):
            pending, piece = pending + 1, next(pieces, None)
        done, sums = team.take()
        pending -= 1
        written += sums
        advance(done)
    return sorted(written, key=lambda item: item.start)


class Team:
    """The worker processes, and the socket to all of them: each message is for one, or from one.

    Their Python starts at once, and waits to be told to `begin`. None is left when the block ends, be it by an
    exception, for which they are killed.
    """

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # -P: no module is taken from the directory that the caller happens to be in.
        command = [sys.executable, "-sP", "-m", "plugin.images.worker", str(theirs.fileno()), str(os.getpid())]
        with theirs:
            # A group of its own: an interrupt at the terminal is for us, and we end the workers.
            self._leader = subprocess.Popen(
                command,
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),), env=environment({"PYTHONPATH": str(_ROOT)}), process_group=0,
            )  # fmt: skip
        assert self._leader.stdin and self._leader.stderr
        self._stdin, self._stderr = self._leader.stdin, self._leader.stderr

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._socket.fileno() < 0:  # a block within this one has ended it
            return
        if kind:
            self._kill()
        with suppress(BrokenPipeError):
            self._stdin.close()
        self._socket.close()
        self._leader.wait()
        self._stderr.close()

    def begin(self, job: Mapping[str, object], fds: Sequence[int]) -> None:
        """Tell them what is to be done, with the open files `fds`, which have these numbers in the `job`."""
        with suppress(BrokenPipeError, ConnectionResetError), self._stdin:  # where it died, `take` will tell
            socket.send_fds(self._socket, [json.dumps(fds).encode()], fds)
            self._stdin.write(json.dumps(job).encode())

    def give(self, piece: list[tuple[int, int]]) -> bool:
        """Hand out one more piece; False where the socket is full."""
        try:
            self._socket.send(json.dumps(piece).encode(), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            pass  # their last words, or their end, come with `take`
        return True

    def take(self) -> tuple[int, list[Sum]]:
        """Wait until a piece is done: its bytes, and what was written. Raises what a worker met."""
        answer = json.loads(self._received() or "null")
        if answer is None:
            raise self._died(self._leader.wait())
        if "died" in answer:
            raise self._died(answer["died"])
        if "message" in answer:
            raise EbiError(answer["message"], kind=Kind[answer["kind"]], hint=answer["hint"])
        return answer["done"], [Sum(*item) for item in answer["written"]]

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._leader.pid, signal.SIGKILL)
        self._leader.wait()
        while self._received():  # the end comes with that of the last of them
            continue

    def _received(self) -> bytes:
        try:
            return self._socket.recv(LONGEST_MESSAGE)
        except ConnectionResetError:  # they ended with work before them; what they said until then is still there
            return self._socket.recv(LONGEST_MESSAGE)

    def _died(self, status: int) -> EbiError:
        """`status`: that of a process as `subprocess` tells it."""
        with suppress(ProcessLookupError):
            os.killpg(self._leader.pid, signal.SIGKILL)
        log.error("a worker ended with %d: %s", status, self._stderr.read().decode(errors="replace"))
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return EbiError(f"a worker process {how}", hint="is memory short? the log tells more; try again")
