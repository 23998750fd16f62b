"""The one gateway to other programs.

A failure names the command in a form that can be pasted, and tells a missing program, a signal and a non-zero
exit apart. A secret goes in by `stdin` or by a file descriptor (`secret_fd`), never by an argument or the environment.
"""

import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from plugin.errors import EbiError, Kind
from plugin.host.lock import held

log = logging.getLogger(__name__)

# A child sees only what it needs: a caller's environment may hold what must not travel.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Where Debian has the programs that a node may do without until a volume wants them.
OPTIONAL = {"mkfs.xfs": "xfsprogs", "xfs_growfs": "xfsprogs", "mkfs.btrfs": "btrfs-progs", "btrfs": "btrfs-progs"}


class CommandError(EbiError):
    """A program that failed: `returncode` is its exit status (negative: the signal), `stderr` its own words."""

    def __init__(self, argv: Sequence[str], returncode: int, stderr: str, *, kind: Kind = Kind.INTERNAL) -> None:
        self.returncode = returncode
        self.stderr = stderr.strip()
        how = f"was killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"exited with {returncode}"
        said = f": {self.stderr}" if self.stderr else ""
        super().__init__(f"{argv[0]} {how}{said}", kind=kind, hint=f"the command was: {shlex.join(argv)}")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of every child: a fixed PATH, untranslated messages, and udev's switch where there is none."""
    env = {"PATH": _PATH, "LC_ALL": "C", **(extra or {})}
    # Without a udevd nobody would answer libdevmapper's cookie, and it would wait for ever.
    if not os.path.exists("/run/udev/control"):  # noqa: PTH110
        env["DM_DISABLE_UDEV"] = "1"
    return env


def run(
    argv: Sequence[str],
    *,
    stdin: bytes = b"",
    fds: Iterable[int] = (),
    ok: Iterable[int] = (0,),
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run `argv` to its end and return it with `returncode`, `stdout` and `stderr` (bytes).

    `fds` are inherited under their own numbers (name them as /proc/self/fd/N), and so are the locks that this thread
    holds: see `plugin.host.lock`. Raises `CommandError` when the exit
    status is not in `ok`, and an `EbiError` of kind UNAVAILABLE when there is no such program.
    """
    start = time.monotonic()
    try:
        done = subprocess.run(
            list(argv), input=stdin, capture_output=True, pass_fds=(*fds, *held()), env=environment(env), check=False
        )
    except FileNotFoundError as error:
        package = OPTIONAL.get(argv[0])
        hint = "install the package that holds it" + (f" (Debian: {package})" if package else "")
        raise EbiError(f"{argv[0]}: no such program", kind=Kind.UNAVAILABLE, hint=hint) from error
    log.debug("ran %s: %d in %.3f s", shlex.join(argv), done.returncode, time.monotonic() - start)
    if done.returncode not in tuple(ok):
        raise CommandError(argv, done.returncode, done.stderr.decode(errors="replace"))
    return done


@contextmanager
def at_the_end(argv: Sequence[str]) -> Iterator[int]:
    """Run `argv` when the block ends, however it ends: where this process is killed in it, a child does so.

    The child waits for the end of a pipe, which the block gets, and which nobody has but the programs that it is given
    to with `run(fds=…)`: those outlive a kill, and `argv` comes after them. Raises as `run` does when `argv` fails.
    """
    waiting = ["sh", "-c", 'read -r _; exec "$@"', "sh", *argv]
    child = subprocess.Popen(
        waiting,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=environment(), start_new_session=True,
    )  # fmt: skip
    assert child.stdin
    try:
        yield child.stdin.fileno()
    finally:
        _, stderr = child.communicate()
        if child.returncode < 0:  # somebody killed it, perhaps before it could do its work
            run(argv)
        elif child.returncode:
            raise CommandError(argv, child.returncode, stderr.decode(errors="replace"))


@contextmanager
def secret_fd(secret: bytes) -> Iterator[int]:
    """A file descriptor of an anonymous memory file that holds `secret`, wiped and closed afterwards.

    Hand it to a child as /proc/self/fd/N with `run(fds=…)`.
    """
    fd = os.memfd_create("secret", os.MFD_CLOEXEC)
    try:
        os.write(fd, secret)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.pwrite(fd, bytes(len(secret)), 0)
        os.close(fd)
