"""A worker process of the copy engine: takes runs of a disk from its standard input, reads, ciphers and writes them.

The first line of input is the job, with the keys in it; each further line a list of runs, answered by a line that says
what was written. The files are inherited open. It ends with its input, or with its parent.
"""

import ctypes
import json
import mmap
import os
import signal
import sys

from plugin.errors import EbiError, Kind
from plugin.images import formats
from plugin.images.sums import Sum
from plugin.images.target import PIECE, Target, TargetSpec

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Work until the input ends; 1 after a failure, which the last line of output tells."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    job = json.loads(sys.stdin.buffer.readline() or "null")
    if job is None or os.getppid() != job["parent"]:  # the parent was gone before we could ask to follow it
        return 1
    try:
        _work(job)
    except EbiError as error:
        _answer({"message": error.message, "hint": error.hint, "kind": error.kind.name})
        return 1
    except OSError as error:
        text = f"{error.strerror} (errno {error.errno})"
        _answer({"message": text, "hint": "see the kernel's log for the device", "kind": Kind.INTERNAL.name})
        return 1
    return 0


def _work(job: dict[str, dict[str, object]]) -> None:
    source = formats.restored(job["source"])
    target = Target(TargetSpec.restored(job["target"])) if job["target"] else None
    buffer = memoryview(mmap.mmap(-1, PIECE))  # aligned to pages, as direct I/O wants it
    for line in sys.stdin.buffer:
        done, written = 0, []
        for start, length in json.loads(line):
            piece = buffer[:length]
            source.read(piece, start)
            sums = target.write(piece, start) if target else [Sum.of(piece, start)]
            written += [(item.start, item.length, item.crc) for item in sums]
            done += length
        _answer({"done": done, "written": written})


def _answer(value: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
