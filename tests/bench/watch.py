"""What a process and all its descendants take while they run: memory, and blocks of disk."""

import os
import stat
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_EVERY = 0.01  # seconds
_SECTOR = 512  # st_blocks counts these, whatever the filesystem: inode(7)


@dataclass(frozen=True)
class Peaks:
    """The most that was seen at one moment, in bytes.

    `memory` is the proportional set size of all processes but those that derive keys, which are in `derivation`.
    `disk` is what all files take that are new under the watched directories or held open for writing, unlinked ones
    included.
    """

    memory: int
    derivation: int
    disk: int


def watched(command: Sequence[str | os.PathLike[str]], directories: Sequence[Path]) -> Peaks:
    """Run `command` to its end, which must be a good one, and watch it."""
    before = set(_blocks_below(directories))
    memory = derivation = disk = 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    done = threading.Event()
    words: list[bytes] = []

    def end() -> None:
        words.append(process.communicate()[1])
        done.set()

    thread = threading.Thread(target=end)
    thread.start()
    while not done.wait(_EVERY):
        ours = keys = 0
        files = _blocks_below(directories)
        for pid in descendants(process.pid):
            with suppress(OSError):
                size = _proportional(pid)
                if Path(f"/proc/{pid}/comm").read_text() == "cryptsetup\n":
                    keys += size
                else:
                    ours += size
            files |= dict(_written_by(pid))
        memory, derivation = max(memory, ours), max(derivation, keys)
        disk = max(disk, sum(size for inode, size in files.items() if inode not in before))
    thread.join()
    if process.returncode:
        raise RuntimeError(f"{command}: {words[0].decode(errors='replace')}")
    return Peaks(memory, derivation, disk)


def descendants(pid: int) -> Iterator[int]:
    """`pid` and all below it."""
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from descendants(int(child))


def disk_usage(directory: Path) -> int:
    """Bytes that the files below `directory` take."""
    return sum(_blocks_below([directory]).values())


def _proportional(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return 0


def _blocks_below(directories: Sequence[Path]) -> dict[tuple[int, int], int]:
    found: dict[tuple[int, int], int] = {}
    for directory in directories:
        for folder, _, names in os.walk(directory):
            for name in names:
                with suppress(OSError):
                    status = Path(folder, name).lstat()
                    found[status.st_dev, status.st_ino] = status.st_blocks * _SECTOR
    return found


def _written_by(pid: int) -> Iterator[tuple[tuple[int, int], int]]:
    """The regular files that the process holds open for writing, wherever they are, memory files left out."""
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                status = entry.stat()
                if not stat.S_ISREG(status.st_mode) or str(entry.readlink()).startswith("/memfd:"):
                    continue
                flags = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().split("flags:")[1].split()[0]
                if int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
                    yield (status.st_dev, status.st_ino), status.st_blocks * _SECTOR
