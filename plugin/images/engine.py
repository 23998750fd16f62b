"""The copy engine: one disk into another, by worker processes that each take the next piece that is left.

Processes, since the threads of one interpreter do not scale at ciphering. A worker gets its keys by its standard input
and the files as inherited descriptors. Reading, ciphering and writing overlap between workers, and the disk works
while they do, since they write past the page cache where the filesystem lets them.
"""

import json
import logging
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from plugin.errors import EbiError, Kind
from plugin.host.files import Extent
from plugin.host.run import environment
from plugin.images import extents
from plugin.images.disk import Source
from plugin.images.sums import Sum
from plugin.images.target import PIECE, TargetSpec

log = logging.getLogger(__name__)

_MOST_WORKERS = 8
_AHEAD = 2  # pieces that a worker has: one at work, one to go on with
_ROOT = Path(__file__).parents[2]


def copy(
    source: Source,
    target: TargetSpec | None,
    runs: list[Extent],
    *,
    workers: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Sum]:
    """Copy `runs` of `source` into `target`; returns what was not all zeros, which alone was written, in order.

    A dense target gets all of `runs`; with no target they are read only, and the checksums are of what the source
    has there. `advance` is called with bytes as they are done; what it raises ends the copy.
    `workers`: 0 for one a core and one more. Nothing is synced. Raises what a worker met, and INTERNAL when one died.
    """
    pieces = _pieces(runs)
    # One more than there are cores, for the disk's sake: a worker that writes or reads ciphers nothing.
    wanted = workers or min(len(os.sched_getaffinity(0)) + 1, _MOST_WORKERS)
    count = max(1, min(wanted, -(-extents.total(runs) // PIECE)))
    origin = source.description()
    job: dict[str, object] = {
        "source": origin,
        "target": target.description() if target else None,
        "parent": os.getpid(),
    }
    fds = ({*_fds(origin)} | ({target.fd, target.direct} if target else set())) - {-1}
    team: list[_Worker] = []
    try:
        for _ in range(count if runs else 0):
            team.append(_Worker(job, fds))
        written = _drive(team, pieces, advance)
    except BaseException:
        for worker in team:
            worker.kill()
        raise
    for worker in team:
        worker.end()
    return written


def _fds(description: Mapping[str, Any]) -> Iterator[int]:
    """The file descriptors in the description of a source, which may be made of others."""
    for key, value in description.items():
        if key == "fd":
            yield value
        elif isinstance(value, Mapping):
            yield from _fds(value)


def _pieces(runs: Iterable[Extent]) -> Iterator[list[tuple[int, int]]]:
    """Lists of (start, length), each list of at most one piece's bytes in all; cut at multiples of a piece."""
    piece: list[tuple[int, int]] = []
    size = 0
    for run in runs:
        at = run.start
        while at < run.end:
            length = min((at // PIECE + 1) * PIECE, run.end) - at
            if size + length > PIECE:
                yield piece
                piece, size = [], 0
            piece.append((at, length))
            at, size = at + length, size + length
    if piece:
        yield piece


def _drive(team: "list[_Worker]", pieces: Iterator[list[tuple[int, int]]], advance: Callable[[int], None]) -> list[Sum]:
    written: list[Sum] = []
    with selectors.DefaultSelector() as selector:
        for worker in team:
            selector.register(worker.answers, selectors.EVENT_READ, worker)
        for _ in range(_AHEAD):
            for worker in team:
                worker.give(next(pieces, None))
        while selector.get_map():
            for key, _ in selector.select():
                worker = key.data
                for done, sums in worker.take():
                    written += sums
                    worker.give(next(pieces, None))
                    advance(done)
                if not worker.pending:
                    selector.unregister(worker.answers)
    return sorted(written, key=lambda item: item.start)


class _Worker:
    """One process and the pipes to it."""

    def __init__(self, job: dict[str, object], fds: Iterable[int]) -> None:
        command = [sys.executable, "-s", "-m", "plugin.images.worker"]
        # A group of its own: an interrupt at the terminal is for us, and we end the workers.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            pass_fds=tuple(fds), env=environment({"PYTHONPATH": str(_ROOT)}), process_group=0,
        )  # fmt: skip
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._input, self.answers, self._stderr = self._process.stdin, self._process.stdout, self._process.stderr
        self._rest = b""
        self.pending = 0
        self._send(job)

    def give(self, piece: list[tuple[int, int]] | None) -> None:
        """Hand it one more piece; None: there are no more."""
        if piece is not None:
            self._send(piece)
            self.pending += 1

    def take(self) -> Iterator[tuple[int, list[Sum]]]:
        """What it has done since: bytes, and what was written. Raises what it met."""
        data = os.read(self.answers.fileno(), 1 << 20)
        if not data:
            raise self._died()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            if "message" in answer:
                raise EbiError(answer["message"], kind=Kind[answer["kind"]], hint=answer["hint"])
            self.pending -= 1
            yield answer["done"], [Sum(*item) for item in answer["written"]]

    def end(self) -> None:
        """Let it go, all its work done."""
        self._input.close()
        self._process.wait()
        self._close()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()
        self._close()

    def _send(self, value: object) -> None:
        try:
            self._input.write(json.dumps(value).encode() + b"\n")
            self._input.flush()
        except BrokenPipeError:
            return  # its last words, or its end, are read from the other pipe

    def _died(self) -> EbiError:
        status = self._process.wait()
        log.error("a worker ended with %d: %s", status, self._stderr.read().decode(errors="replace"))
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return EbiError(f"a worker process {how}", hint="is memory short? the log tells more; try again")

    def _close(self) -> None:
        for stream in (self._input, self.answers, self._stderr):
            try:
                stream.close()
            except BrokenPipeError:
                continue
