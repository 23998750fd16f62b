"""The one exception family: what went wrong with which object, what to do about it, and of which kind it is.

`csi/` maps the kind to a gRPC status, the command line to an exit status. A message never holds a secret.
"""

import errno
from enum import Enum


class Kind(Enum):
    """What sort of failure it is; the value is the exit status of the command line."""

    INTERNAL = 1
    INVALID = 2
    NOT_FOUND = 3
    EXISTS = 4
    PRECONDITION = 5
    BUSY = 6
    EXHAUSTED = 7
    OUT_OF_RANGE = 8
    UNAVAILABLE = 9
    UNSUPPORTED = 10
    CANCELLED = 11


class EbiError(Exception):
    """A failure that a user reads: `message` names the object, `hint` says what to do."""

    def __init__(self, message: str, *, kind: Kind = Kind.INTERNAL, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


def invalid(message: str, hint: str = "") -> EbiError:
    """Bad input: a field, a parameter, a name."""
    return EbiError(message, kind=Kind.INVALID, hint=hint)


def not_found(message: str, hint: str = "") -> EbiError:
    """The named object does not exist."""
    return EbiError(message, kind=Kind.NOT_FOUND, hint=hint)


def exists(message: str, hint: str = "") -> EbiError:
    """The object exists already and is another one than asked for."""
    return EbiError(message, kind=Kind.EXISTS, hint=hint)


def precondition(message: str, hint: str = "") -> EbiError:
    """The object is not in a state that allows the call."""
    return EbiError(message, kind=Kind.PRECONDITION, hint=hint)


def busy(message: str, hint: str = "") -> EbiError:
    """Another operation on the same object is under way."""
    return EbiError(message, kind=Kind.BUSY, hint=hint)


def exhausted(message: str, hint: str = "") -> EbiError:
    """No room: disk, memory, loop devices."""
    return EbiError(message, kind=Kind.EXHAUSTED, hint=hint)


def out_of_range(message: str, hint: str = "") -> EbiError:
    """A size that can't be had."""
    return EbiError(message, kind=Kind.OUT_OF_RANGE, hint=hint)


def unavailable(message: str, hint: str = "") -> EbiError:
    """Not now; the same call may succeed later."""
    return EbiError(message, kind=Kind.UNAVAILABLE, hint=hint)


def unsupported(message: str, hint: str = "") -> EbiError:
    """Nothing here can do that."""
    return EbiError(message, kind=Kind.UNSUPPORTED, hint=hint)


def of_system(error: OSError, doing: str = "") -> EbiError:
    """What the kernel said, for a user: the file that it is about, if it is known, and what was being done."""
    about = ": ".join(str(part) for part in (doing and f"{doing} failed", error.filename) if part)
    message = ": ".join(part for part in (about, error.strerror or str(error)) if part)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return exhausted(message, "free some space there")
    if isinstance(error, PermissionError):
        return precondition(message, "run this as root, with all its capabilities")
    if error.errno == errno.EROFS:
        return precondition(message, "is it mounted read-only, or did it become so by an error?")
    broken = error.errno in (errno.EIO, errno.ENXIO, errno.EUCLEAN)
    return EbiError(message, hint="see the kernel's log" if broken else "")
