"""The worker processes of the copy engine: each takes runs of a disk from a socket, reads, ciphers and writes them.

`python -m plugin.images.worker FD PARENT`: FD is the socket that all share, standard input the job, with the keys in
it. The first message brings the open files, with the numbers that they have in the job. Each other one is a list of
runs, its answer what was written. The process that is started only forks the others and tells when one dies. All end
when the other end of the socket is closed, or with their parent.
"""

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from plugin.errors import EbiError, Kind
from plugin.images import formats
from plugin.images.sums import Sum
from plugin.images.target import LONGEST_MESSAGE, PIECE, Target, TargetSpec

_PR_SET_PDEATHSIG = 1
_MOST_FILES = 253  # what the kernel takes in one message
# Exit statuses: of a worker whose last message says why, and of one that did not get so far; not Python's own, 1.
_TOLD, _BROKEN = 71, 70


def main() -> int:
    """Have as many workers as the job says, and wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # one that ignores it, which is inherited, can't wait for children
    fd, parent = map(int, sys.argv[1:])
    if not _following(parent):
        return _TOLD
    with socket.socket(fileno=fd) as shared:
        text = sys.stdin.buffer.read()
        if not text:  # nothing is to be done after all
            return 0
        job, leader = _received(text, shared), os.getpid()
        for _ in range(job["workers"]):
            if os.fork() == 0:
                os._exit(_worker(job, shared, leader))
        for _ in range(job["workers"]):
            status = os.waitstatus_to_exitcode(os.wait()[1])
            if status not in (0, _TOLD):
                _tell(shared, {"died": status})
    return 0


def _received(text: bytes, shared: socket.socket) -> Any:
    """The job, with the numbers of the open files as they are here."""
    numbers, fds, _, _ = socket.recv_fds(shared, LONGEST_MESSAGE, _MOST_FILES)
    here = dict(zip(json.loads(numbers), fds, strict=True))

    def renumbered(value: dict[str, Any]) -> dict[str, Any]:
        return value | {key: here[value[key]] for key in ("fd", "direct") if value.get(key, -1) >= 0}

    return json.loads(text, object_hook=renumbered)


def _following(parent: int) -> bool:
    """Have this process killed when its parent ends; False where it was gone before we could ask for that."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def _worker(job: Mapping[str, Any], shared: socket.socket, leader: int) -> int:
    """All that a forked worker does; returns its exit status."""
    try:
        if _following(leader):
            _work(job, shared)
        return 0
    except EbiError as error:
        _tell(shared, {"message": error.message, "hint": error.hint, "kind": error.kind.name})
        return _TOLD
    except OSError as error:
        text = f"{error.strerror} (errno {error.errno})"
        _tell(shared, {"message": text, "hint": "see the kernel's log for the device", "kind": Kind.INTERNAL.name})
        return _TOLD
    except BaseException:
        traceback.print_exc()
        return _BROKEN


def _work(job: Mapping[str, Any], shared: socket.socket) -> None:
    source = formats.restored(job["source"])
    target = Target(TargetSpec.restored(job["target"])) if job["target"] else None
    buffer = memoryview(mmap.mmap(-1, PIECE))  # aligned to pages, as direct I/O wants it
    while message := shared.recv(LONGEST_MESSAGE):
        done, written = 0, []
        for start, length in json.loads(message):
            piece = buffer[:length]
            source.read(piece, start)
            sums = target.write(piece, start) if target else [Sum.of(piece, start)]
            written += [(item.start, item.length, item.crc) for item in sums]
            done += length
        _tell(shared, {"done": done, "written": written})


def _tell(shared: socket.socket, value: Mapping[str, object]) -> None:
    try:
        shared.send(json.dumps(value).encode())
    except (BrokenPipeError, ConnectionResetError):
        return  # nobody waits for it any more


if __name__ == "__main__":
    sys.exit(main())
